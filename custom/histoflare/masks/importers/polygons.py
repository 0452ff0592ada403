"""Polygons as QuPath writes them (GeoJSON, RFC 7946), and the pixels they hold.

Coordinates are level-0 pixels of the slide; pixel (0, 0) spans 0 to 1 and has its middle at 1/2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError

Ring = NDArray[np.float64]
"""Corners (n, 2) as (x, y), closed or not."""
Polygon = tuple[Ring, ...]
"""An outline, and the outlines of its holes."""


@dataclass(frozen=True)
class Annotation:
    """One feature of a file: its place there (from 0), its class's name, and its polygons."""

    index: int
    name: str | None
    polygons: tuple[Polygon, ...]

    @property
    def l0_box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        corners = np.concatenate([polygon[0] for polygon in self.polygons])
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    @property
    def l0_area(self) -> float:
        """Area in level-0 pixels, holes taken off."""
        return sum(
            abs(_signed_area(rings[0])) - sum(abs(_signed_area(hole)) for hole in rings[1:])
            for rings in self.polygons
        )


def read_features(path: Path) -> list[Any]:
    """Return the features of a GeoJSON file: a FeatureCollection, a list of features, or one.

    Raises:
        MaskError: It cannot be read, or is none of these (``ANNOTATION_INVALID``).
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise _invalid(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{path}: not JSON ({error}). In QuPath: File, Export objects as GeoJSON.") from error
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list):
        raise _invalid(f"{path}: neither a FeatureCollection nor a list of features")
    return content


def read_annotation(index: int, feature: Any) -> Annotation:
    """Return the feature at place ``index`` of its file.

    Raises:
        MaskError: It has no area, or its corners are not finite numbers (``ANNOTATION_INVALID``).
    """
    geometry = feature.get("geometry") if isinstance(feature, dict) else None
    if not isinstance(geometry, dict):
        raise _invalid("has no geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        raise _invalid(f"is a {kind}, which has no area; Polygon and MultiPolygon are read")
    parts = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(parts, list) or not parts:
        raise _invalid("has no coordinates")
    return Annotation(index, class_name(feature), tuple(_polygon(part) for part in parts))


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


def _polygon(rings: Any) -> Polygon:
    if not isinstance(rings, list) or not rings:
        raise _invalid("has a polygon without an outline")
    return tuple(_ring(ring) for ring in rings)


def _ring(corners: Any) -> Ring:
    try:
        ring = np.array([[float(corner[0]), float(corner[1])] for corner in corners])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise _invalid("has a corner that is not two numbers") from error
    if not np.isfinite(ring).all():
        raise _invalid("has a corner that is not two finite numbers")
    if len(np.unique(ring.reshape(-1, 2), axis=0)) < 3:
        raise _invalid("has an outline of fewer than three corners")
    return ring


def _signed_area(ring: Ring) -> float:
    x, y = (ring - ring[0]).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _invalid(message: str) -> MaskError:
    return MaskError(message, reason="ANNOTATION_INVALID")
