"""Where on a slide windows are read, where their answers lie in the mask, and which of them hold tissue.

Planes: ``l0_`` is a pixel of the slide's level 0; sizes and offsets without a plane are pixels of the mask,
whose corner is that of the grid's ``plane`` (the slide's bounds, or level 0).
A window of ``window_px`` at the model's mpp gives ``patch_px`` pixels of the mask, so one pixel of the mask
spans ``l0_per_px`` = (level-0 pixels per pixel at the model's mpp) · window_px / patch_px level-0 pixels.

Offsets of windows are whole pixels of the mask: the wanted stride is rounded down to one
(stride_px · patch_px / window_px, at least 1), and the last window of a row or column is moved inwards, so
that it ends with the slide instead of seeing what lies beyond. A window's corner on level 0 is rounded to a
whole pixel, each by itself: errors do not add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoflare.slides.planes import Plane, PlaneName, plane_of
from histoflare.slides.reader import Slide
from histoflare.slides.tissue import COARSEST_MASK_MPP, MASK_PX_PER_PATCH, find_tissue

MOST_STRIP_PX = 1 << 22
"""Pixels, at the model's mpp, of the largest strip of neighbouring windows read at once (3 bytes each)."""


@dataclass(frozen=True)
class SlideGrid:
    """The windows of a slide.

    Attributes:
        window_px, patch_px: Side of a window at ``mpp``, and of its answer in the mask.
        mpp: Resolution at which windows are read, µm/px.
        l0_per_px: Level-0 pixels that a pixel of the mask spans along a side.
        out_mpp: Resolution of the mask, µm/px.
        size_px: (width, height) of the mask; its last column and row may reach beyond the plane.
        xs, ys: Left and upper edges of the windows, ascending. In a plane smaller than a window the only
            one is 0, and the window reaches beyond it (a slide is white beyond its own edge).
        plane: The part of the slide that the mask covers.
    """

    window_px: int
    patch_px: int
    mpp: float
    l0_per_px: float
    out_mpp: float
    size_px: tuple[int, int]
    xs: tuple[int, ...]
    ys: tuple[int, ...]
    plane: Plane

    @property
    def l0_side(self) -> float:
        """Side of a window on level 0."""
        return self.patch_px * self.l0_per_px

    def l0_corner(self, x: int, y: int) -> tuple[int, int]:
        """Return the level-0 pixel nearest to the corner (x, y) of a pixel of the mask."""
        l0_x, l0_y = self.plane.l0_xy
        return l0_x + round(x * self.l0_per_px), l0_y + round(y * self.l0_per_px)

    def edges(self, offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Return the borders between the cells that ``offsets`` (``xs`` or ``ys``) cut the mask into.

        Cell i reaches from its window's edge to the next window's, the last to the end of its window: it is
        final when window i is done.
        """
        return (*offsets, offsets[-1] + self.patch_px)


def plan_grid(
    slide: Slide,
    *,
    window_px: int,
    stride_px: int,
    patch_px: int,
    mpp: float | None = None,
    plane: PlaneName = "bounds",
) -> SlideGrid:
    """Return the windows of ``slide``.

    Args:
        window_px, stride_px: Side and wanted distance of the windows at ``mpp``.
        patch_px: Side of a window's answer.
        mpp: Resolution of the windows in µm/px; None reads level 0 as it is.
        plane: The part of the slide to cover.

    Raises:
        SlideError: The slide has no mpp, or is too coarse (see :meth:`Slide.read`).
        ValueError: A side is not at least 1, or the stride leaves gaps.
    """
    if min(window_px, stride_px, patch_px) < 1 or stride_px > window_px:
        raise ValueError(f"no windows of {window_px} px every {stride_px} px, {patch_px} px out")
    mpp = slide.mpp if mpp is None else mpp
    l0_per_px = slide.l0_per_px(mpp) * window_px / patch_px
    covered = plane_of(slide.info, plane)
    width, height = (max(1, math.ceil(side / l0_per_px - 1e-6)) for side in covered.l0_size_px)
    stride = max(1, stride_px * patch_px // window_px)
    return SlideGrid(
        window_px=window_px,
        patch_px=patch_px,
        mpp=mpp,
        l0_per_px=l0_per_px,
        out_mpp=l0_per_px * slide.mpp,
        size_px=(width, height),
        xs=_offsets(width, patch_px, stride),
        ys=_offsets(height, patch_px, stride),
        plane=covered,
    )


def _offsets(length: int, side: int, stride: int) -> tuple[int, ...]:
    return (*range(0, length - side, stride), length - side) if length > side else (0,)


def read_windows(slide: Slide, grid: SlideGrid, row: int, columns: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the windows uint8 (b, window_px, window_px, 3) of ``columns`` (ascending) in a row.

    Overlapping neighbours are read together and cut apart, which spares decoding what they share twice.

    Raises:
        SlideError: What :meth:`Slide.read` raises.
    """
    side = grid.window_px
    windows = np.empty((len(columns), side, side, 3), np.uint8)
    start = 0
    while start < len(columns):
        x = grid.xs[columns[start]]
        places = [0]  # of the strip's windows, in its pixels
        for column in columns[start + 1 :]:
            place, rest = divmod((grid.xs[column] - x) * side, grid.patch_px)
            if rest or place > places[-1] + side or (place + side) * side > MOST_STRIP_PX:
                break
            places.append(place)
        strip = slide.read(grid.l0_corner(x, grid.ys[row]), (places[-1] + side, side), grid.mpp)
        for index, place in enumerate(places, start):
            windows[index] = strip[:, place : place + side]
        start += len(places)
    return windows


class TissueMap:
    """A slide's tissue, asked for by window and by pixel of the mask. What touches tissue counts as tissue.

    The mask of the tissue is kept at a bit for 8 x 8 µm (or a level-0 pixel, if that is coarser): 2 MB for
    three by three centimetres.

    Raises:
        SlideError: There is none, or the background is dark (see :func:`find_tissue`).
    """

    def __init__(self, slide: Slide, grid: SlideGrid) -> None:
        self._grid = grid
        tissue = find_tissue(slide, um_patch=COARSEST_MASK_MPP * MASK_PX_PER_PATCH)
        self._l0_per_cell = tissue.l0_per_px
        self._shape = tissue.mask.shape
        self._bits = np.packbits(tissue.mask, axis=1)

    def columns(self, row: int) -> NDArray[np.int64]:
        """Return which windows of ``row`` hold any tissue, ascending."""
        grid, step = self._grid, self._l0_per_cell
        # windows are read up to half a level-0 pixel beside their place
        l0_x, l0_y = grid.plane.l0_xy
        low_y, high_y = _span(l0_y + grid.ys[row] * grid.l0_per_px - 0.5, grid.l0_side + 1, step)
        bits = np.bitwise_or.reduce(self._bits[low_y:high_y], axis=0)
        found = np.unpackbits(bits, count=self._shape[1])
        total = np.concatenate([[0], found.cumsum(dtype=np.int64)])
        spans = [_span(l0_x + x * grid.l0_per_px - 0.5, grid.l0_side + 1, step) for x in grid.xs]
        low, high = np.minimum(np.array(spans), len(found)).T
        return np.flatnonzero(total[high] > total[low])

    def pixels(self, x: int, y: int, width: int, height: int) -> NDArray[np.bool_]:
        """Return which pixels of a block of the mask hold any tissue: bool (height, width)."""
        (low_y, high_y), (low_x, high_x) = self._cells(y, height, 0), self._cells(x, width, 1)
        first_byte, last_byte = low_x[0] // 8, high_x[-1] // 8
        bits = self._bits[low_y[0] : high_y[-1] + 1, first_byte : last_byte + 1]
        cells = np.unpackbits(bits, axis=1).view(np.bool_)
        part = cells[:, low_x[0] - 8 * first_byte : high_x[-1] + 1 - 8 * first_byte]
        return _any(_any(part, low_y, high_y, 0), low_x, high_x, 1)

    def _cells(self, first: int, count: int, axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first and the last cell of the tissue's mask that each of ``count`` pixels touches.

        For a pixel beside the slide (bounds may reach beyond it) these are the cells at the slide's edge.
        """
        grid, last = self._grid, self._shape[axis] - 1
        l0_places = grid.plane.l0_xy[1 - axis] + np.arange(first, first + count + 1) * grid.l0_per_px
        places = np.round(l0_places / self._l0_per_cell, 9)
        low = np.clip(np.floor(places[:-1]).astype(np.int64), 0, last)
        high = np.minimum(np.ceil(places[1:]).astype(np.int64) - 1, last)
        return low, np.maximum(high, low)


def _any(
    part: NDArray[np.bool_], low: NDArray[np.int64], high: NDArray[np.int64], axis: int
) -> NDArray[np.bool_]:
    """Return whether anything holds from ``low`` to ``high``; ``part`` begins at the first ``low``."""
    # reduceat ends where the next pixel begins; the cell that both touch is added
    begun = np.logical_or.reduceat(part, low - low[0], axis=axis)
    found: NDArray[np.bool_] = begun | part.take(high - low[0], axis=axis)
    return found


def _span(start: float, length: float, step: float) -> tuple[int, int]:
    """Return which cells of size ``step`` the stretch touches: the first, and the one after the last."""
    low = max(0, math.floor(round(start / step, 9)))
    return low, max(low, math.ceil(round((start + length) / step, 9)))
