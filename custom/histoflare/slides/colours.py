"""Mean colours of patches: summed up from what is read of the slide anyway, or read for the patches.

A patch's colour is the mean over its pixels as :meth:`Slide.read` returns them; both ways give the same
bytes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from histoflare.slides.pixels import Block
from histoflare.slides.reader import Slide
from histoflare.slides.resolution import choose_level

BLOCK_PX = 1024
"""Side of the blocks in which patches are read, at the resolution of the colours."""

SUMS_BYTES = 1 << 26
"""Of the sums of a grid. A grid of more patches is not summed up; its candidates are read."""


def patch_side_px(slide: Slide, l0_patch_px: int, mpp: float) -> int:
    """Return the side of a patch in pixels at ``mpp``."""
    return max(1, round(l0_patch_px / slide.l0_per_px(mpp)))


class GridColours:
    """Colours of all patches of a grid, from the blocks of a thumbnail; blocks may come from several threads.

    The grid begins at the slide's corner. Sums can only be had where the blocks are of the level that the
    colours are read from, and where patches and blocks are made of whole averages of that level's pixels:
    otherwise a pixel is blended from others than if the patch were read on its own.

    Args:
        slide: The slide.
        l0_patch_px: Side of a patch, and of the grid's squares, in level-0 pixels.
        mpp: Resolution of the colours in µm/px.
    """

    def __init__(self, slide: Slide, l0_patch_px: int, mpp: float) -> None:
        self._l0_patch_px = l0_patch_px
        self._level, lv_per_px = choose_level(slide.info, slide.mpp, mpp)
        self._lv_per_px = int(lv_per_px)
        self._side_px = patch_side_px(slide, l0_patch_px, mpp)
        level = slide.info.levels[self._level]
        columns, rows = (side // l0_patch_px for side in slide.info.l0_size_px)
        lv_patch_px = self._side_px * lv_per_px
        self._possible = (
            lv_per_px.is_integer()
            and l0_patch_px == lv_patch_px * level.downsample
            and columns * lv_patch_px <= level.lv_size_px[0]
            and rows * lv_patch_px <= level.lv_size_px[1]
            and columns * rows * 3 * np.int64().nbytes <= SUMS_BYTES
        )
        self._sums = np.zeros((rows, columns, 3) if self._possible else (0, 0, 3), np.int64)
        self._pixels = 0
        self._adding = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every pixel of every patch has been added."""
        rows, columns, _ = self._sums.shape
        return self._possible and self._pixels == rows * columns * self._side_px**2

    def add(self, block: Block) -> None:
        """Add the block's pixels to the patches they belong to, if they are what a patch is made of."""
        places = [each / self._lv_per_px for each in block.lv_xy] if self._possible else []
        if block.level != self._level or not places or any(each % 1 for each in places):
            return
        pixels = block.averages(self._lv_per_px)
        (height, width), (grid_rows, grid_columns) = pixels.shape[:2], self._sums.shape[:2]
        x, columns, starts_x = self._share(int(places[0]), width, grid_columns)
        y, rows, starts_y = self._share(int(places[1]), height, grid_rows)
        if not len(starts_x) or not len(starts_y):
            return
        # rows first, as one long row of numbers each: by far the larger part of the additions
        flat = pixels.reshape(height, width * 3)[:rows]
        small = np.min_scalar_type(255 * self._side_px)  # holds a patch's column of bytes; fastest if narrow
        ends_y = [*starts_y[1:], rows]
        parts = [flat[top:end].sum(0, small) for top, end in zip(starts_y, ends_y, strict=True)]
        by_row = np.stack(parts).reshape(-1, width, 3)
        sums = np.add.reduceat(by_row[:, :columns], starts_x, axis=1, dtype=np.int64)
        with self._adding:
            self._sums[y : y + len(starts_y), x : x + len(starts_x)] += sums
            self._pixels += rows * columns

    def _share(self, start: int, length: int, patches: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return which patches ``length`` pixels from ``start`` on belong to, along a side.

        Returns:
            The first patch, how many of the pixels lie in the grid, and where among these each patch begins.
        """
        side = self._side_px
        inside = max(0, min(length, patches * side - start))
        first = start // side
        starts = np.arange(first, -(-(start + inside) // side)) * side - start if inside else np.zeros(0)
        return first, inside, np.maximum(starts, 0).astype(np.int64)

    def means(self, l0_xy: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the mean RGB (n, 3), in 0 .. 255, of the patches with corners ``l0_xy`` (n, 2)."""
        column, row = (l0_xy // self._l0_patch_px).T
        means: NDArray[np.float64] = self._sums[row, column] / self._side_px**2
        return means


def read_mean_colours(
    slide: Slide, l0_patch_px: int, mpp: float, l0_xy: NDArray[np.int64], threads: int
) -> NDArray[np.float64]:
    """Return the mean RGB (n, 3), in 0 .. 255, of the patches with corners ``l0_xy`` (n, 2), at ``mpp``.

    Neighbours are read together, block by block: a tile of the file is decoded once for all patches on it.
    """
    side_px = patch_side_px(slide, l0_patch_px, mpp)
    blocks: dict[tuple[int, int], list[int]] = {}
    per_block = max(1, BLOCK_PX // side_px)  # patches along a side
    for index, (column, row) in enumerate((l0_xy // (l0_patch_px * per_block)).tolist()):
        blocks.setdefault((row, column), []).append(index)
    colours = np.empty((len(l0_xy), 3))

    def read_block(indices: list[int]) -> None:
        corners = [(int(x), int(y)) for x, y in l0_xy[indices]]
        for index, pixels in zip(indices, slide.read_each(corners, (side_px, side_px), mpp), strict=True):
            colours[index] = pixels.reshape(-1, 3).mean(axis=0)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(read_block, blocks.values()))
    return colours
