"""Polygons as QuPath writes them (GeoJSON, RFC 7946), and the pixels they hold.

Coordinates are level-0 pixels, counted from the corner of a plane of the slide (``slides.planes``); pixel
(0, 0) spans 0 to 1 and has its middle at 1/2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.slides.names import decode_text

Ring = NDArray[np.float64]
"""Corners (n, 2) as (x, y), closed or not."""
Polygon = tuple[Ring, ...]
"""An outline, and the outlines of its holes."""

LARGEST_L0 = 1e7
"""No slide has a pixel this far from its corner."""

AREA_PX = 64
"""Longer side of the raster on which an area is counted."""
SAME_AREA = 0.1

NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


@dataclass(frozen=True)
class Annotation:
    """One feature of a file: its place there (from 0), its class's name, and its polygons."""

    index: int
    name: str | None
    polygons: tuple[Polygon, ...]

    @cached_property
    def l0_box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        corners = np.concatenate([polygon[0] for polygon in self.polygons])
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    @cached_property
    def l0_area(self) -> float:
        """Area in level-0 pixels, by the even-odd rule as :func:`fill` has it.

        The corners give it exactly (Gauss), unless an outline crosses itself: its parts would cancel, so it
        is counted on a raster.
        """
        exact = sum(
            abs(_signed_area(rings[0])) - sum(abs(_signed_area(hole)) for hole in rings[1:])
            for rings in self.polygons
        )
        left, top, right, bottom = self.l0_box
        l0_per_px = max(right - left, bottom - top) / AREA_PX
        moved = [tuple((ring - (left, top)) / l0_per_px for ring in rings) for rings in self.polygons]
        counted = float(fill(moved, (AREA_PX, AREA_PX)).sum()) * l0_per_px**2
        return exact if abs(counted - exact) <= SAME_AREA * max(counted, exact) else counted


def read_features(path: Path) -> tuple[list[Any], Any]:
    """Return the features of a GeoJSON file, and which plane it says they are in (None: it says nothing).

    It is a FeatureCollection, a list of features, or one feature.

    Raises:
        MaskError: It cannot be read, or is none of these (``ANNOTATION_INVALID``).
    """
    try:
        content = json.loads(decode_text(path.read_bytes()))
    except OSError as error:
        raise _invalid(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{path}: not JSON ({error}). In QuPath: File, Export objects as GeoJSON.") from error
    plane = None
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        plane, content = content.get("plane"), content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list):
        raise _invalid(f"{path}: neither a FeatureCollection nor a list of features")
    return content, plane


def describe(index: int, feature: Any) -> str:
    """Return how a message names a feature: its place in the file, and what QuPath shows of it."""
    if not isinstance(feature, dict):
        return f"feature {index}"
    geometry, properties = (
        each if isinstance(each := feature.get(key), dict) else {} for key in ("geometry", "properties")
    )
    said = [
        f"{what}{value}"
        for what, value in (
            ("", geometry.get("type")),
            ("name ", properties.get("name")),
            ("class ", class_name(feature)),
            ("id ", feature.get("id")),
        )
        if isinstance(value, str) and value
    ]
    return f"feature {index}" + (f" ({', '.join(said)})" if said else "")


def read_annotation(index: int, feature: Any) -> Annotation | None:
    """Return the feature at place ``index`` of its file; None if it has no area (line, point, empty outline).

    Of a GeometryCollection or a MultiPolygon the parts that have an area are taken; of a corner x and y.

    Raises:
        MaskError: It is no geometry, or its corners are not finite numbers (``ANNOTATION_INVALID``).
    """
    geometry = feature.get("geometry") if isinstance(feature, dict) else None
    if geometry is None and isinstance(feature, dict) and feature.get("type") == "Feature":
        return None  # RFC 7946: a feature without a place
    polygons = tuple(rings for part in _parts(geometry) if (rings := _polygon(part)))
    return Annotation(index, class_name(feature), polygons) if polygons else None


def class_name(feature: Any) -> str | None:
    """Return the name of the class that QuPath gave a feature, None if it gave none."""
    properties = feature.get("properties") if isinstance(feature, dict) else None
    classification = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(classification, str):
        return classification
    if not isinstance(classification, dict):
        return None
    names = classification.get("names")
    if isinstance(classification.get("name"), str):
        return str(classification["name"])
    return ": ".join(map(str, names)) if isinstance(names, list) and names else None


