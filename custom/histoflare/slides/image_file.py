"""Images in ordinary files (PNG, JPEG, TIFF), opened in one place: decoded, checked, the right way up."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

REDUCED = 254, 1
"""TIFF 6.0, NewSubfileType: tag and bit of a smaller copy of another image in the file."""

DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)
"""What Pillow's decoders raise on damaged files."""


class UnreadableImageError(ValueError):
    """A file is no image that can be used; its text says why and what to do, and follows the file's name."""


def open_image(content: bytes, what: str = "image") -> Image.Image:
    """Return a decoded image of its own mode, turned as its EXIF orientation says: as every viewer shows it.

    Args:
        content: The file's bytes.
        what: The word for it in a message.

    Raises:
        UnreadableImageError: It is damaged, of an unknown format, of more pixels than Pillow takes for safe
            (``Image.MAX_IMAGE_PIXELS``, about 9,400 x 9,400), or a TIFF of several images of one size (the
            planes of a stack, or channels one by one).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content)).verify()  # a PNG's checksums, and that it goes to its end
            planes = _planes(Image.open(io.BytesIO(content)))
            image = Image.open(io.BytesIO(content))
        image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"has more than {Image.MAX_IMAGE_PIXELS} pixels, too many for one image: cut it into several, or "
            "import the slide it comes from"
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            "not an image that can be read (PNG, JPEG and TIFF can), or damaged"
        ) from error
    except DECODER_ERRORS as error:
        raise UnreadableImageError(
            f"the {what} is damaged ({error}): copy it again from its source, or leave it out"
        ) from error
    if planes > 1:
        raise UnreadableImageError(
            f"holds {planes} images of {image.width} x {image.height} px (planes of a stack, or channels one "
            "by one), and which to take is not clear: save one, in colour, as a file of its own"
        )
    with suppress(*DECODER_ERRORS):  # EXIF that cannot be read says nothing, as in every viewer
        ImageOps.exif_transpose(image, in_place=True)
    return image


def rgb_on_white(image: Image.Image) -> NDArray[np.uint8]:
    """Return the colours uint8 (h, w, 3) of an image; transparent parts are white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(image.convert("RGB"))


def _planes(image: Image.Image) -> int:
    """Return how many images of the first one's size a TIFF has, copies left out; 1 for other formats."""
    if image.format != "TIFF":
        return 1
    size, planes = image.size, 0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        kind = image.tag_v2.get(REDUCED[0], 0)  # type: ignore[attr-defined]
        planes += image.size == size and not (number and kind & REDUCED[1])
    return planes
