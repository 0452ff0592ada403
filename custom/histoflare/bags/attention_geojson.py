"""How much a model attends to each patch of a slide as GeoJSON, for QuPath 0.4 and later.

Each patch is a tile, the kind of detection whose measurements QuPath shows as a map in colour (Measure ▸
Show measurement maps). Its classification is the range in which its attention lies, in a colour of the heat
map, so that it is coloured from the start and the list of classes is the legend.

QuPath reads ``measurements`` as an object from 0.4 on (``QuPathTypeAdapters.java``), as which it writes them.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.bags.heatmap import attention_levels
from histoflare.slides.overlay import attention_colours
from histoflare.slides.planes import Plane
from histoflare.storage import atomic_path

CLASSES = 5
"""Ranges of attention that are told apart by a class; an odd number, so that the average is in the middle."""

MEASUREMENT = "attention"


def write_attention(
    path: Path,
    relative: NDArray[np.float64],
    limit: float,
    l0_coords: NDArray[np.int64],
    l0_patch_px: int,
    plane: Plane,
) -> None:
    """Write a tile for each patch that touches the plane, in level-0 pixels counted from its corner.

    Args:
        path: GeoJSON file to write, whole or not at all.
        relative: Attention to the patches (n,), 1 being the average patch of the bag; the measurement.
        limit: Where the colours end: at 1 / limit and limit times the average.
        l0_coords: Corners (top left) of the patches (n, 2) in level-0 pixels.
        l0_patch_px: Side of a patch in level-0 pixels.
        plane: Of the slide; the file says which. Tiles are cut at its border.

    Raises:
        ValueError: The attention to a patch is not finite.
        OSError: The file cannot be written; nothing is left behind.
    """
    if not np.isfinite(relative).all():
        raise ValueError("the attention to a patch is not a finite number")
    levels = attention_levels(relative, limit)
    classes = np.minimum((levels * CLASSES).astype(int), CLASSES - 1)
    colours = attention_colours((np.arange(CLASSES) + 0.5) / CLASSES)
    names = _names(limit)
    near = np.clip(l0_coords - plane.l0_xy, 0, plane.l0_size_px)
    far = np.clip(l0_coords + l0_patch_px - plane.l0_xy, 0, plane.l0_size_px)
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        said = json.dumps({"type": "FeatureCollection", **plane.to_json()}, separators=(",", ":"))
        file.write(said[:-1] + ',"features":[')
        between = "\n"
        for (x0, y0), (x1, y1), attention, index in zip(
            near.tolist(), far.tolist(), relative.tolist(), classes.tolist(), strict=True
        ):
            if x0 == x1 or y0 == y1:
                continue
            feature = {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]],
                },
                "properties": {
                    "objectType": "tile",
                    "classification": {"name": names[index], "color": colours[index].tolist()},
                    "measurements": {MEASUREMENT: attention},
                },
            }
            file.write(between + json.dumps(feature, separators=(",", ":"), allow_nan=False))
            between = ",\n"
        file.write("\n]}\n")


def _names(limit: float) -> list[str]:
    """Return the classes' names, from least to most attention; QuPath splits them at colons."""
    inner = [f"{limit ** (2 * each / CLASSES - 1):.3g}" for each in range(1, CLASSES)]
    between = [f"attention {low} to {high}" for low, high in pairwise(inner)]
    return [f"attention below {inner[0]}", *between, f"attention above {inner[-1]}"]
