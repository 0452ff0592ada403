"""Images and masks as files: what can be read, and one clear error for what cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import MaskError
from histoflare.masks.windows import IGNORE
from histoflare.slides.image_file import UnreadableImageError, open_image, rgb_on_white

Kind = Literal["IMAGE", "MASK"]

COLOUR_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "P", "PA"}
INDEX_MODES = {"1", "L", "P"}
IGNORED_COLOUR = (128, 128, 128)
"""Of :data:`IGNORE` in the palette of a mask that an importer made."""
WORDS: dict[Kind, str] = {"IMAGE": "image", "MASK": "mask"}


def read_file(path: Path, kind: Kind) -> bytes:
    """Return the file's bytes.

    Raises:
        MaskError: It is not there (``IMAGE_MISSING``, ``MASK_MISSING``) or cannot be read
            (``…_UNREADABLE``).
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MaskError(f"{path}: no such {WORDS[kind]}", reason=f"{kind}_MISSING") from error
    except (OSError, ValueError) as error:  # ValueError: a character that no path can have
        what = getattr(error, "strerror", None) or error
        raise MaskError(f"{path}: cannot be read ({what})", reason=f"{kind}_UNREADABLE") from error


def decode(content: bytes, path: Path, kind: Kind) -> Image.Image:
    """Return a decoded image of its own mode, the right way up (``slides.image_file``).

    Raises:
        MaskError: As :func:`open_image`, all ``…_UNREADABLE``.
    """
    try:
        return open_image(content, WORDS[kind])
    except UnreadableImageError as error:
        raise MaskError(f"{path}: {error}", reason=f"{kind}_UNREADABLE") from error


def decode_image(content: bytes, path: Path) -> NDArray[np.uint8]:
    """Return uint8 (h, w, 3); transparent parts are white.

    Raises:
        MaskError: ``IMAGE_UNREADABLE``.
    """
    image = decode(content, path, "IMAGE")
    if image.mode not in COLOUR_MODES:
        raise MaskError(
            f"{path}: not a colour image of 8 bits a channel (its mode is {image.mode}). Is it a mask?",
            reason="IMAGE_UNREADABLE",
        )
    return rgb_on_white(image)


def decode_mask(content: bytes, path: Path, labels: Sequence[str]) -> NDArray[np.uint8]:
    """Return uint8 (h, w) of class indices and :data:`IGNORE`.

    Raises:
        MaskError: It cannot be read or holds colours (``MASK_UNREADABLE``), has an index that no label has
            (``MASK_CLASS``), or not one annotated pixel (``MASK_EMPTY``).
    """
    mask = _values(decode(content, path, "MASK"), path, "a mask of class indices (8-bit gray or palette)")
    counts = class_counts(mask)
    unknown = [index for index in np.flatnonzero(counts) if index >= len(labels) and index != IGNORE]
    if unknown:
        listed = ", ".join(str(index) for index in unknown[:5])
        raise MaskError(
            f"{path}: class index {listed}{' …' if len(unknown) > 5 else ''} in the mask; the job has "
            f"{len(labels)} labels: 0 to {len(labels) - 1}, and {IGNORE} where nothing is annotated",
            reason="MASK_CLASS",
        )
    if counts[IGNORE] == mask.size:
        raise MaskError(
            f"{path}: not one pixel of the mask is annotated (all are {IGNORE}): leave the image out",
            reason="MASK_EMPTY",
        )
    return mask


def decode_tissue(content: bytes, path: Path) -> NDArray[np.bool_]:
    """Return bool (h, w), true where the image is above 0.

    Raises:
        MaskError: ``MASK_UNREADABLE``.
    """
    return _values(decode(content, path, "MASK"), path, "a tissue image (gray, above 0 where tissue is)") > 0


def is_binary(path: Path, counts: NDArray[np.int64]) -> bool:
    """Tell whether a mask whose values have these ``counts`` looks like a binary one: of 0 and 255 alone.

    A palette in which 255 has the colour of what is not annotated says that it is none: the importers' own.
    """
    if not counts[0] or not counts[IGNORE] or counts.sum() != counts[0] + counts[IGNORE]:
        return False
    palette = decode(read_file(path, "MASK"), path, "MASK").getpalette("RGB") or []
    return tuple(palette[3 * IGNORE : 3 * IGNORE + 3]) != IGNORED_COLOUR


def _values(image: Image.Image, path: Path, wanted: str) -> NDArray[np.uint8]:
    """Return the values uint8 (h, w) of an image with one value a pixel, whatever the format it was saved in.

    Wider numbers are taken if all fit into 8 bits, colours if they are grays, an alpha if it is opaque.
    """
    pixels = np.asarray(image)
    fault = f"of mode {image.mode}"
    if image.mode in ("LA", "RGB", "RGBA", "RGBX"):
        bands = np.moveaxis(pixels, 2, 0)
        if "A" in image.mode and (bands[-1] != 255).any():
            fault += ", partly transparent"
        elif (bands[: len(image.mode.rstrip("AX"))] == bands[0]).all():
            return np.ascontiguousarray(bands[0])
        else:
            fault += ", in colours"
    elif image.mode in INDEX_MODES:
        return pixels.astype(np.uint8, copy=False)
    elif image.mode.startswith("I"):
        if pixels.min() >= 0 and pixels.max() <= 255:
            return pixels.astype(np.uint8)
        fault += f", with numbers up to {pixels.max()}: perhaps one for each object"
    raise MaskError(
        f"{path}: not {wanted} but {fault}. 'histoflare masks import' makes masks of other forms.",
        reason="MASK_UNREADABLE",
    )


def class_counts(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how many pixels of each of the 256 values there are, int64 (256,)."""
    return np.array(Image.fromarray(mask).histogram(), np.int64)  # no copy to wider numbers, as bincount


def content_hash(*contents: bytes | None) -> str:
    """Return one SHA-256 over several files' bytes; None for one that is not there."""
    digests = ["" if content is None else hashlib.sha256(content).hexdigest() for content in contents]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
