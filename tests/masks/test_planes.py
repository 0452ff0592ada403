"""Slides of which a part was scanned: annotations in, masks and outlines out, all in one plane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import MaskError
from histoflare.masks.importers.geojson import import_annotations
from histoflare.masks.outlines import write_outlines
from histoflare.masks.segmenter import SegmentedSlide, segment_slide
from histoflare.masks.windows import IGNORE
from histoflare.slides.mask_overlay import draw_classes
from histoflare.slides.mask_pyramid import MaskPyramid
from histoflare.slides.overlay import read_picture
from histoflare.slides.planes import Plane, PlaneName
from histoflare.slides.reader import Slide
from tests.bags.conftest import paint_slide
from tests.masks.window_models import ByDarkness
from tests.refusals import raises_reason
from tests.slides.scanned import write_scn

CORNER, SCANNED, GLASS = (701, 502), (333, 270), (1500, 1100)
LABELS = ("light", "middle", "dark")
COLOURS = ((0, 90, 181), (220, 50, 32), (0, 135, 90))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.scn"
    write_scn(path, paint_slide(1, SCANNED), CORNER, GLASS)
    with Slide(path) as slide:
        assert slide.info.l0_size_px == GLASS and slide.info.l0_bounds_px == (*CORNER, *SCANNED)
    return path


def segment(slide_path: Path, folder: Path, plane: PlaneName) -> SegmentedSlide:
    with Slide(slide_path) as slide:
        return segment_slide(slide, ByDarkness(), folder / f"{plane}.tiff", model_id="m", plane=plane)


def outlines(result: SegmentedSlide) -> Path:
    path = result.path.with_suffix(".geojson")
    with MaskPyramid(result.path) as mask:
        write_outlines(path, mask, LABELS, COLOURS, l0_per_px=result.l0_per_px)
    return path


def imported(slide_path: Path, geojson: Path, out: Path, **options: Any) -> NDArray[np.uint8]:
    """Return the masks of an import, laid on level 0."""
    options = {"patient": "p", "region_px": 400, "smallest_px": 32, **options}
    with Slide(slide_path) as slide:
        report = import_annotations(slide, geojson, LABELS, 0.5, out, **options)
        laid = np.full((GLASS[1], GLASS[0]), IGNORE, np.uint8)
        for row in report.manifest.rows:
            left, top = (int(part[1:]) for part in row.image.stem.split("_")[-2:])
            mask, image = np.asarray(Image.open(row.mask)), np.asarray(Image.open(row.image))
            np.testing.assert_array_equal(image, slide.read((left, top), mask.shape[::-1], 0.5))
            laid[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return laid


@pytest.mark.parametrize("plane", ["bounds", "level0"])
def test_outlines_that_go_out_and_come_in_again_are_the_same_pixels(
    slide_path: Path, tmp_path: Path, plane: PlaneName
) -> None:
    result = segment(slide_path, tmp_path, plane)
    geojson = outlines(result)
    mask = tifffile.imread(result.path)
    x, y = result.plane.l0_xy
    assert (x, y) == (CORNER if plane == "bounds" else (0, 0))
    assert mask.shape[::-1] == (SCANNED if plane == "bounds" else GLASS)
    expected = np.full((GLASS[1], GLASS[0]), IGNORE, np.uint8)
    expected[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    assert len(np.unique(expected)) == 4
    np.testing.assert_array_equal(imported(slide_path, geojson, tmp_path / "out"), expected)
    said = json.loads(geojson.read_text())
    assert (said["plane"], said["l0_xy"], said["l0_size_px"]) == (plane, [x, y], list(mask.shape[::-1]))
    with MaskPyramid(result.path) as opened:
        assert opened.plane == Plane(plane, (x, y), mask.shape[::-1])


def test_both_planes_have_one_mask_and_one_picture(slide_path: Path, tmp_path: Path) -> None:
    masks, pictures = [], []
    for plane in ("bounds", "level0"):
        result = segment(slide_path, tmp_path, plane)  # type: ignore[arg-type]
        masks.append(tifffile.imread(result.path))
        with Slide(slide_path) as slide, MaskPyramid(result.path) as mask:
            base = read_picture(slide, GLASS[0])
            picture = draw_classes(base, mask, result.l0_per_px, LABELS, ["", "", ""], mpp=slide.mpp)
        pictures.append(np.asarray(picture))
    (left, top), (width, height) = CORNER, SCANNED
    np.testing.assert_array_equal(masks[1][top : top + height, left : left + width], masks[0])
    np.testing.assert_array_equal(*pictures)
    changed = (pictures[0][: GLASS[1]] != np.asarray(base.image)).any(axis=2)
    coloured = np.isin(masks[1], range(3))
    assert (changed == coloured).mean() > 0.999  # a pixel may have the class's very colour


def write(path: Path, ring: list[list[float]], **said: Any) -> Path:
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "dark"}},
    }
    path.write_text(json.dumps({"type": "FeatureCollection", **said, "features": [feature]}))
    return path


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def test_qupaths_coordinates_count_from_the_bounds_unless_told_otherwise(
    slide_path: Path, tmp_path: Path
) -> None:
    expected = np.full((GLASS[1], GLASS[0]), IGNORE, np.uint8)
    expected[502 + 20 : 502 + 120, 701 + 30 : 701 + 90] = 2
    qupath = write(tmp_path / "qupath.geojson", box(30, 20, 90, 120))
    asap = write(tmp_path / "asap.geojson", box(731, 522, 791, 622))
    said = write(tmp_path / "said.geojson", box(731, 522, 791, 622), plane="level0")
    moved = write(tmp_path / "moved.geojson", box(0, 0, 60, 100))
    for number, (path, options) in enumerate(
        [
            (qupath, {}),
            (qupath, {"plane": "bounds"}),
            (asap, {"plane": "level0"}),
            (said, {}),
            (moved, {"l0_offset": (731, 522)}),
        ]
    ):
        made = imported(slide_path, path, tmp_path / str(number), **options)
        np.testing.assert_array_equal(made, expected)
    with Slide(slide_path) as slide:
        report = import_annotations(slide, qupath, LABELS, 0.5, tmp_path / "n", patient="p")
    assert "(701, 502)" in report.notes[0] and "bounds" in report.notes[0]


def test_the_wrong_plane_is_seen_where_nothing_was_scanned(slide_path: Path, tmp_path: Path) -> None:
    qupath = write(tmp_path / "qupath.geojson", box(30, 20, 90, 120))
    asap = write(tmp_path / "asap.geojson", box(731, 522, 791, 622))
    for path, options, advice in (
        (asap, {}, "give --plane level0"),
        (qupath, {"plane": "level0"}, "give --plane bounds"),
        (qupath, {"l0_offset": (0, 0)}, "(counted from --offset); was it drawn on another slide?"),
    ):
        with pytest.raises(MaskError) as caught:
            imported(slide_path, path, tmp_path / "out", **options)
        assert "333 x 270 px at (701, 502)" in str(caught.value)
        assert advice in str(caught.value)
    said = write(tmp_path / "wrong.geojson", box(731, 522, 791, 622), plane="bounds")
    with raises_reason("ANNOTATION_INVALID", said, "feature 0 ", "plane bounds"):
        imported(slide_path, said, tmp_path / "out")
    said = write(tmp_path / "said.geojson", box(731, 522, 791, 622), plane="level0")
    with raises_reason("JOB_INVALID", "level0"):
        imported(slide_path, said, tmp_path / "out", plane="bounds")


def test_regions_do_not_reach_beyond_what_was_scanned(slide_path: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.geojson", box(2, 3, 12, 13))
    with Slide(slide_path) as slide:
        report = import_annotations(
            slide, path, LABELS, 0.5, tmp_path / "out", patient="p", smallest_px=200, margin_px=30
        )
    assert [row.image.name for row in report.manifest.rows] == ["s_x701_y502.png"]
