"""Windows: the squares of an image that a network sees, one at a time.

Every pixel of an image is in a window: where the stride does not divide the image, the last row and column
are moved inwards to its edge. FedDP takes windows of 1000 px every 500 px, resized to 224 px.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import JobError, MaskError

IGNORE = 255
"""A pixel of a mask that nobody annotated: no loss and no metric counts it."""


def window_grid(size_px: tuple[int, int], window_px: int, stride_px: int) -> list[tuple[int, int]]:
    """Return the upper left corners (x, y) of windows that cover an image, row by row.

    Args:
        size_px: (width, height) of the image.
        window_px: Side of a window.
        stride_px: From one window to the next; the last may be nearer to the one before it.

    Raises:
        MaskError: The image is smaller than a window (``IMAGE_TOO_SMALL``).
        JobError: The stride is not between 1 and ``window_px``, so that pixels would be left out.
    """
    if not 1 <= stride_px <= window_px:
        raise JobError(
            f"windows of {window_px} px can be 1 to {window_px} px apart, so that none is left out between "
            f"them, and not {stride_px}"
        )
    if min(size_px) < window_px:
        raise MaskError(too_small(size_px, window_px), reason="IMAGE_TOO_SMALL")
    columns, rows = (_starts(side, window_px, stride_px) for side in size_px)
    return [(x, y) for y in rows for x in columns]


def too_small(size_px: tuple[int, int], window_px: int) -> str:
    """Say that an image is smaller than a window."""
    return (
        f"an image of {size_px[0]} x {size_px[1]} px is smaller than the job's windows of {window_px} px: "
        "leave it out, or take a job with smaller windows"
    )


def read_window(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], xy: tuple[int, int], window_px: int, patch_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the window whose upper left corner is ``xy`` as the network sees it.

    Args:
        image: uint8 (h, w, 3).
        mask: uint8 (h, w).
        xy: (x, y) in pixels of the image.
        window_px: Side of the window in the image.
        patch_px: Side of the result.

    Returns:
        Image uint8 (patch_px, patch_px, 3), averaged where it shrinks, and mask uint8 (patch_px, patch_px),
        each pixel the class of the nearest. Without a change of size they share memory with what was given.
    """
    x, y = xy
    inside = (slice(y, y + window_px), slice(x, x + window_px))
    return resize_window(image[inside], patch_px), resize_mask(mask[inside], patch_px)


def resize_window(window: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Return a square uint8 (w, w, 3) as (patch_px, patch_px, 3): bilinear, averaged where it shrinks."""
    if window.shape[0] == patch_px:
        return window
    resized = Image.fromarray(window).resize((patch_px, patch_px), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Return a square uint8 (w, w) as (patch_px, patch_px): of each pixel's middle the class there."""
    window_px = mask.shape[0]
    if window_px == patch_px:
        return mask
    # the middle of pixel i lies at (i + 1/2) window/patch; whole numbers, so that no rounding decides
    nearest = (2 * np.arange(patch_px) + 1) * window_px // (2 * patch_px)
    resized: NDArray[np.uint8] = mask[nearest[:, None], nearest[None, :]]
    return resized


def _starts(side_px: int, window_px: int, stride_px: int) -> list[int]:
    """Return where windows begin along one side."""
    last = side_px - window_px
    starts = list(range(0, last + 1, stride_px))
    return starts if starts[-1] == last else [*starts, last]
