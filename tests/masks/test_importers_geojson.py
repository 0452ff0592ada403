"""QuPath's annotations: pixels by their middles, regions, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import MaskError, SlideError
from histoflare.masks.importers import ImportReport
from histoflare.masks.importers.geojson import import_annotations
from histoflare.masks.importers.polygons import Annotation, class_name, fill
from histoflare.masks.importers.regions import plan_regions
from histoflare.masks.windows import IGNORE
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from tests.refusals import raises_reason

from .image_folders import rgb

LABELS = ["background", "tumour"]


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(coordinates: Any, name: str | None = "tumour", kind: str = "Polygon") -> dict[str, Any]:
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": properties,
    }


def filled(ring: Sequence[Sequence[float]], size_px: tuple[int, int]) -> np.ndarray[Any, Any]:
    return fill([(np.array(ring, float),)], size_px)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.tif"
    write_pyramid(path, rgb(480, 640), 0.5)
    return path


def run(slide_path: Path, folder: Path, features: Any, mpp: float = 0.5, **options: Any) -> ImportReport:
    path = folder / "s.geojson"
    path.write_text(json.dumps(features))
    options = {"patient": "p", "region_px": 200, "smallest_px": 32} | options
    with Slide(slide_path) as slide:
        return import_annotations(slide, path, LABELS, mpp, folder / "out", **options)


def refusal(slide_path: Path, folder: Path, features: Any, **options: Any) -> str:
    with pytest.raises(MaskError) as caught:
        run(slide_path, folder, features, **options)
    assert caught.value.reason == "ANNOTATION_INVALID"
    return str(caught.value)


def whole(report: ImportReport, size_px: tuple[int, int], l0_per_px: int = 1) -> np.ndarray[Any, Any]:
    """All regions' masks laid on the slide; no two may overlap."""
    mask = np.full((size_px[1], size_px[0]), IGNORE, np.uint8)
    seen = np.zeros(mask.shape, bool)
    for row in report.manifest.rows:
        left, top = (int(part[1:]) // l0_per_px for part in row.image.stem.split("_")[-2:])
        part = np.asarray(Image.open(row.mask))
        inside = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
        assert not seen[inside].any()
        seen[inside] = True
        mask[inside] = part
    return mask


@given(st.data())
def test_a_box_holds_the_pixels_whose_middle_it_holds(data: st.DataObject) -> None:
    quarters = st.integers(-20, 100).map(lambda number: number / 4)
    left, right = sorted(data.draw(st.lists(quarters, min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(quarters, min_size=2, max_size=2, unique=True)))
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(15) + 0.5)
    expected = (left <= x) & (x < right) & (top <= y) & (y < bottom)
    corners = box(left, top, right, bottom)
    for ring in (corners, corners[::-1], corners[:-1]):
        np.testing.assert_array_equal(filled(ring, (20, 15)), expected)


@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 25)), min_size=3, max_size=8, unique=True))
def test_any_outline_is_filled_by_the_even_odd_rule(ring: list[tuple[float, float]]) -> None:
    def inside(px: float, py: float) -> bool:
        """Cast a ray to the left and count the edges it meets, one pixel at a time."""
        crossed = False
        for (ax, ay), (bx, by) in zip(ring, [*ring[1:], ring[0]], strict=True):
            (ax, ay), (bx, by) = ((ax, ay), (bx, by)) if ay <= by else ((bx, by), (ax, ay))
            if ay <= py < by and ax + (py - ay) * (bx - ax) / (by - ay) <= px:
                crossed = not crossed
        return crossed

    expected = [[inside(x + 0.5, y + 0.5) for x in range(20)] for y in range(18)]
    np.testing.assert_array_equal(filled(ring, (20, 18)), expected)


