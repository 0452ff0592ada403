"""Tiled pyramidal TIFF of class indices or levels: one 8-bit channel, lossless, read by OpenSlide.

What OpenSlide and others read back at level 0 is what was given, value for value: tiles are deflate, and a
grey image shows value v as the colour (v, v, v). With ``colours`` the same values are stored with a palette,
and OpenSlide shows the palette's colours instead. The levels below are made of the most frequent value in 2x2
pixels; class indices are never averaged.

The file says in its image description, as JSON, in which plane of the slide it lies (``slides.planes``).

Neither the image nor a level is held in memory: level 0 is asked for tile by tile, and what the levels below
need waits on disk, compressed. The same pixels in the same plane give the same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from histoflare.errors import SlideError
from histoflare.slides.planes import Plane
from histoflare.slides.pyramid import MAX_PLAUSIBLE_MPP, SUBFILE_REDUCED, UM_PER_CM, level_count
from histoflare.storage import atomic_path

TILE_PX = 256
DEFLATE_LEVEL = 6
SPILL_LEVEL = 1
ADOBE_DEFLATE = 8  # the TIFF tag of zlib streams
CLASSIC_TIFF_PX = 2**31  # deflate never takes more than a little over a byte per pixel; classic ends at 4 GiB

ReadBlock = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``(x, y, width, height)`` of a block that lies in the image, to its pixels uint8 (height, width)."""


def write_mask_pyramid(
    path: Path,
    read_block: ReadBlock,
    size_px: tuple[int, int],
    mpp: float,
    *,
    plane: Plane,
    scratch: Path,
    colours: NDArray[np.uint8] | None = None,
) -> None:
    """Write an image of 8-bit values as a pyramid, whole or not at all.

    Args:
        path: File to write, ``.tif`` or ``.tiff``.
        read_block: Gives level 0; called once for every tile, row by row.
        size_px: (width, height) of level 0, each at least 1.
        mpp: Resolution of level 0 in µm/px, in (0, 100). Readers of generic TIFF (this package's own among
            them) take 40 and more for a printer's resolution.
        plane: Of the slide; the image's upper left corner is its corner.
        scratch: Folder for files that are removed again; about a third of the compressed image.
        colours: Palette, uint8 (256, 3); None stores grey.

    Raises:
        SlideError: ``mpp`` is not a resolution a slide can have (SLIDE_MPP_INVALID).
        ValueError: A block or the size is not as described.
        OSError: The file cannot be written; nothing is left behind.
    """
    if not (math.isfinite(mpp) and 0 < mpp < MAX_PLAUSIBLE_MPP):
        raise SlideError(
            f"{path.name}: {mpp} µm/px is not a resolution of a slide; give one between 0 and"
            f" {MAX_PLAUSIBLE_MPP:g}.",
            reason="SLIDE_MPP_INVALID",
        )
    if min(size_px) < 1:
        raise ValueError(f"an image of {size_px[0]}x{size_px[1]} px has no pixels")
    levels = min(level_count(size_px, TILE_PX), 1 + math.floor(math.log2(min(size_px))))
    bigtiff = size_px[0] * size_px[1] > CLASSIC_TIFF_PX
    with atomic_path(path) as partial, tifffile.TiffWriter(partial, bigtiff=bigtiff) as tiff:
        for index in range(levels):
            level_size_px = (size_px[0] >> index, size_px[1] >> index)
            with _Quarters(scratch / f"level-{index + 1}.quarters", level_size_px) as below:
                tiles = _encode_tiles(read_block, level_size_px, None if index + 1 == levels else below)
                said = None if index > 0 else json.dumps({"histoflare": plane.to_json()})
                _write_level(tiff, tiles, level_size_px, mpp * 2**index, colours, said)
                if index > 0:
                    (scratch / f"level-{index}.quarters").unlink()
            read_block = below.read
        (scratch / f"level-{levels}.quarters").unlink()


