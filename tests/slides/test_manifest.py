"""Manifests: what is read, and every fault at once."""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.errors import ManifestError
from histoflare.slides.manifest import (
    Manifest,
    ManifestRow,
    assign_splits,
    read_manifest,
    role_warnings,
    stratify_splits,
    write_manifest,
)
from histoflare.slides.splits import SplitRule
from tests.refusals import raises_reason


def write(folder: Path, text: str, slides: tuple[str, ...] = ("a.svs", "b.svs", "c.svs")) -> Path:
    for slide in slides:
        (folder / slide).write_bytes(b"slide")
    path = folder / "manifest.csv"
    path.write_bytes(text.encode())
    return path


def faults(path: Path, labels: tuple[str, ...] | None = None) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, labels)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def test_everything_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "slide,patient,label,mpp,split,site,sex,age_band,scanner\n"
        "a.svs,p1,LUAD,0.25,train,north,f,60-69,GT450\n"
        "\n"
        'b.svs,"p, 2",LUSC,,test,,,,\n',
    )
    manifest = read_manifest(path)
    assert manifest.labels == ("LUAD", "LUSC")
    first, second = manifest.rows
    assert first == ManifestRow(
        2, tmp_path / "a.svs", "p1", "LUAD", 0.25, "train", "north", "f", "60-69", "GT450", written="a.svs"
    )
    assert second == ManifestRow(4, tmp_path / "b.svs", "p, 2", "LUSC", None, "test", written="b.svs")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffslide,patient,label\na.svs,1,x\nb.svs,2,y\n",
        "slide;patient;label\na.svs;1;x\nb.svs;2;y\n",
        "slide,patient,label\r\na.svs,1,x\r\nb.svs,2,y\r\n",
        "slide,patient,label,mpp\na.svs,1,x\nb.svs,2,y",
        " slide , patient,label\n a.svs ,1, x\nb.svs,2,y\n,,\n",
        "slide\tpatient\tlabel\na.svs\t1\tx\nb.svs\t2\ty\n",
        "sep=;\r\nslide;patient;label\r\na.svs;1;x\r\nb.svs;2;y\r\n",
        "slide,patient,label\ra.svs,1,x\rb.svs,2,y\r",
        "Slide,PATIENT,Label,,\na.svs,1,x,,\nb.svs,2,y,,\n",
        "slide,patient,label\nA.SVS,1,x\n.\\b.svs,2,y\n",
    ],
    ids=[
        *("byte order mark", "semicolons", "CRLF", "short rows", "blanks", "tabs", "sep=", "CR"),
        *("capitals and empty columns", "paths of Windows"),
    ],
)
def test_spreadsheets_habits_are_tolerated(tmp_path: Path, text: str) -> None:
    rows = read_manifest(write(tmp_path, text)).rows
    assert [(row.slide.name, row.patient, row.label) for row in rows] == [
        ("a.svs", "1", "x"),
        ("b.svs", "2", "y"),
    ]


def test_utf16_and_decimal_commas(tmp_path: Path) -> None:
    """'Unicode text' of a spreadsheet, in a country that writes 0,25."""
    path = write(tmp_path, "")
    path.write_bytes("slide\tpatient\tlabel\tmpp\r\na.svs\tMüller\tx\t0,25\r\n".encode("utf-16"))
    (row,) = read_manifest(path).rows
    assert (row.patient, row.mpp) == ("Müller", 0.25)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_slide_is_found_however_its_letters_are_composed(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    file = tmp_path / unicodedata.normalize(form, "Übung") / unicodedata.normalize(form, "Prä 1.SVS")
    file.parent.mkdir()
    file.write_bytes(b"slide")
    written = unicodedata.normalize(other, "Übung\\Prä 1.svs")  # type: ignore[arg-type]
    path = write(tmp_path, f"slide,patient,label\n{written},1,x\n")
    assert read_manifest(path).rows[0].slide == file


def test_two_names_alike_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patient,label\nTWO.svs,1,x\n", ("two.svs", "Two.svs"))
    assert faults(path) == (f"line 2: no such slide: {tmp_path / 'TWO.svs'}",)
    path = write(tmp_path, "slide,patient,label\na.svs,1,x\nA.svs,2,y\n")
    assert faults(path) == ("line 3: slide A.svs is already in line 2",)


def test_what_a_spreadsheet_spoilt_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "slide,patient,label,age_band\na.svs,1.23457E+11,x,60-69\nb.svs,2,x,19-Oct\n"
        "C:\\scans\\c.svs,3,x,19. Okt\n",
    )
    said = faults(path)
    assert [each.split(":")[0] for each in said] == ["line 2", "line 3", "line 4", "line 4"]
    for each, words in zip(said, ("cut short", "a date", "a date", "path of Windows"), strict=True):
        assert words in each


