"""Folders of images and of masks of one class: binary masks, a number an object, or ImageScope outlines.

In a mask whatever is above 0 is of the class (0 and 255, say, or a number for each nucleus). Image and mask
have equal names, but for an ending such as ``_mask``; an ``index.csv`` may name patients, splits and sites.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import JobError, ManifestError, MaskError
from histoflare.masks.image_files import decode, read_file
from histoflare.masks.image_manifest import ImageRow, write_image_manifest
from histoflare.masks.importers import (
    MANIFEST,
    ImportReport,
    OnImage,
    check_apart,
    images_in,
    nothing,
    refuse,
    write_mask,
)
from histoflare.masks.importers.imagescope import draw_outlines, read_outlines
from histoflare.masks.windows import IGNORE
from histoflare.slides.resolution import check_given_mpp
from histoflare.slides.table import SUBGROUPS, has_splits, read_common_cells, read_index, split_problems
from histoflare.slides.tcga import parse_barcode

INDEX = "index.csv"
NAMES = ("name", "image", "file")
"""Columns of :data:`INDEX` that can say which image a row is about."""

INDEX_COLUMNS = (*NAMES, "patient", "split", "mpp", *SUBGROUPS)

FOLDERS = (("images", "masks"), ("Tissue Images", "Annotations"))
"""Where images and masks are looked for; the second pair is MoNuSeg's."""

