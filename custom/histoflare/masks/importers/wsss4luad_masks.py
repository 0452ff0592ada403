"""The masks of WSSS4LUAD: classes by their colours, and background masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import MaskError
from histoflare.masks.image_files import decode, read_file

LABELS = ("tumour", "stroma", "normal", "background")
COLOURS = ((0, 64, 128), (64, 128, 0), (243, 152, 0), (255, 255, 255))
"""Of the labels, in their order."""


def read_classes(path: Path) -> NDArray[np.uint8]:
    """Return class indices uint8 (h, w) of a mask, by its colours and not by their place in its palette.

    A gray mask of 0 to 3 holds the indices themselves.

    Raises:
        MaskError: It is missing, damaged, or has a colour of no class (``MASK_CLASS``).
    """
    image = decode(read_file(path, "MASK"), path, "MASK")
    if image.mode in ("L", "1"):
        indices = np.asarray(image).astype(np.uint8)
        _refuse_colours(path, [(int(each),) * 3 for each in np.unique(indices[indices >= len(LABELS)])])
        return indices
    if image.mode == "P":
        return _classes_of_palette(image, path)
    rgb = np.asarray(image.convert("RGB"))
    classes = np.full(rgb.shape[:2], len(LABELS), np.uint8)
    for index, colour in enumerate(COLOURS):
        classes[(rgb == np.array(colour, np.uint8)).all(axis=2)] = index
    unknown = rgb[classes == len(LABELS)]
    _refuse_colours(
        path, [tuple(map(int, each)) for each in np.unique(unknown, axis=0)] if unknown.size else []
    )
    return classes


def read_binary(path: Path) -> NDArray[np.bool_]:
    """Return bool (h, w), true where a background mask is above 0 in any colour.

    Raises:
        MaskError: It is missing, damaged, or has more than two values.
    """
    image = decode(read_file(path, "MASK"), path, "MASK")
    if image.mode not in ("1", "L", "P"):
        image = image.convert("RGB").convert("L")
    pixels = np.asarray(image)
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise MaskError(
            f"{path}: a background mask has two values, 0 and another; this one has {len(values)}",
            reason="MASK_CLASS",
        )
    return pixels > 0


def _classes_of_palette(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    channels = image.getpalette("RGB") or []
    palette = [tuple(channels[start : start + 3]) for start in range(0, len(channels), 3)]
    lookup = np.zeros(256, np.uint8)
    unknown = []
    for value in np.flatnonzero(image.histogram()):
        colour = palette[value] if value < len(palette) else (int(value),) * 3
        if colour in COLOURS:
            lookup[value] = COLOURS.index(colour)
        else:
            unknown.append(colour)
    _refuse_colours(path, unknown)
    classes: NDArray[np.uint8] = lookup[np.asarray(image)]
    return classes


def _refuse_colours(path: Path, unknown: Sequence[tuple[int, ...]]) -> None:
    if unknown:
        listed = ", ".join(map(str, unknown[:5])) + (" …" if len(unknown) > 5 else "")
        raise MaskError(
            f"{path}: the mask has colours of no class: {listed}; known are {', '.join(map(str, COLOURS))} "
            f"for {', '.join(LABELS)}, and gray 0 to {len(LABELS) - 1}",
            reason="MASK_CLASS",
        )
