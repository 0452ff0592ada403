"""Pixels of a region of a slide's level, as OpenSlide gives them: RGBA, transparent outside the slide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
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
        return _rgb_array(image, _is_opaque(image))
    return _resample_rgb(_rgb_image(image, _is_opaque(image)), size_px, lv_per_px)


@dataclass(frozen=True)
class Block:
    """A piece of a thumbnail, with the pixels of the level that it is made of.

    Attributes:
        px_xy, size_px: (x, y) of its corner and (width, height), in pixels of the thumbnail.
        level, lv_per_px: The level, and how many of its pixels a pixel of the thumbnail spans along a side.
        lv_xy: (x, y) of the corner in pixels of the level.
        image: RGBA pixels of the level.
    """

    px_xy: tuple[int, int]
    size_px: tuple[int, int]
    level: int
    lv_per_px: float
    lv_xy: tuple[float, float]
    image: Image.Image

    @cached_property
    def _opaque(self) -> bool:
        return _is_opaque(self.image)

    @cached_property
    def _on_white(self) -> Image.Image:
        return _rgb_image(self.image, self._opaque)

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the thumbnail."""
        (x, y), (width, height) = self.px_xy, self.size_px
        return slice(y, y + height), slice(x, x + width)

    def pixels(self) -> NDArray[np.uint8]:
        """Return this piece of the thumbnail: uint8 (h, w, 3)."""
        if self.lv_per_px == 1.0:
            return _rgb_array(self.image, self._opaque)
        return _resample_rgb(self._on_white, self.size_px, self.lv_per_px)

    def averages(self, lv_per_px: int) -> NDArray[np.uint8]:
        """Return the averages of squares of ``lv_per_px`` pixels of the level: uint8 (h, w, 3)."""
        if lv_per_px == 1:
            return _rgb_array(self.image, self._opaque)
        return np.asarray(self._on_white.reduce(lv_per_px))

    def scanned(self) -> NDArray[np.bool_]:
        """Return which pixels (h, w) of :meth:`pixels` are not wholly transparent in the slide."""
        if self._opaque:
            return np.ones(self.size_px[::-1], np.bool_)
        return np.asarray(self.image.getchannel("A").resize(self.size_px, Image.Resampling.BOX)) > 0


def _resample_rgb(image: Image.Image, size_px: tuple[int, int], lv_per_px: float) -> NDArray[np.uint8]:
    if lv_per_px.is_integer():
        return np.asarray(image.reduce(int(lv_per_px)))
    box = (0.0, 0.0, size_px[0] * lv_per_px, size_px[1] * lv_per_px)
    return np.asarray(image.resize(size_px, Image.Resampling.BILINEAR, box=box))


def _is_opaque(image: Image.Image) -> bool:
    """Tell whether no pixel of an RGBA image is transparent; cheaper than looking at its alpha band."""
    pixels = np.asarray(image).view(np.uint32)
    return bool(np.bitwise_and.reduce(pixels, axis=None).tobytes()[3] == 255)


def _rgb_image(image: Image.Image, opaque: bool) -> Image.Image:
    """Return an RGBA image on white."""
    if opaque:
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _rgb_array(image: Image.Image, opaque: bool) -> NDArray[np.uint8]:
    """Return an RGBA image on white as an array (h, w, 3)."""
    if not opaque:
        return np.asarray(_rgb_image(image, opaque))
    packed = image.tobytes("raw", "RGB")  # a third of the time of convert and asarray
    return np.frombuffer(packed, np.uint8).reshape(image.height, image.width, 3)
