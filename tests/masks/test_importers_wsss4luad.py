"""WSSS4LUAD as the challenge gives it, with each of its traps."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from histoflare.masks.images import load_image_cohort
from histoflare.masks.importers.wsss4luad import import_wsss4luad, labels_in_name
from histoflare.masks.importers.wsss4luad_masks import LABELS, read_binary, read_classes
from tests.refusals import raises_reason

from .image_folders import rgb, save, save_palette

COLOURS = {0: (0, 64, 128), 1: (64, 128, 0), 2: (243, 152, 0), 3: (255, 255, 255)}
SIDE = 60


def classes_of(seed: int) -> NDArray[np.uint8]:
    """Blocks of the four classes, background in the last quarter at least."""
    made = np.random.default_rng(seed).integers(0, 4, (6, 6), np.uint8).repeat(10, 0).repeat(10, 1)
    made[45:] = 3
    return made


def write_set(folder: Path, marked: int = 1) -> Path:
    """Two large images and a small one in each part; ``marked``: what background masks hold at background."""
    for part, first in (("2.validation", 0), ("3.testing", 10)):
        for number in range(3):
            side = SIDE if number < 2 else 30
            classes = classes_of(first + number)[:side, :side]
            save(folder / part / "img" / f"{number:02}.png", rgb(side, side, first + number))
            save_palette(folder / part / "mask" / f"{number:02}.png", classes, COLOURS)
            if part == "2.validation":
                background = ((classes == 3) == bool(marked)).astype(np.uint8)
                save(folder / part / "background-mask" / f"{number:02}.png", background)
    for name in ("10-[1, 1, 0].png", "11[0_0_1].png"):
        save(folder / "1.training" / name, rgb(20, 20))
    return folder


def test_a_resolution_that_is_none_is_refused(tmp_path: Path) -> None:
    with raises_reason("SLIDE_MPP_INVALID", "--mpp"):
        import_wsss4luad(write_set(tmp_path / "set"), tmp_path / "out", smallest_px=SIDE, mpp=20.0)


@pytest.mark.parametrize("marked", [1, 0])
def test_it_is_taken_over_with_either_polarity(tmp_path: Path, marked: int) -> None:
    source, out = write_set(tmp_path / "set", marked), tmp_path / "out"
    report = import_wsss4luad(source, out, smallest_px=SIDE)
    assert report.labels == LABELS == ("tumour", "stroma", "normal", "background")
    rows = report.manifest.rows
    patients = ["validation-00", "validation-01", "testing-00", "testing-01"]
    assert [row.patient for row in rows] == patients
    for row, seed in zip(rows, (0, 1, 10, 11), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(row.mask)), classes_of(seed))
        if row.patient.startswith("validation"):
            assert row.tissue is not None
            np.testing.assert_array_equal(np.asarray(Image.open(row.tissue)) > 0, classes_of(seed) != 3)
        else:
            assert row.tissue is None
    for part in (
        "patient",
        "above 0 is " + ("background" if marked else "tissue"),
        "2 images have no background",
        "2 images with a side below 60",
        "2 images of 1.training",
    ):
        assert any(part in note for note in report.notes), part
    with (out / "weak_labels.csv").open() as file:
        weak = {row.pop("image"): row for row in csv.DictReader(file)}
    assert weak == {
        "../set/1.training/10-[1, 1, 0].png": {"tumour": "1", "stroma": "1", "normal": "0"},
        "../set/1.training/11[0_0_1].png": {"tumour": "0", "stroma": "0", "normal": "1"},
    }
    assert all((out / image).is_file() for image in weak)
    cohort = load_image_cohort("luad", report.manifest.path, LABELS, window_px=SIDE)
    assert len(cohort.records) == 4


def test_a_second_import_changes_nothing(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    import_wsss4luad(source, out, smallest_px=SIDE)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "images.csv").unlink()
    (out / "tissue" / "validation-00.png").unlink()
    import_wsss4luad(source, out, smallest_px=SIDE)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_polarity_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    source, out = write_set(tmp_path / "set"), tmp_path / "out"
    noise = np.random.default_rng(0).integers(0, 2, (SIDE, SIDE), np.uint8)
    save(source / "2.validation" / "background-mask" / "01.png", noise)
    with raises_reason("MASK_CLASS", "--polarity") as caught:
        import_wsss4luad(source, out, smallest_px=SIDE)
    assert "validation-01" in str(caught.value) and "validation-00" not in str(caught.value)
    assert not (out / "images.csv").exists()
    report = import_wsss4luad(source, out, smallest_px=SIDE, polarity="tissue")
    tissue = np.asarray(Image.open(report.manifest.rows[1].tissue or ""))
    np.testing.assert_array_equal(tissue > 0, noise > 0)


def test_images_of_opposite_polarity_are_refused(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set")
    other = (classes_of(1) != 3).astype(np.uint8)
    save(source / "2.validation" / "background-mask" / "01.png", other)
    with raises_reason("MASK_CLASS", "validation-01: ", "--polarity"):
        import_wsss4luad(source, tmp_path / "out", smallest_px=SIDE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("12[1_1_0]", (1, 1, 0)),
        ("12-3-4-[1, 1, 0]", (1, 1, 0)),
        ("x-[0,0,1]", (0, 0, 1)),
        ("x-[ 1 , 0 , 1 ]", (1, 0, 1)),
        ("[1_0_0]-7", None),
        ("x-[1, 1]", None),
        ("x-[1, 2, 0]", None),
        ("x-[1, 1, 0, 1]", None),
        ("plain", None),
    ],
)
def test_labels_in_names(name: str, expected: tuple[int, int, int] | None) -> None:
    assert labels_in_name(name) == expected


def test_a_name_without_labels_is_an_error(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set")
    save(source / "1.training" / "nameless.png", rgb(20, 20))
    with raises_reason("MASK_CLASS", "nameless.png"):
        import_wsss4luad(source, tmp_path / "out", smallest_px=SIDE)


def test_classes_follow_colours_and_not_the_palettes_order(tmp_path: Path) -> None:
    classes = classes_of(3)
    colours = np.array(list(COLOURS.values()), np.uint8)
    shuffled = {7: COLOURS[0], 3: COLOURS[1], 0: COLOURS[2], 1: COLOURS[3]}
    indices = np.array([7, 3, 0, 1], np.uint8)[classes]
    for path in (
        save_palette(tmp_path / "palette.png", classes, COLOURS),
        save_palette(tmp_path / "shuffled.png", indices, shuffled),
        save(tmp_path / "rgb.png", colours[classes]),
        save(tmp_path / "rgba.png", np.dstack([colours[classes], np.full(classes.shape, 255, np.uint8)])),
        save(tmp_path / "gray.png", classes),
    ):
        np.testing.assert_array_equal(read_classes(path), classes, path.name)


def test_other_colours_are_refused(tmp_path: Path) -> None:
    wrong = {**COLOURS, 1: (64, 128, 1)}
    colours = np.array(list(wrong.values()), np.uint8)
    classes = classes_of(3)
    for path in (
        save_palette(tmp_path / "palette.png", classes, wrong),
        save(tmp_path / "rgb.png", colours[classes]),
    ):
        with raises_reason("MASK_CLASS", "(64, 128, 1)"):
            read_classes(path)
    with raises_reason("MASK_CLASS", "(4, 4, 4)"):
        read_classes(save(tmp_path / "gray.png", classes + np.uint8(1)))


def test_background_masks_have_two_values(tmp_path: Path) -> None:
    for values in ([0, 1], [0, 255]):
        pixels = np.array([values], np.uint8)
        np.testing.assert_array_equal(read_binary(save(tmp_path / "b.png", pixels)), [[False, True]])
    with raises_reason("MASK_CLASS", tmp_path / "b.png", 3):
        read_binary(save(tmp_path / "b.png", np.array([[0, 1, 2]], np.uint8)))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with raises_reason("MASK_MISSING", "2.validation", "3.testing"):
        import_wsss4luad(tmp_path, tmp_path / "out")
    source = write_set(tmp_path / "set")
    with raises_reason("MASK_MISSING", "1000"):
        import_wsss4luad(source, tmp_path / "out")
    (source / "3.testing" / "mask" / "01.png").unlink()
    with raises_reason("MASK_MISSING", "3.testing/img/01.png"):
        import_wsss4luad(source, tmp_path / "out", smallest_px=SIDE)
    save(source / "3.testing" / "mask" / "01.png", np.zeros((SIDE, SIDE - 1), np.uint8))
    with raises_reason("MASK_UNUSABLE", "testing-01", "59 x 60", "60 x 60"):
        import_wsss4luad(source, tmp_path / "out", smallest_px=SIDE)
