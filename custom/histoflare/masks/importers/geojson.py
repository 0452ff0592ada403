"""Annotations drawn on a slide in QuPath become images and masks at the resolution that a job wants.

QuPath writes GeoJSON with level-0 pixels. A feature's class is ``properties.classification.name``; what has a
class whose name ends in ``*`` (QuPath's own ``Ignore*``) counts as not annotated. Features are drawn from the
largest to the smallest, so that one inside another shows: a box of class ``background`` around drawn tumours
says that the rest of the box is background. What no feature covers is not annotated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
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
    write_mask,
    write_png,
)
from histoflare.masks.importers.polygons import Annotation, class_name, fill, read_annotation, read_features
from histoflare.masks.importers.regions import Box, plan_regions
from histoflare.masks.windows import IGNORE
from histoflare.slides.reader import Slide

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
    l0_offset: tuple[float, float] = (0.0, 0.0),
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
        ignore_unknown: Leave out features of other classes or of none, instead of refusing them.
        l0_offset: (x, y) added to coordinates. QuPath counts from the scanned area's corner on slides that
            have one (OpenSlide's ``bounds-x`` and ``bounds-y``, Mirax above all).
        on_image: Told how many regions are done.

    Raises:
        MaskError: A feature is malformed, of an unknown class or outside the slide (``ANNOTATION_INVALID``);
            every such feature is listed by its place in the file, from 0.
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
    annotations, left_out = read_annotations(
        geojson, labels, slide.info.l0_size_px, ignore_unknown=ignore_unknown, l0_offset=l0_offset
    )
    others = _rows_of_others(out / MANIFEST, slide.path.stem, patient)
    l0_per_px = slide.l0_per_px(mpp)
    width_px, height_px = (max(1, int(side / l0_per_px + 1e-6)) for side in slide.info.l0_size_px)
    boxes = [tuple(np.array(each.l0_box) / l0_per_px) for each, _ in annotations]
    regions = plan_regions(
        boxes, (width_px, height_px), margin_px=margin_px, smallest_px=smallest_px, region_px=region_px
    )
    rows = []
    for done, region in enumerate(regions, start=1):
        row = _write_region(slide, annotations, region, l0_per_px, mpp, out)
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
    notes = (f"{left_out} features of other classes or of none were left out",) if left_out else ()
    return ImportReport(manifest, tuple(labels), notes)


def read_annotations(
    geojson: Path,
    labels: Sequence[str],
    l0_size_px: tuple[int, int],
    *,
    ignore_unknown: bool = False,
    l0_offset: tuple[float, float] = (0.0, 0.0),
) -> tuple[list[Valued], int]:
    """Return the annotations of a file from the largest to the smallest, and how many were left out.

    Raises:
        MaskError: As :func:`import_annotations`.
    """
    found: list[Valued] = []
    problems = []
    left_out = 0
    for index, feature in enumerate(read_features(geojson)):
        name = class_name(feature)
        known = name is not None and (name in labels or name.endswith("*"))
        if not known and ignore_unknown:
            left_out += 1
            continue
        try:
            annotation = _shift(read_annotation(index, feature), l0_offset)
            _check(annotation, known, labels, l0_size_px)
        except HistoflareError as error:
            problems.append(f"feature {index} {error}")
            continue
        found.append((annotation, labels.index(name) if name in labels else IGNORE))
    if not found and not problems:
        problems.append("there is no annotation in it")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED_PROBLEMS])
        more = len(problems) - LISTED_PROBLEMS
        raise MaskError(
            f"{geojson}: cannot be imported:{listed}" + (f"\n  … and {more} more" if more > 0 else ""),
            reason="ANNOTATION_INVALID",
        )
    return sorted(found, key=lambda each: (-each[0].l0_area, each[0].index)), left_out


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


def _check(annotation: Annotation, known: bool, labels: Sequence[str], l0_size_px: tuple[int, int]) -> None:
    if not known:
        what = "has no class" if annotation.name is None else f"is of the unknown class '{annotation.name}'"
        raise MaskError(f"{what}; known are {', '.join(labels)} (--ignore-unknown leaves it out)")
    left, top, right, bottom = annotation.l0_box
    if right <= 0 or bottom <= 0 or left >= l0_size_px[0] or top >= l0_size_px[1]:
        raise MaskError(
            f"lies outside the slide of {l0_size_px[0]} x {l0_size_px[1]} px: was it drawn on another?"
        )


def _shift(annotation: Annotation, l0_offset: tuple[float, float]) -> Annotation:
    offset = np.array(l0_offset)
    moved = tuple(tuple(ring + offset for ring in polygon) for polygon in annotation.polygons)
    return replace(annotation, polygons=moved)


def _write_region(
    slide: Slide, annotations: Sequence[Valued], region: Box, l0_per_px: float, mpp: float, out: Path
) -> ImageRow | None:
    """Write a region's mask and image; None if nothing of it is annotated."""
    left, top, right, bottom = region
    size_px = (right - left, bottom - top)
    l0_xy = (round(left * l0_per_px), round(top * l0_per_px))
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
    return re.fullmatch(rf"{re.escape(slide_name)}_x\d+_y\d+\.png", image_name) is not None
