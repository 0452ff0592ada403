"""The manifest of images and masks: what a site brings to learn segmentation from.

A CSV with a header line. Columns ``image``, ``mask`` (paths, relative to the manifest's folder) and
``patient`` are needed; ``tissue, mpp, split, site, sex, age_band, scanner`` may be there. A mask is a PNG of
class indices in the order of the job's labels, 255 where nothing was annotated; a tissue image is above 0
where tissue is. It is read as a whole: every fault is named at once, with its line number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from histoflare.slides.names import find_path, path_hint
from histoflare.slides.splits import DEFAULT_SPLIT, Split, SplitRule
from histoflare.slides.table import (
    SUBGROUPS,
    duplicate_problems,
    file_exists,
    file_id,
    keeps_splits,
    read_common_cells,
    read_table,
    refuse_faults,
    relative_path,
    split_problems,
    write_table,
)

NEEDED = ("image", "mask", "patient")
COLUMNS = (*NEEDED, "tissue", "mpp", "split", *SUBGROUPS)


@dataclass(frozen=True)
class ImageRow:
    """One image. Paths are full, ``written`` is the image's as it stands in the manifest."""

    line: int
    image: Path
    mask: Path
    patient: str
    tissue: Path | None = None
    mpp: float | None = None
    split: Split | None = None
    subgroups: Mapping[str, str] = field(default_factory=dict)
    written: str = ""


@dataclass(frozen=True)
class ImageManifest:
    """The rows of the manifest at ``path``, in its order."""

    path: Path
    rows: tuple[ImageRow, ...]

    def row_id(self, row: ImageRow) -> str:
        """Return a file stem that is unique in this manifest and the same on every run and machine.

        The image's own stem (cut if it is very long) and 8 hex digits of the SHA-256 of its path as the
        manifest has it.
        """
        return file_id(row.image, row.written)


def read_image_manifest(path: Path, *, check_files: bool = True) -> ImageManifest:
    """Read and check the manifest at ``path``.

    Args:
        path: The CSV; UTF-8 (a byte order mark is fine), separated by commas or semicolons.
        check_files: Whether the files it names must exist.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``) or is wrong (``MANIFEST_INVALID``); every
            fault is in its ``problems``.
    """
    table = read_table(path, NEEDED, COLUMNS)
    problems: list[str] = []
    rows = [_read_row(path.parent, line, cells, problems) for line, cells in table]
    problems += duplicate_problems("image", [(row.line, row.image, row.written) for row in rows])
    problems += split_problems(rows) + _shared_files(path.parent, rows)
    if check_files:
        problems += [problem for row in rows for problem in _missing_files(path.parent, row)]
    refuse_faults(path, problems)
    return ImageManifest(path, tuple(rows))


def write_image_manifest(path: Path, rows: Sequence[ImageRow]) -> ImageManifest:
    """Write ``rows`` to ``path``, whole or not at all, with files relative to its folder; return them so.

    Columns that no row fills are left out.
    """
    written_rows = []
    table: list[dict[str, Any]] = []
    for line, row in enumerate(rows, start=2):
        written = relative_path(row.image, path.parent)
        written_rows.append(replace(row, line=line, written=written))
        table.append(
            {
                **row.subgroups,
                "image": written,
                "mask": relative_path(row.mask, path.parent),
                "patient": row.patient,
                "tissue": relative_path(row.tissue, path.parent) if row.tissue is not None else None,
                "mpp": row.mpp,
                "split": row.split,
            }
        )
    used = [name for name in COLUMNS if name in NEEDED or any(cells.get(name) is not None for cells in table)]
    write_table(path, used, [[cells.get(name) for name in used] for cells in table])
    return ImageManifest(path, tuple(written_rows))


def assign_image_splits(manifest: ImageManifest, rule: SplitRule = DEFAULT_SPLIT) -> ImageManifest:
    """Return the manifest with every patient's role by ``rule``; unchanged if it has splits already.

    Each patient's role follows from the patient alone, by the same rule as of slides.

    Raises:
        ManifestError: Some rows have a split and others not (``MANIFEST_INVALID``), or there are splits and
            the rule has folds.
    """
    if keeps_splits(manifest.path, manifest.rows, rule):
        return manifest
    rows = tuple(replace(row, split=rule.role_of(row.patient)) for row in manifest.rows)
    return replace(manifest, rows=rows)


def missing_hint(folder: Path, row: ImageRow) -> str:
    """Return what to say beside a row, of a manifest in ``folder``, whose files are not all there."""
    files = (file for file in (row.image, row.mask, row.tissue) if file is not None and not file_exists(file))
    return next((hint for file in files if (hint := path_hint(os.path.relpath(file, folder)))), "")


def _read_row(folder: Path, line: int, cells: dict[str, str], problems: list[str]) -> ImageRow:
    """Return the row; what is wrong with it goes into ``problems``."""
    problems += [f"line {line}: no {name}" for name in NEEDED if not cells[name]]
    common = read_common_cells(line, cells, problems)
    subgroups = {name: value for name in SUBGROUPS if (value := common.pop(name)) is not None}
    return ImageRow(
        line=line,
        image=find_path(folder, cells["image"]),
        mask=find_path(folder, cells["mask"]),
        tissue=find_path(folder, cells["tissue"]) if cells.get("tissue") else None,
        subgroups=subgroups,
        written=cells["image"],
        **common,
    )


def _shared_files(folder: Path, rows: Sequence[ImageRow]) -> list[str]:
    """Return the faults of a table in which two images have one mask, or an image is its own mask."""
    masks = [(row.line, row.mask, row.mask.name) for row in rows if row.mask != folder]
    own = [row for row in rows if row.mask == row.image and row.written]
    return duplicate_problems("mask", masks) + [f"line {row.line}: the image is its own mask" for row in own]


def _missing_files(folder: Path, row: ImageRow) -> list[str]:
    files = {"image": row.image, "mask": row.mask, "tissue image": row.tissue}
    return [
        f"line {row.line}: no such {what}: {file}{path_hint(os.path.relpath(file, folder))}"
        for what, file in files.items()
        if file is not None and file != folder and not file_exists(file)
    ]
