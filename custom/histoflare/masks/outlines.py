"""Outlines of the classes in a mask as GeoJSON, for QuPath, in the plane of the slide in which the mask lies.

The outlines follow the edges of the pixels: filling them gives the mask back exactly. They are valid simple
features: rings do not cross or touch themselves, holes lie inside and touch their polygon in single points at
most. Pixels that touch at a corner only belong to different polygons.

The mask is worked off in blocks, and memory holds one block and its outlines. A region that reaches over a
block's border is cut there: its parts are polygons of their own, with a common edge.

How a block is traced: at a corner of an outline a horizontal and a vertical edge meet. Along a row of pixel
corners outlines' corners come in pairs, each the two ends of an edge, and so they do along a column; going
from end to end, by turns along the row and along the column, gives the rings. Where two pixels of the class
touch at a corner only, two corners lie on top of each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histoflare.slides.mask_pyramid import MaskPyramid
from histoflare.storage import atomic_path

BLOCK_PX = 2048

Ring = list[tuple[int, int]]
"""Corners (x, y) of pixels, each once."""


def write_outlines(
    path: Path,
    mask: MaskPyramid,
    labels: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    *,
    l0_per_px: float,
    without: Sequence[str] = (),
    block_px: int = BLOCK_PX,
) -> int:
    """Write a feature for each region of each class; return how many there are.

    A feature's geometry is a polygon in level-0 pixels, counted in the mask's plane, which the collection
    names; its ``classification`` is the class.

    Args:
        path: GeoJSON file to write, whole or not at all.
        mask: Of class indices; other values belong to no class.
        labels: Names of the classes 0, 1, …
        colours: Of the classes.
        l0_per_px: Level-0 pixels that a pixel of the mask spans along a side.
        without: Classes that get no outlines.
        block_px: Side of the blocks in pixels of the mask.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    wanted = [index for index, label in enumerate(labels) if label not in without]
    width, height = mask.sizes_px[0]
    count = 0
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        said = json.dumps({"type": "FeatureCollection", **mask.plane.to_json()}, separators=(",", ":"))
        file.write(said[:-1] + ',"features":[')
        for y in range(0, height, block_px):
            for x in range(0, width, block_px):
                block = mask.read(0, x, y, min(block_px, width - x), min(block_px, height - y))
                present = np.bincount(block.ravel(), minlength=256)
                for index in wanted:
                    if not present[index]:
                        continue
                    for polygon in trace_polygons(block == index):
                        rings = [_to_l0(ring, (x, y), l0_per_px, mask.plane.l0_size_px) for ring in polygon]
                        feature = _feature(rings, labels[index], colours[index % len(colours)])
                        file.write((",\n" if count else "\n") + json.dumps(feature, separators=(",", ":")))
                        count += 1
        file.write("\n]}\n")
    return count


def trace_polygons(member: NDArray[np.bool_]) -> Iterator[list[Ring]]:
    """Yield a polygon for each 4-connected region of ``member`` (h, w): its outline, then its holes.

    Corners are (x, y) of pixel corners, (0, 0) the upper left corner of the first pixel.
    """
    regions, _ = ndimage.label(member)
    outlines: dict[int, list[Ring]] = {}
    holes: dict[int, list[Ring]] = {}
    for ring in _rings(member):
        x, y = min(ring, key=lambda corner: (corner[1], corner[0]))
        # to the lower right of a ring's first corner lies what it encloses: a region, or a hole in one
        if y < member.shape[0] and x < member.shape[1] and member[y, x]:
            outlines.setdefault(int(regions[y, x]), []).append(ring)
        else:
            holes.setdefault(int(regions[y - 1, x]), []).append(ring)
    for region, (outline,) in outlines.items():
        yield [outline, *holes.get(region, [])]


def _rings(member: NDArray[np.bool_]) -> Iterator[Ring]:
    """Yield the outlines of ``member`` as simple rings."""
    x, y, along_row, along_column = _corners(member)
    xs, ys, rows, columns = x.tolist(), y.tolist(), along_row.tolist(), along_column.tolist()
    seen = bytearray(len(xs))
    for first in range(len(xs)):
        if seen[first]:
            continue
        path: Ring = []
        place: dict[tuple[int, int], int] = {}
        at, horizontal = first, True
        while not seen[at]:
            seen[at] = 1
            corner = (xs[at], ys[at])
            if corner in place:  # back where it was: what lies between is a ring of its own
                start = place[corner]
                for left in path[start + 1 :]:
                    del place[left]
                yield _straightened(path[start:])
                del path[start + 1 :]
            else:
                place[corner] = len(path)
                path.append(corner)
            at = rows[at] if horizontal else columns[at]
            horizontal = not horizontal
        yield _straightened(path)


def _straightened(ring: Ring) -> Ring:
    """Return the ring without corners that lie on a straight line between their neighbours."""
    return [
        corner
        for before, corner, after in zip([ring[-1], *ring[:-1]], ring, [*ring[1:], ring[0]], strict=True)
        if not (before[0] == corner[0] == after[0] or before[1] == corner[1] == after[1])
    ]


def _corners(
    member: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the outlines' corners, row by row: x, y, and which corner is the other end of each one's edge.

    The third array is for the edges along rows, the fourth for those along columns.
    """
    padded = np.pad(member, 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    falling = upper_left & lower_right & ~upper_right & ~lower_left  # two pixels that touch at a corner only
    rising = upper_right & lower_left & ~upper_left & ~lower_right
    odd = upper_left ^ upper_right ^ lower_left ^ lower_right  # one or three of four
    y, x = np.nonzero(odd | falling | rising)
    doubled = (falling | rising)[y, x]
    times = 1 + doubled
    swapped = np.repeat(rising[y, x], times)
    x, y = np.repeat(x, times), np.repeat(y, times)
    second = np.zeros(len(x), np.int64)  # of two in one place: the one whose edge goes to the right
    second[1:] = (x[1:] == x[:-1]) & (y[1:] == y[:-1])
    along_row = np.arange(len(x)) ^ 1
    # in a column the first of two ends the edge from above: the left one, or where pixels rise the right one
    order = np.lexsort((second ^ swapped, y, x))
    along_column = np.empty(len(x), np.int64)
    along_column[order] = order[np.arange(len(x)) ^ 1]
    return x, y, along_row, along_column


def _to_l0(
    ring: Ring, at: tuple[int, int], l0_per_px: float, l0_size_px: tuple[int, int]
) -> list[list[float]]:
    """Return a closed ring in level-0 pixels of the plane, to hundredths, for a block at ``at`` in the mask.

    The mask's last pixels may reach beyond the plane.
    """
    corners = [
        [min(round((corner[axis] + at[axis]) * l0_per_px, 2), float(l0_size_px[axis])) for axis in (0, 1)]
        for corner in ring
    ]
    return [*corners, corners[0]]


def _feature(rings: list[list[list[float]]], label: str, colour: tuple[int, int, int]) -> dict[str, object]:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": label, "color": list(colour)},
        },
    }