def test_a_disc_has_its_area() -> None:
    angles = np.linspace(0, 2 * math.pi, 1000, endpoint=False)
    ring = np.column_stack([200.3 + 150 * np.cos(angles), 199.6 + 150 * np.sin(angles)])
    made = filled(ring.tolist(), (400, 400))
    assert made.sum() == pytest.approx(math.pi * 150**2, rel=1e-3)  # Gauss's circle problem: error O(r^(2/3))
    y, x = np.nonzero(made)
    assert np.hypot(x + 0.5 - 200.3, y + 0.5 - 199.6).max() <= 150


def test_neighbours_share_no_pixel_and_leave_none() -> None:
    corner = [13.37, 11.9]
    square = box(0, 0, 30, 30)[:4]
    parts = [filled([square[k], square[(k + 1) % 4], corner], (30, 30)).astype(int) for k in range(4)]
    np.testing.assert_array_equal(sum(parts), np.ones((30, 30), int))


def test_holes_and_parts(slide_path: Path, tmp_path: Path) -> None:
    ring, hole = box(10, 20, 110, 120), box(40, 50, 60, 70)
    parts = [[box(130, 20, 150, 40)], [box(160, 20, 170, 30), box(162, 22, 164, 24)]]
    report = run(
        slide_path,
        tmp_path,
        {
            "type": "FeatureCollection",
            "features": [feature([ring, hole]), feature(parts, "background", "MultiPolygon")],
        },
    )
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[20:120, 10:110] = 1
    expected[50:70, 40:60] = IGNORE
    expected[20:40, 130:150] = 0
    expected[20:30, 160:170] = 0
    expected[22:24, 162:164] = IGNORE
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)


def test_images_are_what_the_slide_shows_there(slide_path: Path, tmp_path: Path) -> None:
    report = run(slide_path, tmp_path, [feature([box(10, 20, 110, 120)])], margin_px=5)
    (row,) = report.manifest.rows
    assert row.image.name == "s_x5_y15.png" and (row.patient, row.mpp) == ("p", 0.5)
    with Slide(slide_path) as slide:
        np.testing.assert_array_equal(np.asarray(Image.open(row.image)), slide.read((5, 15), (110, 110), 0.5))
    mask = np.asarray(Image.open(row.mask))
    assert (mask[5:-5, 5:-5] == 1).all() and (mask == 1).sum() == 100 * 100


def test_a_coarser_resolution(slide_path: Path, tmp_path: Path) -> None:
    ring, hole = box(40, 80, 240, 200), box(60, 100, 110, 191)
    report = run(slide_path, tmp_path, [feature([ring, hole])], mpp=1.0)
    expected = np.full((240, 320), IGNORE, np.uint8)
    expected[40:100, 20:120] = 1
    expected[50:95, 30:55] = (
        IGNORE  # 191 / 2 = 95.5: the middle of row 95 lies on the hole's edge, outside it
    )
    np.testing.assert_array_equal(whole(report, (320, 240), 2), expected)
    (row,) = report.manifest.rows
    with Slide(slide_path) as slide:
        np.testing.assert_array_equal(np.asarray(Image.open(row.image)), slide.read((40, 80), (100, 60), 1.0))


def test_small_features_lie_over_large_ones_in_any_order(slide_path: Path, tmp_path: Path) -> None:
    features = [
        feature([box(50, 50, 70, 70)]),
        feature([box(10, 10, 110, 110)], "background"),
        feature([box(55, 55, 60, 60)], "Ignore*"),
    ]
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[10:110, 10:110] = 0
    expected[50:70, 50:70] = 1
    expected[55:60, 55:60] = IGNORE
    for number, order in enumerate((features, features[::-1])):
        (tmp_path / str(number)).mkdir()
        report = run(slide_path, tmp_path / str(number), order)
        np.testing.assert_array_equal(whole(report, (640, 480)), expected)


def test_large_regions_are_cut_and_parts_fit(slide_path: Path, tmp_path: Path) -> None:
    report = run(slide_path, tmp_path, [feature([box(3, 5, 633, 471)])])
    sizes = [Image.open(row.image).size for row in report.manifest.rows]
    assert len(sizes) == 4 * 3 and max(max(size) for size in sizes) <= 200
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[5:471, 3:633] = 1
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)


