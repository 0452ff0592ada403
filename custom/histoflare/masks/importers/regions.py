"""Which parts of a slide become images: around annotations, of a size that can be trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

CELL_PX = 32
"""Boxes that lie in one cell of this side, or in neighbouring ones, become one region."""

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the last two just outside."""


def plan_regions(
    boxes: Sequence[tuple[float, float, float, float]],
    size_px: tuple[int, int],
    *,
    margin_px: int,
    smallest_px: int,
    region_px: int,
) -> list[Box]:
    """Return regions that hold all ``boxes`` and do not overlap, from top to bottom.

    A box gets a margin and grows to ``smallest_px`` a side where the image has room; boxes that touch become
    one; what is larger than ``region_px`` is cut into equal parts.

    Args:
        boxes: (left, top, right, bottom) of the annotations, in pixels; at least partly in the image.
        size_px: (width, height) of the image.
        margin_px: Added on every side.
        smallest_px: Least side, at most half of ``region_px``.
        region_px: Largest side.
    """
    grown = np.array([_grow(box, size_px, margin_px, smallest_px) for box in boxes], np.int64).reshape(-1, 4)
    merged = _merge(grown, size_px)
    parts = [part for box in merged for part in _cut(box, region_px)]
    return sorted(parts, key=lambda box: (box[1], box[0]))


def _grow(
    box: tuple[float, float, float, float], size_px: tuple[int, int], margin_px: int, smallest_px: int
) -> Box:
    sides = []
    for low, high, side in ((box[0], box[2], size_px[0]), (box[1], box[3], size_px[1])):
        start = max(0, math.floor(low) - margin_px)
        stop = min(side, math.ceil(high) + margin_px)
        missing = max(0, smallest_px - (stop - start))
        start = max(0, min(start - missing // 2, side - smallest_px))
        sides.append((start, min(side, max(stop, start + smallest_px))))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _merge(boxes: NDArray[np.int64], size_px: tuple[int, int]) -> list[Box]:
    """Return boxes around groups of boxes that touch, until none does."""
    shape = tuple(math.ceil(side / CELL_PX) for side in reversed(size_px))
    while True:
        taken = np.zeros(shape, bool)
        cells = np.column_stack([boxes[:, :2] // CELL_PX, -(-boxes[:, 2:] // CELL_PX)])
        for left, top, right, bottom in cells:
            taken[top:bottom, left:right] = True
        groups, count = ndimage.label(taken, structure=np.ones((3, 3)))
        if count == len(boxes):
            return [(int(box[0]), int(box[1]), int(box[2]), int(box[3])) for box in boxes]
        group = groups[cells[:, 1], cells[:, 0]] - 1
        merged = np.empty((count, 4), np.int64)
        merged[:, :2], merged[:, 2:] = np.iinfo(np.int64).max, -1
        np.minimum.at(merged[:, :2], group, boxes[:, :2])
        np.maximum.at(merged[:, 2:], group, boxes[:, 2:])
        boxes = merged


def _cut(box: Box, region_px: int) -> list[Box]:
    left, top, right, bottom = box
    columns, rows = (_edges(low, high, region_px) for low, high in ((left, right), (top, bottom)))
    return [
        (x, y, x_end, y_end)
        for y, y_end in itertools.pairwise(rows)
        for x, x_end in itertools.pairwise(columns)
    ]


def _edges(low: int, high: int, region_px: int) -> list[int]:
    parts = math.ceil((high - low) / region_px)
    return [low + (high - low) * part // parts for part in range(parts + 1)]
