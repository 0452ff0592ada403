"""What a segmentation has on disk while it runs: ``<out>.partial/``.

``identity.json``
    What the result depends on. A folder of another slide, model or setting is not continued.
``row-000012.cells``
    The finished cells of a row of windows: deflated class indices, then where each cell begins (uint64), then
    how many pixels of tissue each class has (uint64). A cell without tissue takes no byte.
``carry-000013.sums``
    What the rows before have added to the cells of row 13 and below (float32), needed to go on with row 13.
``.lock``
    Held by the process that writes here; the system takes it back however that ends.

A row's carry is written before its cells, each whole or not at all: row n is done when its cells are there.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.slides.mask_pyramid import paste
from histoflare.storage import lock_file, make_folder, remove_partials, write_json

SUFFIX = ".partial"
IDENTITY, LOCK = "identity.json", ".lock"
DEFLATE_LEVEL = 1
CACHE_BYTES = 1 << 24


def scratch_folder(out: Path) -> Path:
    """Return the folder for the segmentation that is to become ``out``."""
    return out.with_name(out.name + SUFFIX)


@contextmanager
def scratch_for(out: Path, identity: Mapping[str, Any], *, again: bool = False) -> Iterator[Path]:
    """Yield the scratch folder of ``out``, locked; remove it if the block ends well, else leave it.

    Args:
        identity: What the result depends on, plain JSON.
        again: Forget what an earlier run left.

    Raises:
        MaskError: Another process is at it (SEGMENTATION_BUSY), or the folder is of another slide, model or
            setting (SEGMENTATION_CHANGED).
    """
    folder = scratch_folder(out)
    make_folder(folder)
    busy = MaskError(
        f"{folder}: another histoflare is making {out.name}; wait until it is done.",
        reason="SEGMENTATION_BUSY",
    )
    with lock_file(folder / LOCK, busy):
        if again:
            _empty(folder)
        _check_identity(folder, out, identity)
        remove_partials(folder)
        yield folder
        shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()


def _check_identity(folder: Path, out: Path, identity: Mapping[str, Any]) -> None:
    path = folder / IDENTITY
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        _empty(folder)
        write_json(path, dict(identity))
        return
    except (OSError, ValueError):
        found = None
    wanted = json.loads(json.dumps(dict(identity)))
    if found == wanted:
        return
    changed = ", ".join(
        name for name in sorted(wanted) if not isinstance(found, dict) or found.get(name) != wanted[name]
    )
    raise MaskError(
        f"{folder}: holds an unfinished {out.name} of something else (other {changed or 'settings'}). Run "
        "that command again to finish it, or begin anew: delete the folder, or use --again.",
        reason="SEGMENTATION_CHANGED",
    )


def rows_done(folder: Path) -> int:
    """Return how many rows of windows, from the top, are finished."""
    row = 0
    while row_path(folder, row).exists():
        row += 1
    return row


def row_path(folder: Path, row: int) -> Path:
    """Return the file of the finished cells of ``row``."""
    return folder / f"row-{row:06d}.cells"


def carry_path(folder: Path, row: int) -> Path:
    """Return the file of what the rows before have added to ``row``."""
    return folder / f"carry-{row:06d}.sums"


class RowWriter:
    """Writes the cells of a row from left to right, into a file that is open for writing."""

    def __init__(self, file: BinaryIO, classes: int) -> None:
        self._file = file
        self._starts = [0]
        self._tissue_px = np.zeros(classes, np.uint64)

    def add(self, cell: NDArray[np.uint8] | None, tissue_px: NDArray[np.integer] | None = None) -> None:
        """Write the next cell (None: it has no tissue), and count its pixels of tissue by class (k,)."""
        content = b"" if cell is None else zlib.compress(cell.tobytes(), DEFLATE_LEVEL)
        self._file.write(content)
        self._starts.append(self._starts[-1] + len(content))
        if tissue_px is not None:
            self._tissue_px += tissue_px.astype(np.uint64)

    def finish(self) -> None:
        """Write the tables at the end."""
        self._file.write(np.array(self._starts, np.uint64).tobytes() + self._tissue_px.tobytes())


class CellStore:
    """The finished rows of a segmentation as one image, read block by block.

    Args:
        folder: The scratch folder.
        column_edges, row_edges: Borders of the cells in pixels of the mask, from 0 on.
        size_px: (width, height) of the mask; cells end with it.
        classes: Number of classes k.
        outside: Value where there is no tissue.
    """

    def __init__(
        self,
        folder: Path,
        column_edges: Sequence[int],
        row_edges: Sequence[int],
        size_px: tuple[int, int],
        classes: int,
        outside: int,
    ) -> None:
        self._folder, self._classes, self._outside = folder, classes, outside
        self._xs = [min(edge, size_px[0]) for edge in column_edges]
        self._ys = [min(edge, size_px[1]) for edge in row_edges]
        largest = max(np.diff(self._xs).max() * np.diff(self._ys).max(), 1)
        self._starts = lru_cache(maxsize=64)(self._read_starts)
        self._cell = lru_cache(maxsize=max(16, CACHE_BYTES // int(largest)))(self._read_cell)

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return the classes uint8 (height, width) of a block that lies in the mask."""
        block = np.full((height, width), self._outside, np.uint8)
        row = bisect_right(self._ys, y) - 1
        while row < len(self._ys) - 1 and self._ys[row] < y + height:
            column = bisect_right(self._xs, x) - 1
            while column < len(self._xs) - 1 and self._xs[column] < x + width:
                cell = self._cell(row, column)
                if cell is not None:
                    paste(block, (x, y), cell, (self._xs[column], self._ys[row]))
                column += 1
            row += 1
        return block

    def tissue_px(self) -> NDArray[np.uint64]:
        """Return how many pixels of tissue each class has (k,)."""
        total = np.zeros(self._classes, np.uint64)
        for row in range(len(self._ys) - 1):
            with row_path(self._folder, row).open("rb") as file:
                file.seek(-8 * self._classes, os.SEEK_END)
                total += np.frombuffer(file.read(), np.uint64)
        return total

    def _read_starts(self, row: int) -> NDArray[np.uint64]:
        with row_path(self._folder, row).open("rb") as file:
            file.seek(-8 * (self._classes + len(self._xs)), os.SEEK_END)
            return np.frombuffer(file.read(8 * len(self._xs)), np.uint64)

    def _read_cell(self, row: int, column: int) -> NDArray[np.uint8] | None:
        start, end = (int(each) for each in self._starts(row)[column : column + 2])
        if start == end:
            return None
        with row_path(self._folder, row).open("rb") as file:
            file.seek(start)
            content = zlib.decompress(file.read(end - start))
        shape = (self._ys[row + 1] - self._ys[row], self._xs[column + 1] - self._xs[column])
        return np.frombuffer(content, np.uint8).reshape(shape)
