"""Importers: what a site has (challenge data, folders, annotations) becomes a manifest of images and masks.

An importer reads images where they are and writes masks beside the manifest. Files are whole or absent and
the manifest comes last, so an import that was stopped can simply be run again; the same input gives the same
bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from histoflare import storage
from histoflare.errors import MaskError
from histoflare.masks.image_files import IGNORED_COLOUR
from histoflare.masks.image_manifest import ImageManifest
from histoflare.masks.windows import IGNORE
from histoflare.slides.cohort import list_problems

MANIFEST = "images.csv"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}

COLOURS = (
    (0, 64, 128),
    (64, 128, 0),
    (243, 152, 0),
    (255, 255, 255),
    (200, 30, 90),
    (90, 200, 200),
    (120, 60, 180),
    (250, 230, 60),
)
"""Of the first classes, for people who open a mask; they mean nothing to a program."""

OnImage = Callable[[int, int], None]
"""Told how many images are done, and of how many."""


@dataclass(frozen=True)
class ImportReport:
    """What an import made.

    Attributes:
        manifest: What it wrote.
        labels: Class names in the order of the masks' values.
        notes: What a user of the masks should know.
    """

    manifest: ImageManifest
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_apart(folder: Path, out: Path, read: Sequence[str], written: Sequence[str]) -> None:
    """Refuse to write where an import reads: masks of its own would be written over.

    Args:
        folder: What is imported.
        out: Where to.
        read: Folders of ``folder`` that are read; what lies in folders of theirs is not.
        written: Folders of ``out`` that are written, beside ``out`` itself.

    Raises:
        MaskError: ``out`` is the folder, or it or a folder in it is one that is read.
    """
    places = {out.resolve(), *((out / each).resolve() for each in written)}
    if places & {folder.resolve(), *((folder / each).resolve() for each in read)}:
        raise MaskError(f"{out}: is read here, and would be written over; give another folder.")


def nothing(done: int, total: int) -> None:
    """Do nothing: the callback where progress is not shown."""


def write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write class indices uint8 (h, w) as a palette PNG; a file that has these bytes already stays."""
    image = Image.fromarray(mask)
    palette = [channel for index in range(256) for channel in COLOURS[index % len(COLOURS)]]
    palette[3 * IGNORE :] = IGNORED_COLOUR
    image.putpalette(palette)
    write_png(path, image)


def write_tissue(path: Path, tissue: NDArray[np.bool_]) -> None:
    """Write bool (h, w) as a gray PNG of 0 and 255."""
    write_png(path, Image.fromarray(tissue.astype(np.uint8) * np.uint8(255)))


def write_png(path: Path, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write an image, whole or not at all; a file that has these bytes already stays.

    Args:
        path: Where to. image: What is written. text: Names and values that the PNG keeps beside its pixels.
    """
    content = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value)
    image.save(content, "PNG", pnginfo=info)
    if not path.is_file() or path.read_bytes() != content.getvalue():
        storage.write_bytes(path, content.getvalue())


def images_in(folder: Path) -> dict[str, Path]:
    """Return the images of a folder (not below it) by stem, sorted.

    Raises:
        MaskError: There is no such folder (``IMAGE_MISSING``), or two images have one stem.
    """
    if not folder.is_dir():
        raise MaskError(
            f"{folder}: no such folder. If yours is called otherwise, name it (--images, --masks).",
            reason="IMAGE_MISSING",
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise MaskError(
                f"{folder}: {found[path.stem].name} and {path.name} differ in their ending alone, so which "
                "mask is whose is not clear"
            )
        found[path.stem] = path
    return found


def refuse(where: Path, problems: Sequence[str], reason: str = "MASK_UNUSABLE") -> None:
    """Raise a MaskError that lists ``problems``, if there are any."""
    if problems:
        raise MaskError(
            f"{where}: cannot be imported; nothing was. To leave an image out take it away with its mask and "
            f"its row of index.csv.{list_problems(problems)}",
            reason=reason,
        )
