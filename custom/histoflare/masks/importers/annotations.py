"""QuPath's features as annotations of a job's classes, in pixels of a slide's level 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from histoflare.errors import HistoflareError, JobError, MaskError
from histoflare.masks.importers import refuse
from histoflare.masks.importers.polygons import (
    Annotation,
    class_name,
    describe,
    read_annotation,
    read_features,
)
from histoflare.masks.windows import IGNORE
from histoflare.slides.cohort import LISTED_PROBLEMS
from histoflare.slides.planes import PLANE_NAMES, Plane, PlaneName, plane_of
from histoflare.slides.resolution import SlideInfo

Valued = tuple[Annotation, int]
"""An annotation and its class's index, or :data:`IGNORE`."""

DETECTIONS = ("detection", "cell", "tile")
"""QuPath's objects that a program found; without a class they say nothing of what they cover."""


@dataclass(frozen=True)
class FoundAnnotations:
    """Annotations in pixels of level 0, from the largest to the smallest, and what to know of the file."""

    annotations: tuple[Valued, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Origin:
    """Where a file's (0, 0) lies on level 0, what to call it, and which plane to try if nothing fits."""

    l0_xy: tuple[float, float]
    name: str
    other: PlaneName | None = None


def read_annotations(
    geojson: Path,
    labels: Sequence[str],
    info: SlideInfo,
    *,
    ignore_unknown: bool = False,
    plane: PlaneName | None = None,
    l0_offset: tuple[float, float] | None = None,
) -> FoundAnnotations:
    """Return the annotations of a GeoJSON file.

    Args:
        geojson: QuPath's export.
        labels: Class names.
        info: Of the slide.
        ignore_unknown: Count features of other classes or of none as not annotated, instead of refusing them.
        plane: Where coordinates are counted from; None is what the file says, or else QuPath's: ``bounds``.
        l0_offset: (x, y) added to coordinates to make them pixels of level 0; instead of ``plane``.

    Raises:
        MaskError: A feature is malformed, of an unknown class or outside what was scanned
            (``ANNOTATION_INVALID``); every such feature is listed by its place in the file, from 0, and what
            QuPath shows of it.
        JobError: The file says that it counts from another plane than the one asked for.
    """
    features, said = read_features(geojson)
    origin = _origin(geojson, info, plane, said, l0_offset)
    found: list[Valued] = []
    problems, without_area = [], []
    not_annotated: Counter[str] = Counter()
    detections = 0
    for index, feature in enumerate(features):
        name = class_name(feature)
        known = name is not None and (name in labels or name.endswith("*"))
        try:
            annotation = read_annotation(index, feature)
            if annotation is None:
                without_area.append(describe(index, feature))
                continue
            if not known and not ignore_unknown:
                raise MaskError(
                    ("has no class" if name is None else f"is of the unknown class '{name}'")
                    + f"; known are {', '.join(labels)}{_near(name, labels)} (--ignore-unknown counts it as "
                    "not annotated)"
                )
            if name is None and _is_detection(feature):
                detections += 1
                continue
            annotation = _shift(annotation, origin.l0_xy)
            value = labels.index(name) if name in labels else IGNORE
            if value != IGNORE:
                _check_scanned(annotation, info, origin)
        except HistoflareError as error:
            problems.append(f"{describe(index, feature)} {error}")
            continue
        if not known:
            not_annotated["no class" if name is None else f"'{name}'{_near(name, labels)}"] += 1
        found.append((annotation, value))
    if not problems and all(value == IGNORE for _, value in found):
        problems.append("there is no annotation of one of the classes in it: " + ", ".join(labels))
    refuse(geojson, problems, "ANNOTATION_INVALID")
    ordered = sorted(found, key=lambda each: (-each[0].l0_area, each[0].index))
    notes = _notes(origin, not_annotated, detections, without_area)
    return FoundAnnotations(tuple(ordered), notes)


def _origin(
    geojson: Path,
    info: SlideInfo,
    asked: PlaneName | None,
    said: object,
    l0_offset: tuple[float, float] | None,
) -> _Origin:
    """Return the origin that is asked for, or said in the file; QuPath's if neither is."""
    if l0_offset is not None:
        return _Origin(l0_offset, "--offset")
    stated = next((name for name in PLANE_NAMES if name == said), None)
    if asked is not None and stated is not None and asked != stated:
        raise JobError(f"{geojson}: says that it counts from the plane {stated}; leave --plane {asked} out.")
    plane = plane_of(info, asked or stated or "bounds")
    other: PlaneName = "level0" if plane.name == "bounds" else "bounds"
    return _Origin(plane.l0_xy, f"plane {plane.name}", None if stated else other)


def _check_scanned(annotation: Annotation, info: SlideInfo, origin: _Origin) -> None:
    """Refuse an annotation (in pixels of level 0) where nothing was scanned."""
    scanned = plane_of(info, "bounds")
    if _touches(annotation, scanned):
        return
    width, height = scanned.l0_size_px
    if info.l0_bounds_px is None:
        raise MaskError(f"lies outside the slide of {width} x {height} px: was it drawn on another?")
    advice = "was it drawn on another slide?"
    if origin.other is not None:
        x, y = plane_of(info, origin.other).l0_xy
        if _touches(_shift(annotation, (x - origin.l0_xy[0], y - origin.l0_xy[1])), scanned):
            advice = f"it does not if counted from {origin.other}: give --plane {origin.other}"
    raise MaskError(
        f"lies outside the slide's bounds of {width} x {height} px at {scanned.l0_xy} (counted from "
        f"{origin.name}); {advice}"
    )


def _touches(annotation: Annotation, plane: Plane) -> bool:
    box, corner = annotation.l0_box, plane.l0_xy
    return all(
        box[axis + 2] > corner[axis] and box[axis] < corner[axis] + plane.l0_size_px[axis] for axis in (0, 1)
    )


def _shift(annotation: Annotation, l0_offset: tuple[float, float]) -> Annotation:
    offset = np.array(l0_offset)
    moved = tuple(tuple(ring + offset for ring in polygon) for polygon in annotation.polygons)
    return replace(annotation, polygons=moved)


def _near(name: str | None, labels: Sequence[str]) -> str:
    """Return what to say of a class that is one of ``labels`` but for capitals and blanks; often nothing."""
    plain = (name or "").strip().casefold()
    return next((f" (did you mean '{label}'?)" for label in labels if label.casefold() == plain), "")


def _is_detection(feature: Any) -> bool:
    properties = feature.get("properties") if isinstance(feature, dict) else None
    return isinstance(properties, dict) and properties.get("objectType") in DETECTIONS


def _notes(
    origin: _Origin, not_annotated: Mapping[str, int], detections: int, without_area: Sequence[str]
) -> tuple[str, ...]:
    notes = []
    if origin.name == "plane bounds" and origin.l0_xy != (0, 0):
        x, y = origin.l0_xy
        notes.append(
            f"coordinates were counted from the corner of the slide's bounds, ({x}, {y}) on level 0, as "
            "QuPath does (--plane bounds)"
        )
    if not_annotated:
        listed = ", ".join(f"{count} of {name}" for name, count in not_annotated.items())
        notes.append(f"features of other classes or of none, which count as not annotated: {listed}")
    if detections:
        notes.append(f"left out, detections without a class: {detections}")
    if without_area:
        listed = ", ".join(without_area[:LISTED_PROBLEMS])
        more = len(without_area) - LISTED_PROBLEMS
        notes.append(f"left out, without area: {listed}" + (f" and {more} more" if more > 0 else ""))
    return tuple(notes)
