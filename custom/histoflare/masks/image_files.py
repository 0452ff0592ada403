"""Images and masks as files: what can be read, and one clear error for what cannot."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from histoflare.errors import MaskError
from histoflare.masks.windows import IGNORE

Kind = Literal["IMAGE", "MASK"]

COLOUR_MODES = {"RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "P", "PA"}
INDEX_MODES = {"1", "L", "P"}
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
    """Return a decoded image of its own mode; of several in one file the first.

    Raises:
        MaskError: It is damaged, of an unknown format, or of more pixels than Pillow takes for safe
            (``Image.MAX_IMAGE_PIXELS``, about 9,400 x 9,400), all ``…_UNREADABLE``.
    """
    reason = f"{kind}_UNREADABLE"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content)).verify()  # a PNG's checksums, and that it goes to its end
            image = Image.open(io.BytesIO(content))
        image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MaskError(
            f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels, too many for one image: cut it into "
            "several, or import the slide it comes from",
            reason=reason,
        ) from error
    except UnidentifiedImageError as error:
        raise MaskError(
            f"{path}: not an image that can be read (PNG, JPEG and TIFF can), or damaged", reason=reason
        ) from error
    # Pillow's decoders raise many kinds of errors on damaged files
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise MaskError(
            f"{path}: the {WORDS[kind]} is damaged ({error}): copy it again from its source, or leave it out",
            reason=reason,
        ) from error
    return image


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
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(image.convert("RGB"))


def decode_mask(content: bytes, path: Path, labels: Sequence[str]) -> NDArray[np.uint8]:
    """Return uint8 (h, w) of class indices and :data:`IGNORE`.

    Raises:
        MaskError: It cannot be read or holds colours (``MASK_UNREADABLE``), has an index that no label has
            (``MASK_CLASS``), or not one annotated pixel (``MASK_EMPTY``).
    """
    image = decode(content, path, "MASK")
    if image.mode not in INDEX_MODES:
        raise MaskError(
            f"{path}: not a mask of class indices (8-bit gray or palette) but of mode {image.mode}. "
            "'histoflare masks import' makes masks of other forms.",
            reason="MASK_UNREADABLE",
        )
    mask = np.asarray(image).astype(np.uint8, copy=False)
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
    image = decode(content, path, "MASK")
    if image.mode not in INDEX_MODES:
        raise MaskError(
            f"{path}: a tissue image is gray and above 0 where tissue is; this one's mode is {image.mode}",
            reason="MASK_UNREADABLE",
        )
    return np.asarray(image) > 0


def class_counts(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how many pixels of each of the 256 values there are, int64 (256,)."""
    return np.array(Image.fromarray(mask).histogram(), np.int64)  # no copy to wider numbers, as bincount


def content_hash(*contents: bytes | None) -> str:
    """Return one SHA-256 over several files' bytes; None for one that is not there."""
    digests = ["" if content is None else hashlib.sha256(content).hexdigest() for content in contents]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
