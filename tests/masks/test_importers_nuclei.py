"""Nucleus sets: folders of images and masks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoflare.errors import HistoflareError, ManifestError, MaskError
from histoflare.masks.importers.nuclei import LABELS, import_nuclei, read_nuclei

from .image_folders import rgb, save


def write_set(folder: Path, index: str | None = "name,patient\na,1\nb,1\nc,2\n") -> Path:
    for number, name in enumerate("abc"):
        save(folder / "images" / f"{name}.png", rgb(8, 10, number))
        save(folder / "masks" / f"{name}.png", np.eye(8, 10, dtype=np.uint8) * np.uint8(255))
    if index is not None:
        (folder / "index.csv").write_text(index)
    return folder


def test_binary_masks_and_patients(tmp_path: Path) -> None:
    report = import_nuclei(write_set(tmp_path / "set"), tmp_path / "out", mpp=0.25)
    assert report.labels == LABELS and report.notes == ()
    rows = report.manifest.rows
    assert [(row.patient, row.mpp) for row in rows] == [("1", 0.25), ("1", 0.25), ("2", 0.25)]
    assert rows[0].image.resolve() == (tmp_path / "set" / "images" / "a.png").resolve()
    np.testing.assert_array_equal(np.asarray(Image.open(rows[0].mask)), np.eye(8, 10))


@pytest.mark.parametrize("index", [None, "name,w\na,1\nb,1\nc,1\n"])
def test_without_patients_each_image_is_one_and_a_note_says_so(tmp_path: Path, index: str | None) -> None:
    report = import_nuclei(write_set(tmp_path / "set", index), tmp_path / "out")
    assert [row.patient for row in report.manifest.rows] == ["a", "b", "c"]
    (note,) = report.notes
    assert "each image counts as a patient" in note and "index.csv" in note


def test_masks_of_every_form_are_nuclei(tmp_path: Path) -> None:
    expected = np.array([[0, 1], [1, 0]])
    binary = (expected * 255).astype(np.uint8)
    forms = {
        "gray": binary,
        "instances": np.array([[0, 1], [300, 0]], np.uint16),
        "many": np.array([[0, 1], [256 * 256, 0]], np.int32),
        "colours": np.dstack([binary * 0, binary, binary * 0]),
        "alpha": np.dstack([binary, binary, binary, binary * 0 + 255]).astype(np.uint8),
        "bits": expected.astype(bool),
    }
    for name, pixels in forms.items():
        suffix = ".tif" if name == "many" else ".png"
        np.testing.assert_array_equal(read_nuclei(save(tmp_path / f"{name}{suffix}", pixels)), expected, name)


def test_a_second_import_changes_nothing(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    import_nuclei(source, out)
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.png")}
    manifest = (out / "images.csv").read_bytes()
    (out / "masks" / "b.png").write_bytes(b"half of")
    import_nuclei(source, out)
    assert (out / "images.csv").read_bytes() == manifest
    for path, (content, changed) in first.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == changed) == (path.name != "b.png")


@pytest.mark.parametrize("inside", [".", "masks", "images/out"])
def test_what_is_imported_is_never_written_over(tmp_path: Path, inside: str) -> None:
    source = write_set(tmp_path / "set")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with pytest.raises(MaskError, match="written over"):
        import_nuclei(source, source / inside)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def refusal(folder: Path, out: Path, kind: type[HistoflareError] = MaskError) -> str:
    with pytest.raises(kind) as caught:
        import_nuclei(folder, out)
    assert not (out / "images.csv").exists()
    return str(caught.value)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    (source / "index.csv").write_text("name,patient\na,1\na,2\nb,\nz,3\n")
    message = refusal(source, out, ManifestError)
    for part in (
        "line 3: image 'a' has another",
        "line 4: no patient",
        "line 5: no image 'z'",
        "image 'c' is not",
    ):
        assert part in message
    (source / "index.csv").unlink()
    save(source / "masks" / "a.png", np.zeros((8, 9), np.uint8))
    (source / "masks" / "b.png").write_bytes((source / "masks" / "c.png").read_bytes()[:60])
    message = refusal(source, out)
    assert "a.png: has 10 x 8 px, and its mask 9 x 8" in message and "b.png: the mask is damaged" in message
    (source / "masks" / "a.png").unlink()
    save(source / "masks" / "d.png", np.zeros((8, 10), np.uint8))
    message = refusal(source, out)
    assert "a.png: has no mask" in message and "d.png: a mask without an image" in message
    assert "no such folder" in refusal(tmp_path, out)


def test_a_real_set_of_instances(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "seg_dsb2018_he"
    seen: list[tuple[int, int]] = []
    report = import_nuclei(source, tmp_path, on_image=lambda *done: seen.append(done))
    assert seen[-1] == (107, 107) and len(report.manifest.rows) == 107
    with (source / "index.csv").open() as file:
        counts = {row["name"]: int(row["n_nuclei"]) for row in csv.DictReader(file)}
    for row in report.manifest.rows[::20]:
        instances = np.asarray(Image.open(source / "masks" / f"{row.image.stem}.png"))
        assert len(np.unique(instances)) - 1 == counts[row.image.stem]
        made = np.asarray(Image.open(row.mask))
        assert set(np.unique(made)) == {0, 1}
        np.testing.assert_array_equal(made == 1, instances != 0)