@given(st.data())
def test_regions_hold_every_box_and_never_overlap(data: st.DataObject) -> None:
    width, height = data.draw(st.tuples(st.integers(1, 500), st.integers(1, 500)))
    corner = st.tuples(st.floats(-20, width - 0.01), st.floats(-20, height - 0.01))
    sizes = st.tuples(st.floats(0.1, 300), st.floats(0.1, 300))
    boxes = []
    for (x, y), (w, h) in data.draw(st.lists(st.tuples(corner, sizes), min_size=1, max_size=12)):
        if x + w > 0 and y + h > 0:
            boxes.append((x, y, x + w, y + h))
    margin_px, smallest_px = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 60))
    regions = plan_regions(
        boxes, (width, height), margin_px=margin_px, smallest_px=smallest_px, region_px=120
    )
    seen = np.zeros((height, width), int)
    for left, top, right, bottom in regions:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for side, whole_side in ((right - left, width), (bottom - top, height)):
            assert min(smallest_px, whole_side) <= side <= 120
        seen[top:bottom, left:right] += 1
    assert seen.max(initial=0) <= 1
    for left, top, right, bottom in boxes:
        held = seen[
            max(0, math.floor(top) - margin_px) : math.ceil(bottom) + margin_px,
            max(0, math.floor(left) - margin_px) : math.ceil(right) + margin_px,
        ]
        assert held.all()


def test_several_slides_and_a_second_import(slide_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "t.tif"
    other.write_bytes(slide_path.read_bytes())
    run(slide_path, tmp_path, [feature([box(3, 5, 633, 471)])])
    report = run(other, tmp_path, [feature([box(0, 0, 50, 50)])], patient="q")
    assert [row.patient for row in report.manifest.rows].count("q") == 1 and len(report.manifest.rows) == 13
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    run(other, tmp_path, [feature([box(0, 0, 50, 50)])], patient="q")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    fewer = run(slide_path, tmp_path, [feature([box(0, 0, 50, 50)])])
    assert [row.image.name for row in fewer.manifest.rows] == ["s_x0_y0.png", "t_x0_y0.png"]
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {"s_x0_y0.png", "t_x0_y0.png"}
    with raises_reason("MANIFEST_INVALID", "slide t ", "patient q ", " p."):
        run(other, tmp_path, [feature([box(0, 0, 50, 50)])])


def test_slides_of_one_name_keep_their_images(slide_path: Path, tmp_path: Path) -> None:
    for case, seed in (("1", 1), ("2", 2)):
        (tmp_path / case).mkdir()
        write_pyramid(tmp_path / case / "HE.tif", rgb(480, 640, seed), 0.5)
    drawn = [feature([box(0, 0, 50, 50)])]
    run(tmp_path / "1" / "HE.tif", tmp_path, drawn)
    first = (tmp_path / "out" / "images" / "HE_x0_y0.png").read_bytes()
    for _ in range(2):
        report = run(tmp_path / "2" / "HE.tif", tmp_path, drawn, patient="q")
        assert {row.patient for row in report.manifest.rows} == {"p", "q"} and len(report.manifest.rows) == 2
    again = run(tmp_path / "1" / "HE.tif", tmp_path, drawn)
    assert [row.image.name for row in again.manifest.rows][1] == "HE_x0_y0.png"
    assert (tmp_path / "out" / "images" / "HE_x0_y0.png").read_bytes() == first
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 2


def test_a_folder_of_dicom_files_gives_its_whole_name(slide_path: Path, tmp_path: Path) -> None:
    with Slide(slide_path) as slide:
        for uid in ("1.2.840.1", "1.2.840.2"):
            (tmp_path / uid).mkdir()
            slide.path = tmp_path / uid
            drawn = tmp_path / "s.geojson"
            drawn.write_text(json.dumps([feature([box(0, 0, 50, 50)])]))
            report = import_annotations(
                slide, drawn, LABELS, 0.5, tmp_path / "out", patient="p", smallest_px=32
            )
    names = [row.image.name for row in report.manifest.rows]
    assert names == ["1.2.840.1_x0_y0.png", "1.2.840.2_x0_y0.png"]


def test_malformed_features_are_listed_by_their_place(slide_path: Path, tmp_path: Path) -> None:
    good = feature([box(0, 0, 9, 9)])
    named = feature([[[0, 0], [1, "1"], [2, 2]]]) | {"id": "4b1c-9"}
    named["properties"] = {**named["properties"], "name": "left lobe"}
    bad = {
        "has no geometry": 7,
        "is a Circle, which is no geometry": feature([1, 2], kind="Circle"),
        "coordinates that are no list": feature(None),
        "has a corner that is not two numbers": feature([[[0, 0], [1], [2, 2]]]),
        "(Polygon, name left lobe, class tumour, id 4b1c-9) has a corner that is not two numbers": named,
        "finite numbers of a slide's size": feature([[[0, 0], [1, float("nan")], [2, 2]]]),
        "finite numbers": feature([[[0, 0], [-math.inf, 1], [2, 2]]]),
        "numbers of a slide's size": feature([[[0, 0], [10**400, 1], [2, 2]]]),
        "is not two numbers": feature([[[box(0, 0, 9, 9)]]]),  # a level of brackets too many
        "has no class": feature([box(0, 0, 9, 9)], None),
        "unknown class 'stroma'": feature([box(0, 0, 9, 9)], "stroma"),
        "outside the slide of 640 x 480": feature([box(700, 0, 800, 9)]),
    }
    message = refusal(slide_path, tmp_path, [good, *bad.values()])
    for index, part in enumerate(bad, start=1):
        assert any(f"feature {index} " in line and part in line for line in message.splitlines()), part
    assert "feature 0 " not in message and "known are background, tumour" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "3", '{"type": "Topology"}', "[]", '{"type": "FeatureCollection"}'])