@pytest.mark.parametrize("band", ["60-69", "adult", "over 65", "65+", "marginal", "<18", "5. decade"])
def test_bands_of_age_are_free_words(tmp_path: Path, band: str) -> None:
    path = write(tmp_path, f"slide,patient,label,age_band\na.svs,1,x,{band}\n")
    assert read_manifest(path).rows[0].age_band == band


def test_every_fault_at_once_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "slide,patient,label,mpp,split\n"
        "a.svs,p1,LUAD,0.25,train\n"
        "a.svs,p1,LUSC,0.25,train\n"
        "b.svs,,LUAD,20x,train\n"
        "c.svs,p3,LUAC,-1,trian\n"
        "d.svs,p1,LUSC,nan,test\n"
        "./b.svs,p5,LUSC,,test\n",
    )
    assert faults(path, ("LUAD", "LUSC")) == (
        "line 3: slide a.svs is already in line 2",
        "line 4: no patient",
        "line 4: mpp '20x' is not micrometres per pixel, such as 0.25",
        "line 5: split 'trian' is none of train, validation, test",
        "line 5: mpp '-1' is not micrometres per pixel, such as 0.25",
        "line 5: unknown label 'LUAC'; allowed are LUAD, LUSC",
        "line 6: mpp 'nan' is not micrometres per pixel, such as 0.25",
        "line 6: patient p1 is in 'test' here and in 'train' in line 2; a patient belongs to one split",
        f"line 6: no such slide: {tmp_path / 'd.svs'}",
        "line 7: slide ./b.svs is already in line 4",
    )


def test_a_label_in_two_spellings_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patient,label\na.svs,1,LUAD\nb.svs,2,x\nc.svs,3,luad\n")
    (fault,) = faults(path)
    assert fault.startswith("line 4: label 'luad'") and "'LUAD' in line 2" in fault
    assert faults(path, ("LUAD", "x")) == ("line 4: unknown label 'luad'; allowed are LUAD, x",)


def test_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patients,lable,weight,mpp,mpp\na.svs,1,x,3,,\n")
    assert faults(path) == (
        "line 1: no column 'patient'",
        "line 1: no column 'label'",
        "line 1: unknown column 'patients'; did you mean 'patient'?",
        "line 1: unknown column 'lable'; did you mean 'label'?",
        "line 1: unknown column 'weight'; allowed are slide, patient, label, mpp, split, site, sex, "
        "age_band, scanner",
        "line 1: column 'mpp' twice",
    )


def test_too_many_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patient,label\na.svs,1,x,y\nb.svs,2,y\n")
    assert faults(path) == ("line 2: 4 cells under 3 columns",)


@pytest.mark.parametrize("text", ["", "\n\n", "slide,patient,label\n", "slide,patient,label\n,,\n"])
def test_empty(tmp_path: Path, text: str) -> None:
    with raises_reason("MANIFEST_INVALID", "slide, patient, label"):
        read_manifest(write(tmp_path, text))


