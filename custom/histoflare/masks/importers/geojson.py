"""Annotations drawn on a slide in QuPath become images and masks at the resolution that a job wants.

QuPath writes GeoJSON with level-0 pixels, counted from the slide's bounds where it has some
(``slides.planes``). A feature's class is ``properties.classification.name``. A class whose name ends in ``*``
(QuPath's own ``Ignore*`` and ``Region*``), or one that is left out, counts as not annotated: whoever drew it
said that it is not what lies around it. Features are drawn from the largest to the smallest, so that one
inside another shows: a box of class ``background`` around drawn tumours says that the rest of the box is
background. What no feature covers is not annotated. Features without area (lines, points) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import HistoflareError, JobError, ManifestError, MaskError
from histoflare.masks.image_manifest import ImageRow, read_image_manifest, write_image_manifest
from histoflare.masks.importers import (
    LISTED_PROBLEMS,
    MANIFEST,
    ImportReport,
    OnImage,
    nothing,
    refuse,
    write_mask,
    write_png,
)
from histoflare.masks.importers.polygons import (
    Annotation,
    class_name,
    describe,
    fill,
    read_annotation,
    read_features,
)
from histoflare.masks.importers.regions import Box, plan_regions
from histoflare.masks.windows import IGNORE
from histoflare.slides.planes import PLANE_NAMES, Plane, PlaneName, plane_of
from histoflare.slides.reader import Slide, SlideInfo

REGION_PX = 4096
SMALLEST_PX = 1000

Valued = tuple[Annotation, int]
"""An annotation and its class's index, or :data:`IGNORE`."""


def import_annotations(
    slide: Slide,
    geojson: Path,
    labels: Sequence[str],
    mpp: float,
    out: Path,
    *,
    patient: str,
    region_px: int = REGION_PX,
    smallest_px: int = SMALLEST_PX,
    margin_px: int = 0,
    ignore_unknown: bool = False,
    plane: PlaneName | None = None,
    l0_offset: tuple[float, float] | None = None,
    on_image: OnImage = nothing,
) -> ImportReport:
    """Write the annotated regions of a slide to ``out`` and add them to the manifest there.

    Rows of the same slide from an earlier import are replaced, those of other slides stay.

    Args:
        slide: What was annotated.
        geojson: QuPath's export.
        labels: Class names; a mask's values are indices into them.
        mpp: Resolution of the images in µm/px.
        out: Folder for the manifest, ``images`` and ``masks``.
        patient: Whose slide it is.
        region_px: Larger regions are cut into parts of at most this side.
        smallest_px: Least side of a region, if the slide has room: the windows of training must fit in.
        margin_px: Kept around annotations.
        ignore_unknown: Count features of other classes or of none as not annotated, instead of refusing them.
        plane: Where coordinates are counted from; None is what the file says, or else QuPath's: ``bounds``.
        l0_offset: (x, y) added to coordinates to make them pixels of level 0; instead of ``plane``.
        on_image: Told how many regions are done.

    Raises:
        MaskError: A feature is malformed, of an unknown class or outside the slide (``ANNOTATION_INVALID``);
            every such feature is listed by its place in the file, from 0, and what QuPath shows of it.
        SlideError: The slide cannot be read at ``mpp``.
        ManifestError: The manifest in ``out`` cannot be read, or has this slide under another patient.
        JobError: The sizes do not fit each other, or there are more labels than a mask can tell apart.
    """
    if not 1 <= smallest_px <= region_px // 2 or margin_px < 0:
        raise JobError(
            f"a region's least side must be 1 px to half of its largest ({region_px // 2}), and its margin "
            f"not below 0: {smallest_px}, {margin_px}"
        )
    if len(labels) > IGNORE or len(set(labels)) != len(labels):
        raise JobError(f"labels: at most {IGNORE}, each once")
    found = read_annotations(
        geojson, labels, slide.info, ignore_unknown=ignore_unknown, plane=plane, l0_offset=l0_offset
    )
    others = _rows_of_others(out / MANIFEST, slide.path.stem, patient)
    l0_per_px = slide.l0_per_px(mpp)
    scanned = plane_of(slide.info, "bounds")
    width_px, height_px = (max(1, int(side / l0_per_px + 1e-6)) for side in scanned.l0_size_px)
    corner = np.array([*scanned.l0_xy, *scanned.l0_xy])
    boxes = [
        tuple((np.array(each.l0_box) - corner) / l0_per_px)
        for each, value in found.annotations
        if value != IGNORE
    ]
    regions = plan_regions(
        boxes, (width_px, height_px), margin_px=margin_px, smallest_px=smallest_px, region_px=region_px
    )
    rows = []
    for done, region in enumerate(regions, start=1):
        row = _write_region(slide, found.annotations, region, scanned.l0_xy, l0_per_px, mpp, out)
        if row is not None:
            rows.append(replace(row, patient=patient))
        on_image(done, len(regions))
    if not rows:
        raise MaskError(
            f"{geojson}: no pixel at {mpp:g} µm/px lies in an annotation", reason="ANNOTATION_INVALID"
        )
    content = sorted([*others, *rows], key=lambda row: row.image.name)
    manifest = write_image_manifest(out / MANIFEST, content)
    _remove_others(out, slide.path.stem, {row.image.name for row in rows})
    return ImportReport(manifest, tuple(labels), found.notes)