def test_what_is_no_geojson_is_refused(slide_path: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(content)
    with Slide(slide_path) as slide, pytest.raises(MaskError) as caught:
        import_annotations(slide, path, LABELS, 0.5, tmp_path / "out", patient="p")
    assert caught.value.reason == "ANNOTATION_INVALID" and "a.geojson" in str(caught.value)


def test_unknown_classes_can_be_left_out(slide_path: Path, tmp_path: Path) -> None:
    features = [
        feature([box(0, 0, 50, 50)]),
        feature([box(0, 0, 9, 9)], "stroma"),
        feature([1, 2], None, "Point"),
    ]
    report = run(slide_path, tmp_path, features, ignore_unknown=True)
    assert report.notes == (
        "features of other classes or of none, which count as not annotated: 1 of 'stroma'",
        "left out, without area: feature 2 (Point)",
    )
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[:50, :50] = 1
    expected[:9, :9] = IGNORE  # said to be something else
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)
    with raises_reason("ANNOTATION_INVALID", "s.geojson", "background, tumour"):
        run(slide_path, tmp_path, features[1:], ignore_unknown=True)


@pytest.mark.parametrize("name", ["Tumour", " tumour "])
def test_a_class_in_other_capitals_is_not_taken_and_the_label_is_named(
    slide_path: Path, tmp_path: Path, name: str
) -> None:
    features = [feature([box(0, 0, 50, 50)]), feature([box(9, 9, 19, 19)], name)]
    assert "(did you mean 'tumour'?)" in refusal(slide_path, tmp_path, features)
    report = run(slide_path, tmp_path, features, ignore_unknown=True)
    assert f"1 of '{name}' (did you mean 'tumour'?)" in report.notes[0]
    assert whole(report, (640, 480))[9, 9] == IGNORE


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_is_read_in_every_encoding_that_starts_with_a_mark(
    slide_path: Path, tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature([box(0, 0, 50, 50)])]), encoding)
    with Slide(slide_path) as slide:
        report = import_annotations(slide, path, LABELS, 0.5, tmp_path / "out", patient="p")
    assert (whole(report, (640, 480))[:50, :50] == 1).all()


