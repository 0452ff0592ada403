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
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import JobError, ManifestError, MaskError
from histoflare.masks.image_manifest import ImageRow, read_image_manifest, write_image_manifest
from histoflare.masks.importers import (
    MANIFEST,
    ImportReport,
    OnImage,
    nothing,
    write_mask,
    write_png,
)
from histoflare.masks.importers.annotations import Valued, read_annotations
from histoflare.masks.importers.polygons import fill
from histoflare.masks.importers.regions import Box, plan_regions
from histoflare.masks.windows import IGNORE
from histoflare.slides.planes import PlaneName, plane_of
from histoflare.slides.reader import Slide
from histoflare.slides.resolution import check_given_mpp
from histoflare.storage import real_path

REGION_PX = 4096
SMALLEST_PX = 1000
SLIDE_TEXT = "slide"
"""Name of the text in an image's PNG that says which slide it was cut from (``Slide.content_id``)."""


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

    Rows of the same slide from an earlier import are replaced, those of other slides stay. Where another
    slide's images have this one's name already, 8 hex digits are added to it.

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
        ignore_unknown, plane, l0_offset: As :func:`read_annotations`.
        on_image: Told how many regions are done.

    Raises:
        MaskError: As :func:`read_annotations`, or no pixel at ``mpp`` is annotated (``ANNOTATION_INVALID``).
        SlideError: ``mpp`` is no resolution (``SLIDE_MPP_INVALID``), or the slide cannot be read at it.
        ManifestError: The manifest in ``out`` cannot be read, or has this slide under another patient.
        JobError: As :func:`read_annotations`, the sizes do not fit each other, or there are more labels than
            a mask can tell apart.
    """
    check_given_mpp(mpp, "--mpp")
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
    name, others = _name_and_others(out / MANIFEST, slide, patient)
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
        row = _write_region(slide, name, found.annotations, region, scanned.l0_xy, l0_per_px, mpp, out)
        if row is not None:
            rows.append(replace(row, patient=patient))
        on_image(done, len(regions))
    if not rows:
        raise MaskError(
            f"{geojson}: no pixel at {mpp:g} µm/px lies in an annotation", reason="ANNOTATION_INVALID"
        )
    content = sorted([*others, *rows], key=lambda row: row.image.name)
    manifest = write_image_manifest(out / MANIFEST, content)
    _remove_others(out, name, {row.image.name for row in rows})
    return ImportReport(manifest, tuple(labels), found.notes)


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


def _write_region(
    slide: Slide,
    slide_name: str,
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
    name = f"{slide_name}_x{l0_xy[0]}_y{l0_xy[1]}.png"
    image_path, mask_path = out / "images" / name, out / "masks" / name
    write_png(image_path, Image.fromarray(slide.read(l0_xy, size_px, mpp)), {SLIDE_TEXT: slide.content_id})
    write_mask(mask_path, mask)
    return ImageRow(0, image_path, mask_path, "", mpp=mpp)


def _name_and_others(manifest: Path, slide: Slide, patient: str) -> tuple[str, list[ImageRow]]:
    """Return what this slide's images are named by, and the rows of other slides from a manifest there."""
    # a folder of DICOM files is named by a UID: what follows its last dot is no ending
    full = real_path(slide.path)
    plain = full.name if full.is_dir() else full.stem
    if not manifest.exists():
        return plain, []
    rows = read_image_manifest(manifest, check_files=False).rows
    longer = f"{plain}-{slide.content_id[:8]}"
    same_name = [row for row in rows if _is_of(row.image.name, plain)]
    is_taken = any(_slide_of(row.image) not in (None, slide.content_id) for row in same_name)
    name = longer if is_taken or any(_is_of(row.image.name, longer) for row in rows) else plain
    own = [row for row in rows if _is_of(row.image.name, name)]
    if any(row.patient != patient for row in own):
        raise ManifestError(
            f"{manifest}: has a slide {name} already, of patient {own[0].patient} and not {patient}. "
            "Import to another folder, or rename the slide."
        )
    return name, [row for row in rows if not _is_of(row.image.name, name)]


def _slide_of(image: Path) -> str | None:
    """Return the id of the slide that an image was cut from; None if the file does not say it."""
    try:
        with Image.open(image) as opened:
            return opened.info.get(SLIDE_TEXT)
    except OSError:
        return None


def _remove_others(out: Path, slide_name: str, kept: set[str]) -> None:
    """Remove images and masks that an earlier import with other sizes made of this slide."""
    for folder in (out / "images", out / "masks"):
        for path in folder.glob("*.png"):
            if _is_of(path.name, slide_name) and path.name not in kept:
                path.unlink()


def _is_of(image_name: str, slide_name: str) -> bool:
    return re.fullmatch(rf"{re.escape(slide_name)}_x-?\d+_y-?\d+\.png", image_name) is not None