def fill(polygons: Sequence[Polygon], size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Return bool (h, w): which pixels have their middle inside one of ``polygons``.

    Inside a polygon is whatever its rings enclose an odd number of times, so holes are outside. A middle on
    an outline belongs to the polygon on its right or below it, so that neighbours share no pixel.

    Args:
        polygons: In pixels of the result.
        size_px: (width, height) of the result.
    """
    width, height = size_px
    filled = np.zeros((height, width), bool)
    for polygon in polygons:
        crossings = [_crossings(ring, width, height) for ring in polygon]
        rows = np.concatenate([each for each, _ in crossings])
        columns = np.concatenate([each for _, each in crossings])
        if not rows.size:
            continue
        top, left, right = rows.min(), columns.min(), columns.max()
        # per row: an edge that passes left of a pixel's middle turns inside and outside over from there on
        turns = np.zeros((rows.max() + 1 - top, right + 1 - left), np.uint8)
        np.bitwise_xor.at(turns, (rows - top, columns - left), 1)
        inside = np.bitwise_xor.accumulate(turns, axis=1)[:, :-1]  # from the last edge on, all is outside
        filled[top : top + len(inside), left:right] |= inside.astype(bool)
    return filled


def _crossings(ring: Ring, width: int, height: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (row, first column right of it) of every place where an edge crosses the middle of a row."""
    start, end = ring, np.roll(ring, -1, axis=0)
    upper, lower = np.where((start[:, 1] <= end[:, 1])[:, None], (start, end), (end, start))
    first = np.clip(np.ceil(upper[:, 1] - 0.5), 0, height).astype(np.int64)
    stop = np.clip(np.ceil(lower[:, 1] - 0.5), 0, height).astype(np.int64)
    counts = np.maximum(stop - first, 0)  # rows with upper <= middle < lower
    edge = np.repeat(np.arange(len(ring)), counts)
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    run, rise = (lower - upper)[edge].T
    x = upper[edge, 0] + (rows + 0.5 - upper[edge, 1]) * run / rise
    return rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)


def _parts(geometry: Any) -> Iterator[Any]:
    """Yield the coordinates of each polygon in a geometry."""
    if not isinstance(geometry, dict):
        raise _invalid("has no geometry")
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for each in _list(geometry.get("geometries")):
            yield from _parts(each)
    elif kind == "Polygon":
        yield geometry.get("coordinates")
    elif kind == "MultiPolygon":
        yield from _list(geometry.get("coordinates"))
    elif kind not in NO_AREA:
        raise _invalid(f"is a {kind}, which is no geometry of GeoJSON")


def _polygon(rings: Any) -> Polygon:
    """Return a polygon's outline and its holes, those that have an area; nothing if the outline has none."""
    outline, *holes = [_ring(ring) for ring in _list(rings)] or [None]
    return () if outline is None else (outline, *(hole for hole in holes if hole is not None))


def _ring(corners: Any) -> Ring | None:
    """Return an outline; None if it encloses nothing."""
    try:
        pairs = [(corner[0], corner[1]) for corner in _list(corners)]
    except (TypeError, IndexError, KeyError) as error:
        raise _invalid("has a corner that is not two numbers") from error
    if not all(type(number) in (int, float) for pair in pairs for number in pair):
        raise _invalid("has a corner that is not two numbers")
    # written so that NaN, which is JSON to QuPath and Python, is refused too
    if not all(-LARGEST_L0 < number < LARGEST_L0 for pair in pairs for number in pair):
        raise _invalid("has a corner that is not two finite numbers of a slide's size")
    ring = np.array(pairs, np.float64).reshape(-1, 2)
    if len(ring) < 3:
        return None
    across = ring - ring[0]
    longest = across[np.abs(across).sum(axis=1).argmax()]
    # all corners on one line through the first: the cross products with it are 0
    return ring if np.any(across[:, 0] * longest[1] != across[:, 1] * longest[0]) else None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _invalid("has coordinates that are no list")
    return value


def _signed_area(ring: Ring) -> float:
    x, y = (ring - ring[0]).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _invalid(message: str) -> MaskError:
    return MaskError(message, reason="ANNOTATION_INVALID")