def test_detections_without_a_class_say_nothing(slide_path: Path, tmp_path: Path) -> None:
    """QuPath finds cells all over an annotation; one of a class left out is something else all the same."""
    cells = [feature([box(4, 4, 9, 9)], None), feature([box(14, 14, 19, 19)], "immune cell")]
    for cell in cells:
        cell["properties"]["objectType"] = "cell"
    report = run(slide_path, tmp_path, [feature([box(0, 0, 50, 50)]), *cells], ignore_unknown=True)
    assert report.notes[1] == "left out, detections without a class: 1"
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[:50, :50] = 1
    expected[14:19, 14:19] = IGNORE
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)


def test_what_has_no_area_is_left_out_and_named(slide_path: Path, tmp_path: Path) -> None:
    line = feature([[1, 1], [30, 30]], kind="LineString") | {"id": "7f-2"}
    line["properties"] = {**line["properties"], "name": "1.2 mm"}
    empty = [
        line,
        feature([9, 9], kind="Point"),
        feature([[1, 2], [3, 4]], kind="MultiPoint"),
        feature([]),
        feature([[]]),
        feature([], kind="MultiPolygon"),
        feature([[[5, 5], [20, 20], [5, 5]]]),
        feature([[[5, 5], [20, 20], [9, 9], [5, 5]]]),  # there and back on one line
        {"type": "Feature", "geometry": None, "properties": {}},
        {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": []}},
    ]
    good = feature([box(0, 0, 50, 50)])
    report = run(slide_path, tmp_path, [*empty, good])
    (note,) = report.notes
    assert note.startswith(
        "left out, without area: feature 0 (LineString, name 1.2 mm, class tumour, id 7f-2), feature 1"
    )
    assert note.endswith("feature 8, feature 9 (GeometryCollection)")
    assert (whole(report, (640, 480)) == 1).sum() == 2500


def test_parts_that_have_an_area_are_read(slide_path: Path, tmp_path: Path) -> None:
    point = {"type": "Point", "coordinates": [1, 1]}
    polygons = [
        {"type": "Polygon", "coordinates": [box(10, 10, 30, 30), [[12, 12], [13, 13], [12, 12]]]},
        {"type": "MultiPolygon", "coordinates": [[box(40, 10, 50, 20)], [], [[]]]},
    ]
    nested = {"type": "GeometryCollection", "geometries": [point, polygons[1]]}
    collection = {"type": "GeometryCollection", "geometries": [polygons[0], nested]}
    solid = feature([[[*corner, 0.0] for corner in box(60, 10, 70, 20)]])  # (x, y, z), as some tools write
    report = run(slide_path, tmp_path, [{**feature([]), "geometry": collection}, solid])
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[10:30, 10:30] = expected[10:20, 40:50] = expected[10:20, 60:70] = 1
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)


@pytest.mark.parametrize("lower", [80, 84])
def test_outlines_that_cross_themselves_are_as_large_as_what_they_enclose(
    slide_path: Path, tmp_path: Path, lower: int
) -> None:
    """The halves of an eight are wound against each other: their signed areas cancel, all or nearly."""
    eight = feature([[[20, 20], [120, 80], [120, 20], [20, lower], [20, 20]]])
    inside = feature([box(24, 42, 40, 58)], "background")
    for number, order in enumerate(([eight, inside], [inside, eight])):
        (tmp_path / str(number)).mkdir()
        made = whole(run(slide_path, tmp_path / str(number), order), (640, 480))
        assert (made[42:58, 24:40] == 0).all()
        crossing = 100 * (lower - 20) / (lower + 40)  # from the left
        area = (lower - 20) * crossing / 2 + 60 * (100 - crossing) / 2
        assert abs(int((made == 1).sum()) - (area - 16 * 16)) < 60