def test_unreadable(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("slide,patient,label\nä.svs,1,x\n".encode("latin-1"))
    unclosed = write(tmp_path, 'slide,patient,label\n"a.svs,1,x\n')
    for path, word in (
        (latin, "UTF-8"),
        (unclosed, "line 2 "),
        (tmp_path / "none.csv", "none.csv"),
    ):
        with raises_reason("MANIFEST_UNREADABLE", path, word):
            read_manifest(path)


def test_a_cohort_of_one_class_is_read_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patient,label\na.svs,1,x\nb.svs,2,x\n")
    for labels in (None, ("x", "y")):
        manifest = read_manifest(path, labels)
        assert manifest.labels == ("x",)
    warnings = role_warnings(assign_splits(manifest).rows, manifest.labels)
    assert "every row has the label 'x'" in warnings


def test_row_id(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    text = "slide,patient,label\na.svs,1,x\nsub/a.svs,2,y\n"
    manifest = read_manifest(write(tmp_path, text, ("a.svs", "sub/a.svs")))
    one, other = (manifest.row_id(row) for row in manifest.rows)
    assert one == "a-" + hashlib.sha256(b"a.svs").hexdigest()[:8]
    assert other == "a-" + hashlib.sha256(b"sub/a.svs").hexdigest()[:8]


def test_row_id_stays_when_the_slides_go(tmp_path: Path) -> None:
    path = write(tmp_path, "slide,patient,label\nslides\\A.svs,1,x\n")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").write_bytes(b"slide")
    there = read_manifest(path)
    assert there.rows[0].slide == tmp_path / "slides" / "a.svs"
    (tmp_path / "slides" / "a.svs").unlink()
    gone = read_manifest(path, check_files=False)
    assert there.row_id(there.rows[0]) == gone.row_id(gone.rows[0])
    assert gone.row_id(gone.rows[0]).startswith("A-")


def test_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "ü, 1.svs").write_bytes(b"slide")
    row = ManifestRow(0, tmp_path / "slides" / "ü, 1.svs", 'p"1', "x", 0.25, "test", site="north")
    path = tmp_path / "out" / "north.csv"
    written = write_manifest(path, [row])
    assert path.read_text().splitlines()[0] == "slide,patient,label,mpp,split,site"
    read = read_manifest(path, ("x", "y"))
    assert read.rows[0].written == written.rows[0].written == "../slides/ü, 1.svs"
    assert read.rows[0].slide.samefile(row.slide)
    assert [getattr(read.rows[0], name) for name in ("patient", "label", "mpp", "split", "site")] == [
        'p"1', "x", 0.25, "test", "north",
    ]  # fmt: skip
    assert read.row_id(read.rows[0]) == written.row_id(written.rows[0])


def cohort(patients: dict[str, str], slides_each: int = 2) -> Manifest:
    rows = [
        ManifestRow(0, Path(f"{patient}-{number}.svs"), patient, label)
        for patient, label in patients.items()
        for number in range(slides_each)
    ]
    return Manifest(Path("cohort.csv"), tuple(rows))


def roles_of(manifest: Manifest) -> dict[str, str | None]:
    roles: dict[str, str | None] = {}
    for row in manifest.rows:
        assert roles.setdefault(row.patient, row.split) == row.split
    return roles


PATIENTS = st.dictionaries(st.text(max_size=8), st.sampled_from("xyz"), min_size=1, max_size=30)


@given(PATIENTS, PATIENTS, st.integers(), st.floats(0, 0.999), st.randoms())
def test_a_patient_more_moves_nobody(
    patients: dict[str, str], more: dict[str, str], seed: int, share: float, order: random.Random
) -> None:
    before = roles_of(assign_splits(cohort(patients), SplitRule(share, seed=seed)))
    manifest = cohort({**patients, **more})
    shuffled = list(manifest.rows)
    order.shuffle(shuffled)
    after = roles_of(assign_splits(replace(manifest, rows=tuple(shuffled)), SplitRule(share, seed=seed)))
    assert before.items() <= after.items()
    assert set(after) == set(patients) | set(more)


def test_a_class_without_somebody_to_train_or_test_on_is_told() -> None:
    def told(*roles: tuple[str, str]) -> list[str]:
        rows = [
            ManifestRow(0, Path("s"), f"p{n}", label, split=split)  # type: ignore[arg-type]
            for n, (split, label) in enumerate(roles)
        ]
        return role_warnings(rows, ("x", "y"))

    assert told(("train", "x"), ("train", "y"), ("test", "x"), ("test", "y")) == []
    (warning,) = told(("train", "x"), ("train", "y"), ("test", "x"))
    assert "'y'" in warning and "test" in warning
    (warning,) = told(("train", "x"), ("test", "x"), ("test", "y"))
    assert "'y'" in warning and "training" in warning
    assert len(told(("train", "x"), ("test", "x"))) == 2
    assert len(told(("test", "x"), ("test", "y"))) == 1, "an external cohort"
    assert len(told(("validation", "x"))) == 2


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 5))
def test_a_written_split_is_stratified(n_x: int, n_y: int, seed: int) -> None:
    patients = {f"x{i}": "x" for i in range(n_x)} | {f"y{i}": "y" for i in range(n_y)}
    roles = roles_of(stratify_splits(cohort(patients), 0.2, seed))
    for label, count in (("x", n_x), ("y", n_y)):
        tested = sum(roles[patient] == "test" for patient, of in patients.items() if of == label)
        assert 1 <= tested < count
        assert tested == 1 or abs(tested - 0.2 * count) <= 0.5


def test_given_splits_stay_and_mixed_ones_are_refused() -> None:
    given_split = assign_splits(cohort({"a": "x", "b": "y"}))
    assert assign_splits(given_split, SplitRule(seed=7)) is given_split
    mixed = Manifest(given_split.path, (*given_split.rows, ManifestRow(9, Path("c.svs"), "c", "x")))
    with pytest.raises(ManifestError) as caught:
        assign_splits(mixed)
    assert caught.value.problems == ("line 9: no split",)


def test_shares_are_from_zero_to_below_one() -> None:
    manifest = cohort({f"p{i}": "xy"[i % 2] for i in range(10)})
    assert set(roles_of(stratify_splits(manifest, 0.0)).values()) == {"train"}
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ManifestError):
            stratify_splits(manifest, share)


def test_folds_and_a_split_column_do_not_go_together() -> None:
    """Every fold would train on the same patients, and nobody would know."""
    rule = SplitRule(None, folds=5, fold=1)
    given_split = assign_splits(cohort({"a": "x", "b": "y", "c": "x"}), SplitRule(0.0))
    with raises_reason("MANIFEST_INVALID", "cohort.csv", " 5 folds"):
        assign_splits(given_split, rule)
    outside = replace(given_split, rows=tuple(replace(row, split="test") for row in given_split.rows))
    assert assign_splits(outside, rule) is outside, "an external cohort is tested on in every fold"
