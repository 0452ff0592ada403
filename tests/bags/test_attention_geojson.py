"""Tiles of attention, as QuPath reads them, against the patches they came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from histoflare.bags.attention_geojson import CLASSES, write_attention
from histoflare.slides.planes import Plane


def test_a_tile_per_patch_with_its_attention(tmp_path: Path) -> None:
    l0_coords = np.array([[100, 200], [200, 200], [300, 200], [700, 900]])
    relative = np.array([0.1, 1.0, 9.0, 1.0])
    plane = Plane("bounds", (150, 150), (200, 400))
    write_attention(tmp_path / "a.geojson", relative, 4.0, l0_coords, 100, plane)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert (content["plane"], content["l0_xy"]) == ("bounds", [150, 150])
    boxes = [np.array(each["geometry"]["coordinates"][0]) for each in content["features"]]
    # in the plane; the first is cut by its left border, the third by its right one, the last lies outside
    assert [(*box.min(axis=0), *box.max(axis=0)) for box in boxes] == [
        (0, 50, 50, 150),
        (50, 50, 150, 150),
        (150, 50, 200, 150),
    ]
    assert all((box[0] == box[-1]).all() and len(box) == 5 for box in boxes)
    told = [each["properties"] for each in content["features"]]
    assert {each["objectType"] for each in told} == {"tile"}
    assert [each["measurements"] for each in told] == [{"attention": value} for value in relative[:3]]
    # equal steps of the logarithm from 1/4 to 4: 4^(-3/5) = 0.435, 4^(-1/5) = 0.758, 4^(1/5) = 1.32 …
    assert [each["classification"]["name"] for each in told] == [
        "attention below 0.435",
        "attention 0.758 to 1.32",
        "attention above 2.3",
    ]
    colours = [each["classification"]["color"] for each in told]
    assert len({tuple(colour) for colour in colours}) == 3 and CLASSES == 5
    assert all(type(channel) is int for colour in colours for channel in colour)


def test_attention_that_is_no_number_is_refused(tmp_path: Path) -> None:
    plane = Plane("level0", (0, 0), (400, 400))
    with pytest.raises(ValueError):
        write_attention(tmp_path / "a.geojson", np.array([np.nan]), 4.0, np.array([[0, 0]]), 100, plane)
    assert not list(tmp_path.iterdir())