@dataclass(frozen=True)
class FoundAnnotations:
    """Annotations in pixels of level 0, from the largest to the smallest, and what to know of the file."""

    annotations: tuple[Valued, ...]
    notes: tuple[str, ...]


def read_annotations(
    geojson: Path,
    labels: Sequence[str],
    info: SlideInfo,
    *,
    ignore_unknown: bool = False,
    plane: PlaneName | None = None,
    l0_offset: tuple[float, float] | None = None,
) -> FoundAnnotations:
    """Return the annotations of a file.

    Raises:
        MaskError, JobError: As :func:`import_annotations`.
    """
    features, said = read_features(geojson)
    counted = _plane(geojson, info, plane, said)
    l0_xy = l0_offset if l0_offset is not None else counted.l0_xy
    found: list[Valued] = []
    problems, without_area = [], []
    left_out = 0
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
                    + f"; known are {', '.join(labels)} (--ignore-unknown counts it as not annotated)"
                )
            annotation = _shift(annotation, l0_xy)
            value = labels.index(name) if name in labels else IGNORE
            if value != IGNORE:
                _check(annotation, info, counted, l0_offset)
        except HistoflareError as error:
            problems.append(f"{describe(index, feature)} {error}")
            continue
        left_out += not known
        found.append((annotation, value))
    if not problems and all(value == IGNORE for _, value in found):
        problems.append("there is no annotation of one of the classes in it: " + ", ".join(labels))
    refuse(geojson, problems, "ANNOTATION_INVALID")
    notes = []
    if l0_offset is None and counted.l0_xy != (0, 0):
        notes.append(
            f"coordinates were counted from the corner of the slide's bounds, ({counted.l0_xy[0]}, "
            f"{counted.l0_xy[1]}) on level 0, as QuPath does (--plane bounds)"
        )
    if left_out:
        notes.append(f"features of other classes or of none, which count as not annotated: {left_out}")
    if without_area:
        listed = ", ".join(without_area[:LISTED_PROBLEMS])
        more = len(without_area) - LISTED_PROBLEMS
        notes.append(f"left out, without area: {listed}" + (f" and {more} more" if more > 0 else ""))
    ordered = sorted(found, key=lambda each: (-each[0].l0_area, each[0].index))
    return FoundAnnotations(tuple(ordered), tuple(notes))


def draw(
    annotations: Sequence[Valued], l0_xy: tuple[int, int], size_px: tuple[int, int], l0_per_px: float
) -> NDArray[np.uint8]:
    """Return the mask uint8 (h, w) of a region whose corner is ``l0_xy``; later annotations cover earlier."""
    mask = np.full((size_px[1], size_px[0]), IGNORE, np.uint8)
    corner = np.array(l0_xy, float)
    end = corner + np.array(size_px) * l0_per_px
    for annotation, value in annotations:
        left, top, right, bottom = annotation.l0_box
        if right <= corner[0] or bottom <= corner[1] or left >= end[0] or top >= end[1]:
            continue
        moved = [tuple((ring - corner) / l0_per_px for ring in polygon) for polygon in annotation.polygons]
        mask[fill(moved, size_px)] = value
    return mask


