"""Which slides, or images, a command is asked about: those of a manifest, of a folder, or a single one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openslide

from histoflare.errors import ManifestError, SlideError
from histoflare.slides.files import SLIDE_SUFFIXES, dicom_slides, opening_file
from histoflare.slides.manifest import COLUMNS
from histoflare.slides.mask_pyramid import is_own_pyramid
from histoflare.slides.names import find_path
from histoflare.slides.table import (
    duplicate_problems,
    file_id,
    read_common_cells,
    read_header,
    read_table,
    refuse_faults,
)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
EITHER_SUFFIXES = {".tif", ".tiff"}
"""A TIFF is a slide where OpenSlide knows its format, else an image."""

Kind = Literal["slide", "image"]


@dataclass(frozen=True)
class Source:
    """A slide or an image.

    Attributes:
        path: Where it is.
        written: As the manifest has it, or relative to the folder it was found in.
        kind: ``slide``, which OpenSlide opens, or ``image``.
        patient: Whose it is; "" where nothing says.
        mpp: Its resolution in µm/px where the manifest says one.
    """

    path: Path
    written: str
    kind: Kind = "slide"
    patient: str = ""
    mpp: float | None = None

    @property
    def file_id(self) -> str:
        """A file stem for what is made of it: its own, and 8 hex digits of the SHA-256 of ``written``.

        Two slides of one name in different folders have different ones, and each has the same on every run.
        """
        return file_id(self.path, self.written)


def find_sources(path: Path, *, images: bool = False) -> list[Source]:
    """Return the slides at ``path``: a manifest's rows in their order, a folder's files sorted, or the file.

    A manifest needs the column ``slide`` alone, with ``images`` that or ``image``; files that are not there
    are listed all the same. A folder is looked through with the folders below it, hidden ones left out, as
    are masks and heat maps that this package wrote. With ``images``, a folder without a slide has images.

    Args:
        path: The CSV, folder or file.
        images: Whether images (PNG, JPEG, TIFF) are taken too.

    Raises:
        ManifestError: The CSV cannot be used; every fault is in its ``problems``.
        SlideError: The folder holds nothing of the kind, or there is nothing at ``path`` (SLIDE_MISSING).
    """
    if path.suffix.lower() == ".csv":
        return _of_manifest(path, images)
    if not path.is_dir():
        opening_file(path)
        return [Source(path, path.name)]
    files = [file for file in sorted(path.rglob("*")) if _is_visible(file, path)]
    slides = list(_slides_of(path, files))
    if slides or not images:
        found = [Source(file, _relative(file, path)) for file in slides]
    else:
        found = [
            Source(file, _relative(file, path), "image")
            for file in files
            if file.suffix.lower() in IMAGE_SUFFIXES | EITHER_SUFFIXES and not is_own_pyramid(file)
        ]
    if not found:
        what = "slides or images" if images else "slides"
        raise SlideError(f"{path}: no {what} in this folder or below it.", reason="SLIDE_MISSING")
    return found


def _of_manifest(path: Path, images: bool) -> list[Source]:
    # masks' names are of no interest here, and a manifest for training may have them
    columns = (*COLUMNS, "image", "mask", "tissue")
    kind: Kind = "image" if images and "image" in read_header(path, columns) else "slide"
    problems: list[str] = []
    found: list[Source] = []
    lines: list[tuple[int, Path, str]] = []
    for line, cells in read_table(path, (kind,), columns):
        if not cells[kind]:
            problems.append(f"line {line}: no {kind}")
            continue
        common: dict[str, Any] = read_common_cells(line, {"patient": "", **cells}, problems)
        file = find_path(path.parent, cells[kind])
        lines.append((line, file, cells[kind]))
        found.append(Source(file, cells[kind], kind, common["patient"], common["mpp"]))
    refuse_faults(path, problems + duplicate_problems(kind, lines))
    if not found:
        raise ManifestError(f"{path}: names no {kind}.")
    return found


def _slides_of(folder: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Yield the slides among ``files``: one a series of DICOM, every file with a slide's ending."""
    series = {file for below in {each.parent for each in files} for file in dicom_slides(below)}
    for file in files:
        suffix = file.suffix.lower()
        if file in series:
            yield file
        elif suffix in EITHER_SUFFIXES:
            if openslide.OpenSlide.detect_format(file) is not None and not is_own_pyramid(file):
                yield file
        elif suffix in SLIDE_SUFFIXES:
            yield file


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()