class MaskPyramid:
    """A file that :func:`write_mask_pyramid` wrote, read block by block. Use it as a context manager.

    ``plane`` is the plane of the slide in which it lies.

    Args:
        path: The file.

    Raises:
        SlideError: It is no such file (SLIDE_UNSUPPORTED).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tifffile.TiffFile(path) as tiff:
                pages = [page.aspage() for page in tiff.pages]
                self._tiles = [
                    (np.array(page.dataoffsets), np.array(page.databytecounts), page.tilewidth)
                    for page in pages
                ]
                usable = all(_is_own(page) for page in pages)
                numerator, denominator = pages[0].tags["XResolution"].value
                self.mpp: float = UM_PER_CM * denominator / numerator
                self.sizes_px: list[tuple[int, int]] = [(p.imagewidth, p.imagelength) for p in pages]
                self.plane = Plane.from_json(json.loads(pages[0].description).get("histoflare"))
        except (OSError, tifffile.TiffFileError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise self._unsupported() from error
        if not usable:
            raise self._unsupported()
        self._file = path.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return the values uint8 (height, width) of a block that lies in ``level``."""
        block = np.empty((height, width), np.uint8)
        side = self._tiles[level][2]
        for t_y in range(y // side, (y + height - 1) // side + 1):
            for t_x in range(x // side, (x + width - 1) // side + 1):
                paste(block, (x, y), self._read_tile(level, t_x, t_y), (t_x * side, t_y * side))
        return block

    def _read_tile(self, level: int, t_x: int, t_y: int) -> NDArray[np.uint8]:
        offsets, byte_counts, side = self._tiles[level]
        index = t_y * -(-self.sizes_px[level][0] // side) + t_x
        self._file.seek(int(offsets[index]))
        content = zlib.decompress(self._file.read(int(byte_counts[index])))
        return np.frombuffer(content, np.uint8).reshape(side, side)

    def _unsupported(self) -> SlideError:
        return SlideError(
            f"{self.path}: not a mask that histoflare wrote (8 bit, tiled, deflate).",
            reason="SLIDE_UNSUPPORTED",
        )


def is_own_pyramid(path: Path) -> bool:
    """Tell whether :func:`write_mask_pyramid` wrote the file: its description says in which plane it lies."""
    try:
        with tifffile.TiffFile(path) as tiff:
            said = json.loads(tiff.pages[0].aspage().description)
        return isinstance(said, dict) and "histoflare" in said
    except (OSError, tifffile.TiffFileError, IndexError, ValueError, AttributeError):
        return False


def halve_classes(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the most frequent value of each 2x2 block: uint8 (h, w) -> (h // 2, w // 2).

    Of equally frequent values the first in reading order is taken.
    """
    height, width = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
    even = values[:height, :width]
    a, b, c, d = even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]
    # a loses only to a pair: (b = c or b = d or c = d) while no other value equals a
    alone = (a != b) & (a != c) & (a != d)
    later: NDArray[np.uint8] = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where(alone, later, a)


def paste(
    target: NDArray[np.uint8], at: tuple[int, int], source: NDArray[np.uint8], source_at: tuple[int, int]
) -> None:
    """Copy into ``target`` (corner ``at``) what it shares with ``source`` (corner ``source_at``), (x, y)."""
    x0, y0 = max(at[0], source_at[0]), max(at[1], source_at[1])
    x1 = min(at[0] + target.shape[1], source_at[0] + source.shape[1])
    y1 = min(at[1] + target.shape[0], source_at[1] + source.shape[0])
    if x0 < x1 and y0 < y1:
        shared = source[y0 - source_at[1] : y1 - source_at[1], x0 - source_at[0] : x1 - source_at[0]]
        target[y0 - at[1] : y1 - at[1], x0 - at[0] : x1 - at[0]] = shared


def _is_own(page: tifffile.TiffPage) -> bool:
    eight_bit = page.dtype == np.uint8 and page.ndim == 2
    return bool(eight_bit and page.is_tiled and int(page.compression) == ADOBE_DEFLATE)


class _Quarters:
    """The tiles of a level, halved, on disk: four of them make a tile of the next level."""

    def __init__(self, path: Path, above_size_px: tuple[int, int]) -> None:
        self._path = path
        self._t_columns = -(-above_size_px[0] // TILE_PX)
        self._size_px = (above_size_px[0] // 2, above_size_px[1] // 2)
        self._starts = array("Q", [0])

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, tile: NDArray[np.uint8]) -> None:
        """Keep half of the next tile, row by row."""
        even = _constant(tile)
        half = halve_classes(tile) if even is None else tile[: tile.shape[0] // 2, : tile.shape[1] // 2]
        content = zlib.compress(half.tobytes(), SPILL_LEVEL)
        self._file.write(content)
        self._starts.append(self._starts[-1] + len(content))

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return a block of the level below."""
        block = np.empty((height, width), np.uint8)
        side = TILE_PX // 2
        with self._path.open("rb") as file:
            for t_y in range(y // side, (y + height - 1) // side + 1):
                for t_x in range(x // side, (x + width - 1) // side + 1):
                    index = t_y * self._t_columns + t_x
                    file.seek(self._starts[index])
                    content = zlib.decompress(file.read(self._starts[index + 1] - self._starts[index]))
                    shape = (
                        min(side, self._size_px[1] - t_y * side),
                        min(side, self._size_px[0] - t_x * side),
                    )
                    part = np.frombuffer(content, np.uint8).reshape(shape)
                    paste(block, (x, y), part, (t_x * side, t_y * side))
        return block


def _encode_tiles(
    read_block: ReadBlock, size_px: tuple[int, int], below: _Quarters | None
) -> Iterator[bytes]:
    """Yield the compressed tiles of a level, row by row, and leave their halves in ``below``."""
    width_px, height_px = size_px
    for y in range(0, height_px, TILE_PX):
        for x in range(0, width_px, TILE_PX):
            shape = (min(TILE_PX, height_px - y), min(TILE_PX, width_px - x))
            block = read_block(x, y, shape[1], shape[0])
            if block.shape != shape or block.dtype != np.uint8:
                raise ValueError(f"block at ({x}, {y}) must be uint8 of shape {shape}, not {block.shape}")
            if below is not None:
                below.add(block)
            even = _constant(block)
            if even is not None:  # most of a slide is glass
                yield _even_tile(even)
                continue
            padding = ((0, TILE_PX - shape[0]), (0, TILE_PX - shape[1]))
            yield zlib.compress(np.pad(block, padding).tobytes(), DEFLATE_LEVEL)


def _constant(block: NDArray[np.uint8]) -> int | None:
    """Return the value of all pixels, or None if there are several."""
    first = int(block[0, 0])
    return first if bool((block == first).all()) else None


@lru_cache(maxsize=256)
def _even_tile(value: int) -> bytes:
    return zlib.compress(bytes([value]) * TILE_PX**2, DEFLATE_LEVEL)


def _write_level(
    tiff: tifffile.TiffWriter,
    tiles: Iterator[bytes],
    size_px: tuple[int, int],
    mpp: float,
    colours: NDArray[np.uint8] | None,
    description: str | None,
) -> None:
    """Write a level; level 0 alone has a ``description``."""
    palette = None if colours is None else colours.T.astype(np.uint16) * 257  # TIFF's are 16 bit, (3, 256)
    tiff.write(
        tiles,
        shape=(size_px[1], size_px[0]),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="minisblack" if palette is None else "palette",
        colormap=palette,
        compression="adobe_deflate",
        subfiletype=SUBFILE_REDUCED if description is None else 0,
        resolution=(UM_PER_CM / mpp, UM_PER_CM / mpp),
        resolutionunit="CENTIMETER",
        description=description,
        metadata=None,  # no software or date: the bytes depend on pixels and plane alone
        software=False,
    )
