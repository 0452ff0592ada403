"""Manifests of images and masks: what is read, and every fault at once."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from histoflare.errors import ManifestError
from histoflare.masks.image_manifest import (
    ImageManifest,
    ImageRow,
    assign_image_splits,
    read_image_manifest,
    write_image_manifest,
)
from histoflare.slides.manifest import Manifest, ManifestRow, assign_splits
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason


def write(folder: Path, text: str) -> Path:
    for name in ("a.png", "b.png", "c.png", "ma.png", "mb.png", "mc.png", "ta.png"):
        (folder / name).write_bytes(b"x")
    path = folder / "images.csv"
    path.write_text(text)
    return path


def faults(path: Path) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read_image_manifest(path)
    assert caught.value.reason == "MANIFEST_INVALID"
    return caught.value.problems


def test_paths_are_found_as_windows_writes_them(tmp_path: Path) -> None:
    (tmp_path / "Masks").mkdir()
    (tmp_path / "Masks" / "ma.png").write_bytes(b"x")
    path = write(tmp_path, "image,mask,patient\nA.PNG,masks\\ma.png,p1\nb.png,C:\\m\\mb.png,p2\n")
    (row, _) = read_image_manifest(path, check_files=False).rows
    assert (row.image, row.mask) == (tmp_path / "a.png", tmp_path / "Masks" / "ma.png")
    (problem,) = faults(path)
    assert problem.startswith("line 3: no such mask:") and "a path of Windows" in problem


def test_everything_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "image,mask,patient,tissue,mpp,split,site,sex,age_band,scanner\n"
        "a.png,ma.png,p1,ta.png,0.25,train,north,f,,GT450\n"
        "b.png,mb.png,p2,,,test,,,,\n",
    )
    first, second = read_image_manifest(path).rows
    assert first == ImageRow(
        2,
        tmp_path / "a.png",
        tmp_path / "ma.png",
        "p1",
        tmp_path / "ta.png",
        0.25,
        "train",
        {"site": "north", "sex": "f", "scanner": "GT450"},
        "a.png",
    )
    assert second == ImageRow(
        3, tmp_path / "b.png", tmp_path / "mb.png", "p2", None, None, "test", {}, "b.png"
    )


def test_every_fault_is_listed_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "image,mask,patient,tissue,mpp,split\n"
        "a.png,ma.png,p1,,0.25,train\n"
        "b.png,mb.png,p1,,0.25,test\n"
        "./a.png,mc.png,p2,,0,train\n"
        "c.png,ma.png,,gone.png,x,holdout\n"
        "d.png,d.png,p3,,,train\n",
    )
    found = faults(path)
    assert [problem.split(":")[0] for problem in found] == sorted(problem.split(":")[0] for problem in found)
    expected = {
        "line 3": ["patient p1 is in 'test' here and in 'train' in line 2"],
        "line 4": ["image ./a.png is already in line 2", "mpp '0'"],
        "line 5": [
            "no patient",
            "mpp 'x'",
            "split 'holdout'",
            "mask ma.png is already in line 2",
            "no such tissue",
        ],
        "line 6": ["its own mask", "no such image", "no such mask"],
    }
    for line, parts in expected.items():
        for part in parts:
            assert any(problem.startswith(f"{line}:") and part in problem for problem in found), (line, part)
    assert len(found) == sum(map(len, expected.values()))


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("image,patient", "no column 'mask'"),
        ("image,mask,patient,labels", "unknown column 'labels'"),
        ("image,mask,patient,tisue", "did you mean 'tissue'?"),
        ("image,mask,patient,image", "column 'image' twice"),
    ],
)
def test_columns_are_checked(tmp_path: Path, header: str, part: str) -> None:
    path = write(tmp_path, f"{header}\na.png,ma.png,p\n" if header.count(",") > 1 else f"{header}\na.png,p\n")
    assert any(part in problem for problem in faults(path))


def test_an_empty_manifest_says_what_it_needs(tmp_path: Path) -> None:
    with raises_reason("MANIFEST_INVALID", "image, mask, patient"):
        read_image_manifest(write(tmp_path, "image,mask,patient\n"))


def test_files_need_not_exist_where_they_are_not_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "image,mask,patient\ngone.png,gone-mask.png,p\n")
    assert len(read_image_manifest(path, check_files=False).rows) == 1
    assert len(faults(path)) == 2


def test_ids_are_those_of_slides(tmp_path: Path) -> None:
    path = write(tmp_path, "image,mask,patient\na.png,ma.png,p\n")
    manifest = read_image_manifest(path)
    assert manifest.row_id(manifest.rows[0]) == f"a-{hashlib.sha256(b'a.png').hexdigest()[:8]}"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "pixels").mkdir()
    rows = [
        ImageRow(
            9, tmp_path / "pixels" / "ä, b.png", tmp_path / "m.png", "p,1", None, 0.5, "train", {"sex": "F"}
        ),
        ImageRow(9, tmp_path / "c.png", tmp_path / "n.png", "p2", tmp_path / "t.png", None, "test", {}),
    ]
    written = write_image_manifest(tmp_path / "out" / "images.csv", rows)
    read = read_image_manifest(written.path, check_files=False)
    for row, original in zip(read.rows, rows, strict=True):
        assert row.image.resolve() == original.image and row.mask.resolve() == original.mask
        assert (row.tissue and row.tissue.resolve()) == original.tissue
        assert (row.patient, row.mpp, row.split, dict(row.subgroups)) == (
            original.patient,
            original.mpp,
            original.split,
            dict(original.subgroups),
        )
    assert [row.written for row in read.rows] == ["../pixels/ä, b.png", "../c.png"]
    assert "site" not in written.path.read_text().splitlines()[0]


def manifest_of(patients: list[str], split: str | None = None) -> ImageManifest:
    rows = [
        ImageRow(line, Path(f"{line}.png"), Path(f"m{line}.png"), patient, split=split)  # type: ignore[arg-type]
        for line, patient in enumerate(patients, start=2)
    ]
    return ImageManifest(Path("m.csv"), tuple(rows))


def test_splits_follow_the_rule_of_slides() -> None:
    patients = [f"p{index}" for index in range(20) for _ in range(3)]
    rows = tuple(ManifestRow(line, Path("s"), patient, "x") for line, patient in enumerate(patients))
    slides = assign_splits(Manifest(Path("m.csv"), rows), SplitRule(0.3, seed=5))
    expected = {row.patient: row.split for row in slides.rows}
    random.Random(0).shuffle(patients)
    split = assign_image_splits(manifest_of(patients), SplitRule(0.3, seed=5))
    assert {row.patient: row.split for row in split.rows} == expected
    assert set(expected.values()) == {"train", "test"}


def test_splits_are_kept_and_never_half(tmp_path: Path) -> None:
    given = manifest_of(["a", "b"], "train")
    assert assign_image_splits(given) is given
    mixed = ImageManifest(given.path, (given.rows[0], manifest_of(["c"]).rows[0]))
    with raises_reason("MANIFEST_INVALID", "line 2: ", "split"):
        assign_image_splits(mixed)
