"""Overlapping windows become one mask, row of windows by row, in memory that does not depend on the slide.

Every window adds its class probabilities, times a weight that is largest in its middle and nowhere 0, to
sums (k classes); the class of a pixel is the one with the largest sum. Dividing by the sum of the weights
would change no maximum, so it is left out.

The windows' edges cut the mask into cells (see :meth:`SlideGrid.edges`). When the windows of a row are added
from left to right, cell after cell is final along the row; what is below the next row's edge goes to disk,
to be read, cell after cell, with the next row. Memory holds the sums of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from histoflare.masks.mask_scratch import RowWriter, carry_path, row_path
from histoflare.masks.slide_grid import SlideGrid, TissueMap
from histoflare.storage import atomic_path

ABSENT, PRESENT = b"\0", b"\1"


class Stitcher:
    """Takes windows in order, row after row, and leaves finished rows in the scratch folder.

    Args:
        grid: The windows.
        tissue: Where pixels get a class.
        classes: Number of classes k.
        outside: Value of the pixels without tissue.
        weight: Weight of a window's pixels, float32 (p, p), > 0.
        folder: The scratch folder.
    """

    def __init__(
        self,
        grid: SlideGrid,
        tissue: TissueMap,
        classes: int,
        outside: int,
        weight: NDArray[np.float32],
        folder: Path,
    ) -> None:
        self._grid, self._tissue, self._classes, self._outside = grid, tissue, classes, outside
        self._weight, self._folder = weight, folder
        self._edges_x, self._edges_y = grid.edges(grid.xs), grid.edges(grid.ys)
        side = grid.patch_px
        self._sums = np.zeros((classes, side, side), np.float32)  # of the windows so far, from _column's edge
        self._column = 0  # first cell of the row that is not final
        self._reached = 0  # where the last window that was added ends
        self._open = ExitStack()
        self._carried: BinaryIO | None = None
        self._carry: BinaryIO | None = None
        self._cells: RowWriter | None = None

    def add(
        self, row: int, columns: Sequence[int], probabilities: NDArray[np.float32] | None, *, last: bool
    ) -> None:
        """Add the next windows of ``row``.

        Args:
            columns: Which they are, ascending and beyond those added before.
            probabilities: Theirs (b, k, p, p); None if there are none.
            last: Whether the row has no more; it is then finished and on disk.
        """
        if self._cells is None:
            self._begin(row)
        for index, column in enumerate(columns):
            self._flush(row, column)
            assert probabilities is not None
            self._sums += probabilities[index] * self._weight
            self._reached = self._grid.xs[column] + self._grid.patch_px
        if last:
            self._flush(row, len(self._grid.xs))
            self._end(row)

    def abandon(self) -> None:
        """Drop the row that is not finished."""
        self._open.pop_all().__exit__(InterruptedError, InterruptedError(), None)

    def _begin(self, row: int) -> None:
        """Open the files of ``row``. What is opened last is complete first: the carry, then the cells."""
        cells = self._open.enter_context(atomic_path(row_path(self._folder, row)))
        self._cells = RowWriter(self._open.enter_context(cells.open("wb")), self._classes)
        if row + 1 < len(self._grid.ys):
            carry = self._open.enter_context(atomic_path(carry_path(self._folder, row + 1)))
            self._carry = self._open.enter_context(carry.open("wb"))
        if row > 0:
            self._carried = self._open.enter_context(carry_path(self._folder, row).open("rb"))
        self._column = self._reached = 0
        self._sums[:] = 0

    def _end(self, row: int) -> None:
        assert self._cells is not None
        self._cells.finish()
        self._open.close()
        self._cells = self._carry = self._carried = None
        carry_path(self._folder, row).unlink(missing_ok=True)

    def _flush(self, row: int, column: int) -> None:
        """Finish the cells before ``column``, and move the sums so that they begin with it."""
        while self._column < column:
            left, right = self._edges_x[self._column : self._column + 2]
            sums = self._sums[:, :, : right - left] if self._reached > left else None
            self._finish_cell(row, left, self._add_carried(row, sums, right - left))
            if sums is not None:
                kept = self._grid.patch_px - (right - left)
                self._sums[:, :, :kept] = self._sums[:, :, right - left :]
                self._sums[:, :, kept:] = 0
            self._column += 1

    def _add_carried(
        self, row: int, sums: NDArray[np.float32] | None, width: int
    ) -> NDArray[np.float32] | None:
        """Return a cell's sums (k, p, width) with what the rows before added; None if nobody did."""
        if self._carried is None or self._carried.read(1) != PRESENT:
            return sums
        height = self._edges_y[row - 1] + self._grid.patch_px - self._edges_y[row]
        shape = (self._classes, height, width)
        carried = np.frombuffer(self._carried.read(4 * self._classes * height * width), np.float32)
        if sums is None:
            sums = np.zeros((self._classes, self._grid.patch_px, width), np.float32)
        sums[:, :height] += carried.reshape(shape)
        return sums

    def _finish_cell(self, row: int, left: int, sums: NDArray[np.float32] | None) -> None:
        """Write a cell's classes, and for the next row what lies below its edge."""
        assert self._cells is not None
        height = self._edges_y[row + 1] - self._edges_y[row]
        if self._carry is not None:
            below = None if sums is None else np.ascontiguousarray(sums[:, height:])
            if below is not None and below.any():  # weights and probabilities are above 0 where a window was
                self._carry.write(PRESENT)
                self._carry.write(below.data)
            else:
                self._carry.write(ABSENT)
        if sums is None:
            self._cells.add(None)
            return
        top = self._edges_y[row]
        width_px, height_px = self._grid.size_px
        # a window larger than the slide reaches beyond it
        shown = sums[:, : min(height, height_px - top), : min(sums.shape[2], width_px - left)]
        inside = self._tissue.pixels(left, top, shown.shape[2], shown.shape[1])
        if not inside.any():
            self._cells.add(None)
            return
        classes = shown.argmax(axis=0).astype(np.uint8)
        counts = np.bincount(classes[inside], minlength=self._classes)
        self._cells.add(np.where(inside, classes, np.uint8(self._outside)), counts)