MASK_ENDING = re.compile(r"[-_. ](masks?|labels?|seg|segmentation|gt|annotations?)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Where images and masks are, and what is in the masks.

    Attributes:
        folder: Holds the two folders and perhaps :data:`INDEX`.
        images, masks: Names of the folders, ``.`` for ``folder`` itself; None takes the first of
            :data:`FOLDERS` that is there.
        layers: Of XML outlines those that hold the class; what lies in others is not annotated. Empty: there
            must be one only.
    """

    folder: Path
    images: str | None = None
    masks: str | None = None
    layers: tuple[str, ...] = ()

    def folders(self) -> tuple[Path, Path]:
        """Return the folders of the images and of the masks."""
        there = (pair for pair in FOLDERS if (self.folder / pair[0]).is_dir())
        images, masks = next(there, FOLDERS[0])
        return self.folder / (self.images or images), self.folder / (self.masks or masks)


def import_binary(
    source: Source,
    out: Path,
    label: str,
    *,
    background: str = "background",
    mpp: float | None = None,
    on_image: OnImage = nothing,
) -> ImportReport:
    """Write a manifest and masks of two classes to ``out``; images stay where they are.

    Patients, splits and subgroups are those of ``index.csv``. Without its column ``patient`` they are those
    in TCGA's names, or else each image counts as a patient of its own, and a note says so.

    Args:
        source: What to import.
        out: Folder for the manifest and the masks.
        label: Name of the class of what is above 0.
        background: Name of the class of the rest.
        mpp: Resolution of the images in µm/px; None is what ``index.csv`` or an XML says.
        on_image: Told how many images are done.

    Raises:
        JobError: The two classes have one name.
        ManifestError: ``index.csv`` cannot be read, or does not fit the images.
        MaskError: A folder, an image or a mask is missing, damaged or of another size than its image.
        SlideError: ``mpp`` is no resolution (``SLIDE_MPP_INVALID``).
    """
    if not label.strip() or label == background:
        raise JobError(f"The class and the rest need two names, not '{label}' and '{background}'.")
    check_given_mpp(mpp, "--mpp")
    folder = source.folder
    images_folder, masks_folder = source.folders()
    check_apart(folder, out, [str(each.resolve()) for each in (images_folder, masks_folder)], ["masks"])
    pairs = _pairs(images_folder, masks_folder)
    described, notes = _read_index(folder / INDEX, {stem: image for stem, (image, _) in pairs.items()})
    rows, problems = [], []
    seen: set[str] = set()
    for done, (stem, (image, mask)) in enumerate(pairs.items(), start=1):
        try:
            values, said_mpp = _read_mask(image, mask, source.layers, seen)
        except MaskError as error:
            problems.append(str(error))
        else:
            target = out / "masks" / f"{stem}.png"
            write_mask(target, values)
            row = described[stem]
            rows.append(replace(row, image=image, mask=target, mpp=mpp or row.mpp or said_mpp))
        on_image(done, len(pairs))
    if missing := sorted(set(source.layers) - seen):
        problems.append(
            f"no mask has a layer {', '.join(missing)}; there are {', '.join(sorted(seen)) or 'none'}"
        )
    refuse(folder, problems)
    return ImportReport(write_image_manifest(out / MANIFEST, rows), (background, label), notes)


def read_binary(path: Path) -> NDArray[np.uint8]:
    """Return uint8 (h, w), 1 where the binary or instance mask at ``path`` is above 0 in any colour.

    Raises:
        MaskError: It is missing or damaged; or it has 1 and 255 and nothing between, where 255 is rather what
            nobody annotated (``MASK_CLASS``).
    """
    image = decode(read_file(path, "MASK"), path, "MASK")
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGB")  # an opaque black pixel is no nucleus
    numbers = np.asarray(image)
    if numbers.ndim == 2 and set(np.unique(numbers)) - {0} == {1, IGNORE}:
        raise MaskError(
            f"{path}: has 1 and 255. If 255 is where nobody annotated, it is a mask of classes already: name "
            "it in an images.csv ('histoflare masks check'). If both are of the class, give them one number.",
            reason="MASK_CLASS",
        )
    inside = numbers.reshape(*numbers.shape[:2], -1).any(axis=2)
    return np.asarray(inside, np.uint8)


def _pairs(images_folder: Path, masks_folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return each image and its mask by the image's stem.

    Raises:
        MaskError: One has no other, or two masks fit one image (``MASK_MISSING``).
    """
    images = images_in(images_folder)
    outlines = {path.stem: path for path in sorted(masks_folder.glob("*.[xX][mM][lL]"))}
    masks = outlines or images_in(masks_folder)
    if not outlines and images_folder.resolve() == masks_folder.resolve():
        masks = {stem: path for stem, path in images.items() if MASK_ENDING.search(stem)}
        images = {stem: path for stem, path in images.items() if stem not in masks}
    found: dict[str, Path] = {}
    problems = []
    for stem, path in masks.items():
        image_stem = stem if stem in images else MASK_ENDING.sub("", stem)
        if image_stem not in images:
            problems.append(f"{path.name}: a mask without an image")
        elif image_stem in found:
            problems.append(f"{path.name}: a second mask of {images[image_stem].name}")
        found.setdefault(image_stem, path)
    problems += [f"{path.name}: has no mask" for stem, path in images.items() if stem not in found]
    refuse(images_folder, problems or ([] if images else ["there are no images"]), "MASK_MISSING")
    return {stem: (path, found[stem]) for stem, path in images.items()}


def _read_mask(
    image: Path, mask: Path, layers: Sequence[str], seen: set[str]
) -> tuple[NDArray[np.uint8], float | None]:
    """Return a mask's values uint8 (h, w) and the resolution it states; its layers go into ``seen``."""
    size_px = decode(read_file(image, "IMAGE"), image, "IMAGE").size
    if mask.suffix.lower() == ".xml":
        outlines = read_outlines(mask)
        names = [layer.name for layer in outlines.layers]
        seen.update(names)
        if not layers and len(set(names)) > 1:
            raise MaskError(
                f"{mask}: has the layers {', '.join(names)}: say with --layer which hold the class; what "
                "lies in others counts as not annotated",
                reason="MASK_CLASS",
            )
        return draw_outlines(outlines.layers, layers or names, size_px), outlines.mpp
    values = read_binary(mask)
    if size_px != (values.shape[1], values.shape[0]):
        raise MaskError(
            f"{image.name}: has {size_px[0]} x {size_px[1]} px, and its mask "
            f"{values.shape[1]} x {values.shape[0]}",
            reason="MASK_SIZE",
        )
    return values, None


def _read_index(index: Path, images: dict[str, Path]) -> tuple[dict[str, ImageRow], tuple[str, ...]]:
    """Return a row for each image, without its files, and a note if no column names its patient."""
    columns, table = read_index(index, INDEX_COLUMNS) if index.is_file() else ([], [])
    name_column = next((name for name in NAMES if name in columns), None)
    patients, how = _own_patients(images)
    if name_column is None:
        why = f"{INDEX} names no images (column 'name')" if index.is_file() else f"there is no {INDEX}"
        rows = {stem: _row(0, {"patient": patient}, []) for stem, patient in patients.items()}
        return rows, (f"{why}: {how}",)
    by_name = {path.name: stem for stem, path in images.items()} | {stem: stem for stem in images}
    problems: list[str] = []
    rows = {}
    for line, cells in table:
        stem = by_name.get(cells[name_column])
        if stem is None:
            problems.append(f"line {line}: no image '{cells[name_column]}'")
            continue
        cells.setdefault("patient", patients[stem])
        if not cells["patient"]:
            problems.append(f"line {line}: no patient")
        row = _row(line, cells, problems)
        first = rows.setdefault(stem, row)
        if replace(row, line=first.line) != first:
            problems.append(f"line {line}: image '{stem}' has another patient, split or subgroup above")
    problems += [f"image '{stem}' is not in it" for stem in images if stem not in rows]
    problems += split_problems(list(rows.values()))
    if problems:
        raise ManifestError(f"{index}: does not fit the images; nothing was imported.", problems=problems)
    has_splits(index, list(rows.values()))
    return rows, () if "patient" in columns else (f"{INDEX} has no column 'patient': {how}",)


def _row(line: int, cells: dict[str, str], problems: list[str]) -> ImageRow:
    common = read_common_cells(line, cells, problems)
    subgroups = {name: value for name in SUBGROUPS if (value := common.pop(name)) is not None}
    return ImageRow(line, Path(), Path(), subgroups=subgroups, **common)


def _own_patients(images: dict[str, Path]) -> tuple[dict[str, str], str]:
    """Return each image's patient by the image's name, and how."""
    barcodes = {stem: parse_barcode(path.name) for stem, path in images.items()}
    named = {stem: barcode.patient for stem, barcode in barcodes.items() if barcode is not None}
    if len(named) == len(images):
        return named, "patients are those in TCGA's names"
    how = "each image counts as a patient of its own, which two images of one patient are not"
    return {stem: stem for stem in images}, how
