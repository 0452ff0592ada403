"""Nucleus sets: folders ``images`` and ``masks`` of equal names, and an ``index.csv`` that may name patients.

A mask is binary (0 and 255, say) or has a number for each nucleus; either way what is above 0 is a nucleus.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import ManifestError, MaskError
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

LABELS = ("background", "nucleus")
INDEX = "index.csv"


def import_nuclei(
    folder: Path, out: Path, *, mpp: float | None = None, on_image: OnImage = nothing
) -> ImportReport:
    """Write a manifest and masks of :data:`LABELS` to ``out``; images stay where they are.

    Patients are those of the column ``patient`` of ``index.csv`` (column ``name``: an image's stem); without
    it each image counts as a patient of its own, and a note says so.

    Args:
        folder: Holds ``images``, ``masks`` and perhaps ``index.csv``.
        out: Folder for the manifest and the masks.
        mpp: Resolution of the images in µm/px, if it is known.
        on_image: Told how many images are done.

    Raises:
        ManifestError: ``index.csv`` cannot be read, or does not fit the images.
        MaskError: A folder, an image or a mask is missing, damaged or of another size than its image.
    """
    check_apart(folder, out, ("images", "masks"))
    images, masks = images_in(folder / "images"), images_in(folder / "masks")
    unpaired = [f"{path.name}: has no mask" for stem, path in images.items() if stem not in masks]
    unpaired += [
        f"{path.name}: a mask without an image" for stem, path in masks.items() if stem not in images
    ]
    refuse(folder, unpaired or ([] if images else ["there are no images"]), "MASK_MISSING")
    patients, notes = _read_patients(folder / INDEX, set(images))
    rows, problems = [], []
    for done, (stem, path) in enumerate(images.items(), start=1):
        try:
            mask = read_nuclei(masks[stem])
            _check_size(path, mask)
        except MaskError as error:
            problems.append(str(error))
        else:
            target = out / "masks" / f"{stem}.png"
            write_mask(target, mask)
            rows.append(ImageRow(0, path, target, patients[stem], mpp=mpp))
        on_image(done, len(images))
    refuse(folder, problems)
    return ImportReport(write_image_manifest(out / MANIFEST, rows), LABELS, notes)


def read_nuclei(path: Path) -> NDArray[np.uint8]:
    """Return uint8 (h, w), 1 where the binary or instance mask at ``path`` is above 0 in any colour.

    Raises:
        MaskError: It is missing or damaged.
    """
    image = decode(read_file(path, "MASK"), path, "MASK")
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGB")  # an opaque black pixel is no nucleus
    numbers = np.asarray(image)
    inside = numbers.reshape(*numbers.shape[:2], -1).any(axis=2)
    return np.asarray(inside, np.uint8)


def _check_size(image: Path, mask: NDArray[np.uint8]) -> None:
    size_px = decode(read_file(image, "IMAGE"), image, "IMAGE").size
    if size_px != (mask.shape[1], mask.shape[0]):
        raise MaskError(
            f"{image.name}: has {size_px[0]} x {size_px[1]} px, and its mask "
            f"{mask.shape[1]} x {mask.shape[0]}",
            reason="MASK_SIZE",
        )


def _read_patients(index: Path, stems: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return each image's patient, and a note if that is the image itself."""
    if not index.is_file():
        why = f"there is no {INDEX}"
    else:
        try:
            with index.open(encoding="utf-8-sig", newline="") as file:
                table = list(csv.DictReader(file, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"{index}: cannot be read ({error})", reason="MANIFEST_UNREADABLE") from error
        if table and {"name", "patient"} <= set(table[0]):
            return _patients_of(index, table, stems), ()
        why = f"{INDEX} has no column 'patient'"
    note = f"{why}: each image counts as a patient of its own, which two images of one patient are not"
    return {stem: stem for stem in stems}, (note,)


def _patients_of(index: Path, table: list[dict[str, str]], stems: set[str]) -> dict[str, str]:
    problems: list[str] = []
    patients: dict[str, str] = {}
    for line, cells in enumerate(table, start=2):
        name, patient = (cells["name"] or "").strip(), (cells["patient"] or "").strip()
        if name not in stems:
            problems.append(f"line {line}: no image '{name}'")
        elif not patient:
            problems.append(f"line {line}: no patient")
        elif patients.setdefault(name, patient) != patient:
            problems.append(f"line {line}: image '{name}' has another patient above")
    problems += [
        f"image '{stem}' is not in it"
        for stem in sorted(stems - {(cells["name"] or "").strip() for cells in table})
    ]
    if problems:
        raise ManifestError(f"{index}: does not fit the images; nothing was imported.", problems=problems)
    return patients