@given(st.integers(3, 40), st.floats(0.2, 5000), st.integers(0, 99))
def test_areas_of_simple_outlines_are_exact(corners: int, radius: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    distances = radius * rng.uniform(0.5, 1.0, corners)
    ring = np.column_stack([distances * np.cos(angles), distances * np.sin(angles)]) + 77.0
    nearest = np.abs(np.diff(angles, append=angles[0] + 2 * math.pi)).max()
    if nearest < math.pi:  # star-shaped around (77, 77): a fan of triangles
        following = np.roll(angles, -1) - angles
        fan = sum(distances * np.roll(distances, -1) * np.sin(following)) / 2
        assert Annotation(0, None, ((ring,),)).l0_area == pytest.approx(fan, rel=1e-6)


def test_regions_of_ignored_classes_make_no_images(slide_path: Path, tmp_path: Path) -> None:
    features = [feature([box(0, 0, 640, 480)], "Region*"), feature([box(100, 100, 150, 150)])]
    report = run(slide_path, tmp_path, features)
    assert [row.image.name for row in report.manifest.rows] == ["s_x100_y100.png"]


def test_coordinates_can_be_moved(slide_path: Path, tmp_path: Path) -> None:
    report = run(slide_path, tmp_path, [feature([box(-100, 0, -60, 40)])], l0_offset=(160, 20))
    expected = np.full((480, 640), IGNORE, np.uint8)
    expected[20:60, 60:100] = 1
    np.testing.assert_array_equal(whole(report, (640, 480)), expected)


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"classification": {"name": "tumour", "color": [1, 2, 3]}}, "tumour"),
        ({"classification": {"names": ["tumour", "positive"]}}, "tumour: positive"),
        ({"classification": "tumour"}, "tumour"),
        ({"classification": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_class_names(properties: Any, expected: str | None) -> None:
    assert class_name({"properties": properties}) == expected


def test_a_resolution_that_is_none_is_refused(slide_path: Path, tmp_path: Path) -> None:
    with raises_reason("SLIDE_MPP_INVALID", "--mpp"):
        run(slide_path, tmp_path, [feature([box(0, 0, 50, 50)])], mpp=20.0)


def test_a_slide_without_a_resolution_names_the_option_for_it(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tif", rgb(256, 256), 50.0)  # taken for a printer's
    rings = tmp_path / "s.geojson"
    rings.write_text(json.dumps([feature([box(0, 0, 50, 50)])]))
    options = ["--labels", "tumour", "--mpp", "0.5", "--patient", "p", "--out", str(tmp_path / "out")]
    command = ["masks", "import", "geojson", str(tmp_path / "s.tif"), str(rings)]
    done = CliRunner().invoke(app, [*command, *options])
    assert isinstance(done.exception, SlideError)
    assert "per pixel: with --slide-mpp (" in str(done.exception)


def test_sizes_must_fit(slide_path: Path, tmp_path: Path) -> None:
    for wrong in ({"smallest_px": 101}, {"margin_px": -1}, {"smallest_px": 0}):
        with raises_reason("JOB_INVALID", wrong.get("smallest_px", 32), wrong.get("margin_px", 0)):
            run(slide_path, tmp_path, [feature([box(0, 0, 50, 50)])], **wrong)


def test_a_real_slide(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "wsi" / "CMU-1-Small-Region.svs"
    report = run(
        path, tmp_path, [feature([box(100, 200, 900, 1000)])], mpp=1.0, region_px=2048, smallest_px=256
    )
    (row,) = report.manifest.rows
    image, mask = Image.open(row.image), np.asarray(Image.open(row.mask))
    assert image.size == (400, 400) and (mask == 1).all()
