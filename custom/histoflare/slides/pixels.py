"""Pixels of a region of a slide's level, as OpenSlide gives them: RGBA, transparent outside the slide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.slides.resolution import LevelInfo


@dataclass(frozen=True)
class Edges:
    """Where along a side a region of a level crosses the slide's edge, in pixels of the region.

    ``low`` to ``high`` lie in the slide; the pixels of the result that are made of any of these take up
    ``first`` to ``last``. ``low`` = ``high`` where nothing lies in the slide.
    """

    low: int
    high: int
    first: int
    last: int
    inside: bool

    @classmethod
    def of(cls, lv_start: float, count: int, lv_end: int, lv_per_px: float) -> Self:
        """Return the edges of ``count`` pixels from ``lv_start`` on, on a level of ``lv_end`` pixels."""
        if lv_start >= -1e-6 and lv_start + count <= lv_end + 1e-6:
            return cls(0, count, 0, count, True)

        def within(place: float) -> int:
            return min(max(math.floor(place), 0), count)

        # a pixel that the edge cuts is taken as it is only if there is no whole one
        low, high = within(1 - 1e-6 - lv_start), within(lv_end - lv_start + 1e-6)
        if low >= high:
            low, high = within(-lv_start), within(lv_end - lv_start + 1 - 1e-6)
        first = within(math.floor(low / lv_per_px + 1e-6) * lv_per_px)
        last = within(math.ceil(high / lv_per_px - 1e-6) * lv_per_px + 1 - 1e-6)
        return cls(low, high, first, last, False)


def extend_edges(
    image: Image.Image, l0_xy: tuple[int, int], level: LevelInfo, lv_per_px: float
) -> Image.Image:
    """Return an RGBA image with the slide's edge repeated into the pixels that lie partly outside.

    Args:
        image: Of a level.
        l0_xy: Its upper left corner (x, y) in level-0 pixels.
        level: The level.
        lv_per_px: Pixels of the level that a pixel of the result is made of, along a side.
    """
    columns, rows = (
        Edges.of(corner / level.downsample, count, end, lv_per_px)
        for corner, count, end in zip(l0_xy, image.size, level.lv_size_px, strict=True)
    )
    if columns.inside and rows.inside:
        return image
    if columns.low >= columns.high or rows.low >= rows.high:
        return image
    pixels = np.asarray(image).copy()  # (h, w, 4)
    for start, stop, edge in (
        (columns.first, columns.low, columns.low),
        (columns.high, columns.last, columns.high - 1),
    ):
        pixels[:, start:stop] = pixels[:, edge : edge + 1]
    for start, stop, edge in ((rows.first, rows.low, rows.low), (rows.high, rows.last, rows.high - 1)):
        pixels[start:stop] = pixels[edge : edge + 1]
    return Image.fromarray(pixels)


def resample(image: Image.Image, size_px: tuple[int, int], lv_per_px: float) -> NDArray[np.uint8]:
    """Return an RGBA image of a level on white, at ``size_px`` (width, height): uint8 (h, w, 3)."""
    if lv_per_px == 1.0:
        return _rgb_array(image)
    if lv_per_px.is_integer():
        return np.asarray(_rgb_image(image).reduce(int(lv_per_px)))
    box = (0.0, 0.0, size_px[0] * lv_per_px, size_px[1] * lv_per_px)
    return np.asarray(_rgb_image(image).resize(size_px, Image.Resampling.BILINEAR, box=box))


def scanned_pixels(image: Image.Image, size_px: tuple[int, int]) -> NDArray[np.bool_] | bool:
    """Return which pixels (h, w) of the result are not wholly transparent in an RGBA image of a level."""
    if _is_opaque(image):
        return True
    return np.asarray(image.getchannel("A").resize(size_px, Image.Resampling.BOX)) > 0


def _is_opaque(image: Image.Image) -> bool:
    """Tell whether no pixel of an RGBA image is transparent; cheaper than looking at its alpha band."""
    pixels = np.asarray(image).view(np.uint32)
    return bool(np.bitwise_and.reduce(pixels, axis=None).tobytes()[3] == 255)


def _rgb_image(image: Image.Image) -> Image.Image:
    """Return an RGBA image on white."""
    if _is_opaque(image):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _rgb_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return an RGBA image on white as an array (h, w, 3)."""
    if not _is_opaque(image):
        return np.asarray(_rgb_image(image))
    packed = image.tobytes("raw", "RGB")  # a third of the time of convert and asarray
    return np.frombuffer(packed, np.uint8).reshape(image.height, image.width, 3)
