"""Outlines: filled again by other means, they are the mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from histoflare.masks.outlines import Ring, trace_polygons, write_outlines
from histoflare.slides.mask_pyramid import MaskPyramid, write_mask_pyramid
from histoflare.slides.planes import Plane

MASKS = npst.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))
COLOURS = ((0, 90, 181), (220, 50, 32), (0, 135, 90))


def fill(rings: Sequence[Sequence[Sequence[float]]], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return how often each pixel's middle lies inside, even-odd: every vertical edge turns what is right."""
    inside = np.zeros(shape, np.int64)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
            assert (x0 == x1) != (y0 == y1)
            if x0 == x1:
                inside[int(min(y0, y1)) : int(max(y0, y1)), int(x0) :] ^= 1
    return inside


def area(ring: Ring) -> float:
    """Return the signed area (shoelace)."""
    pairs = zip(ring, [*ring[1:], ring[0]], strict=True)
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs) / 2


@settings(max_examples=300)
@given(MASKS)
def test_filled_again_it_is_the_mask(member: NDArray[np.bool_]) -> None:
    total = np.zeros(member.shape, np.int64)
    polygons = list(trace_polygons(member))
    for outline, *holes in polygons:
        total += fill([outline, *holes], member.shape)
        assert fill([outline], member.shape).sum() == abs(area(outline))
        for hole in holes:
            assert (fill([hole], member.shape) <= fill([outline], member.shape)).all()
    assert np.array_equal(total, member.astype(np.int64))
    assert len(polygons) == ndimage.label(member)[1]  # one for each region


@settings(max_examples=300)
@given(MASKS)
def test_rings_are_simple(member: NDArray[np.bool_]) -> None:
    for polygon in trace_polygons(member):
        for ring in polygon:
            assert len(set(ring)) == len(ring) >= 4  # none touches itself
            for before, corner, after in zip([ring[-1], *ring[:-1]], ring, [*ring[1:], ring[0]], strict=True):
                assert len({before[0], corner[0], after[0]}) == 2  # a turn at each corner
                assert len({before[1], corner[1], after[1]}) == 2


def test_a_ring_that_closes_at_a_corner() -> None:
    """The gap in the middle meets the outside at a corner only: a hole that touches the outline there."""
    member = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
    ((outline, *holes),) = trace_polygons(member)
    assert abs(area(outline)) == 8
    assert [abs(area(hole)) for hole in holes] == [1]


def test_pixels_that_touch_at_a_corner_are_two() -> None:
    assert len(list(trace_polygons(np.eye(2, dtype=bool)))) == 2
    assert len(list(trace_polygons(np.eye(2, dtype=bool)[::-1]))) == 2


def write_mask(path: Path, values: NDArray[np.uint8], l0_size_px: tuple[int, int]) -> None:
    write_mask_pyramid(
        path,
        lambda x, y, w, h: values[y : y + h, x : x + w],
        (values.shape[1], values.shape[0]),
        2.0,
        plane=Plane("level0", (0, 0), l0_size_px),
        scratch=path.parent,
    )


def outlines_of(
    tmp_path: Path, values: NDArray[np.uint8], l0_size_px: tuple[int, int] | None = None, **options: Any
) -> dict[str, Any]:
    height, width = values.shape
    write_mask(tmp_path / "m.tiff", values, l0_size_px or (width, height))
    options = {"l0_per_px": 1.0, **options}
    with MaskPyramid(tmp_path / "m.tiff") as mask:
        count = write_outlines(
            tmp_path / "m.geojson", mask, ("glass", "tumour", "stroma"), COLOURS, **options
        )
    content: dict[str, Any] = json.loads((tmp_path / "m.geojson").read_text())
    assert len(content["features"]) == count
    return content


def blobs(width: int, height: int) -> NDArray[np.uint8]:
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(height, width)), 4)
    values = np.digitize(noise, np.quantile(noise, [0.4, 0.7])).astype(np.uint8)
    values[: height // 4] = 255
    return values


@pytest.mark.parametrize("block_px", [50, 64, 2048])
def test_a_mask_in_blocks(tmp_path: Path, block_px: int) -> None:
    values = blobs(170, 130)
    content = outlines_of(tmp_path, values, without=("glass",), block_px=block_px)
    again = np.full(values.shape, 255, np.uint8)
    for feature in content["features"]:
        rings = [ring[:-1] for ring in feature["geometry"]["coordinates"]]
        name = feature["properties"]["classification"]["name"]
        again[fill(rings, values.shape) == 1] = ("glass", "tumour", "stroma").index(name)
    assert np.array_equal(again[values != 0], values[values != 0])
    assert (again[values == 0] == 255).all()  # left out
    assert {feature["properties"]["classification"]["name"] for feature in content["features"]} == {
        "tumour",
        "stroma",
    }


def test_level_0_coordinates_colours_and_the_slides_border(tmp_path: Path) -> None:
    values = np.zeros((4, 5), np.uint8)
    values[1:, 2:] = 1
    content = outlines_of(tmp_path, values, l0_per_px=4.464, l0_size_px=(22, 17), without=("glass",))
    (feature,) = content["features"]
    assert content["type"] == "FeatureCollection"
    assert feature["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "tumour", "color": [220, 50, 32]},
    }
    (ring,) = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert {tuple(corner) for corner in ring} == {(8.93, 4.46), (22.0, 4.46), (22.0, 17.0), (8.93, 17.0)}


def test_pillow_fills_the_same(tmp_path: Path) -> None:
    """Pillow's own filling, at four times the size so that its edges (which it includes) are told apart."""
    values = blobs(60, 40)
    content = outlines_of(tmp_path, values, l0_per_px=4.0, l0_size_px=(240, 160))
    for index, name in enumerate(("glass", "tumour", "stroma")):
        canvas = Image.new("1", (240, 160))
        draw = ImageDraw.Draw(canvas)
        for feature in content["features"]:
            if feature["properties"]["classification"]["name"] == name:
                outline, *holes = feature["geometry"]["coordinates"]
                layer = Image.new("1", (240, 160))
                ImageDraw.Draw(layer).polygon([tuple(corner) for corner in outline], fill=1)
                for hole in holes:
                    ImageDraw.Draw(layer).polygon([tuple(corner) for corner in hole], fill=0)
                draw.bitmap((0, 0), layer, fill=1)
        middles = np.asarray(canvas)[2::4, 2::4]
        assert np.array_equal(middles, values == index)