def _plane(geojson: Path, info: SlideInfo, asked: PlaneName | None, said: object) -> Plane:
    """Return the plane that is asked for, or said in the file; QuPath's if neither is."""
    stated = next((name for name in PLANE_NAMES if name == said), None)
    if asked is not None and stated is not None and asked != stated:
        raise JobError(f"{geojson}: says that it counts from the plane {stated}; leave --plane {asked} out.")
    return plane_of(info, asked or stated or "bounds")


def _check(
    annotation: Annotation, info: SlideInfo, counted: Plane, l0_offset: tuple[float, float] | None
) -> None:
    """Refuse an annotation (in pixels of level 0) where nothing was scanned."""
    scanned = plane_of(info, "bounds")
    if _touches(annotation, scanned):
        return
    width, height = scanned.l0_size_px
    if info.l0_bounds_px is None:
        raise MaskError(f"lies outside the slide of {width} x {height} px: was it drawn on another?")
    advice = "was it drawn on another slide?"
    other: PlaneName = "level0" if counted.name == "bounds" else "bounds"
    moved = np.array(plane_of(info, other).l0_xy) - np.array(counted.l0_xy)
    if l0_offset is None and _touches(_shift(annotation, (float(moved[0]), float(moved[1]))), scanned):
        advice = f"it does not if counted from {other}: give --plane {other}"
    raise MaskError(
        f"lies outside the slide's bounds of {width} x {height} px at {scanned.l0_xy} (counted from "
        f"{'--offset' if l0_offset is not None else counted.name}); {advice}"
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


def _write_region(
    slide: Slide,
    annotations: Sequence[Valued],
    region: Box,
    l0_corner: tuple[int, int],
    l0_per_px: float,
    mpp: float,
    out: Path,
) -> ImageRow | None:
    """Write mask and image of a region, counted from ``l0_corner``; None if nothing of it is annotated."""
    left, top, right, bottom = region
    size_px = (right - left, bottom - top)
    l0_xy = (l0_corner[0] + round(left * l0_per_px), l0_corner[1] + round(top * l0_per_px))
    mask = draw(annotations, l0_xy, size_px, l0_per_px)
    if (mask == IGNORE).all():
        return None
    name = f"{slide.path.stem}_x{l0_xy[0]}_y{l0_xy[1]}.png"
    image_path, mask_path = out / "images" / name, out / "masks" / name
    write_png(image_path, Image.fromarray(slide.read(l0_xy, size_px, mpp)))
    write_mask(mask_path, mask)
    return ImageRow(0, image_path, mask_path, "", mpp=mpp)


def _rows_of_others(manifest: Path, slide_name: str, patient: str) -> list[ImageRow]:
    """Return the rows of other slides from a manifest that is there already."""
    if not manifest.exists():
        return []
    rows = read_image_manifest(manifest, check_files=False).rows
    own = [row for row in rows if _is_of(row.image.name, slide_name)]
    if any(row.patient != patient for row in own):
        raise ManifestError(
            f"{manifest}: has a slide {slide_name} already, of patient {own[0].patient} and not {patient}. "
            "Import to another folder, or rename the slide."
        )
    return [row for row in rows if not _is_of(row.image.name, slide_name)]


def _remove_others(out: Path, slide_name: str, kept: set[str]) -> None:
    """Remove images and masks that an earlier import with other sizes made of this slide."""
    for folder in (out / "images", out / "masks"):
        for path in folder.glob("*.png"):
            if _is_of(path.name, slide_name) and path.name not in kept:
                path.unlink()


def _is_of(image_name: str, slide_name: str) -> bool:
    return re.fullmatch(rf"{re.escape(slide_name)}_x-?\d+_y-?\d+\.png", image_name) is not None
