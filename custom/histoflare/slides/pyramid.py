"""Tiled pyramidal TIFF that OpenSlide reads.

A pyramid is written from bands of rows, so that neither the slide nor a level of it need ever be held in
memory; only the compressed tiles of the smaller levels are. The file is plain TIFF (vendor ``generic-tiff``),
each level half the one before, with the resolution in the resolution tags, and the same pixels give the same
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from histoflare.errors import SlideError
from histoflare.storage import atomic_path

UM_PER_CM = 1e4
MAX_PLAUSIBLE_MPP = (
    100.0  # coarser than this is what 72 dpi (353 um/px) looks like: readers take it as missing
)
SUBFILE_REDUCED = 1  # TIFF 6.0, NewSubfileType bit 0: a smaller copy of the image before it


def level_count(size_px: tuple[int, int], tile_px: int = 256) -> int:
    """Return how many levels halve ``size_px`` (width, height) until the last one fits into a tile."""
    longest = max(size_px)
    return 1 + max(0, math.ceil(math.log2(longest / tile_px)))


def write_pyramid(
    path: Path,
    rgb: NDArray[np.uint8],
    mpp: float,
    *,
    tile_px: int = 256,
    levels: int | None = None,
    jpeg_quality: int = 90,
) -> None:
    """Write ``rgb`` as a tiled pyramid, whole or not at all.

    Args:
        path: File to write, ``.tif`` or ``.tiff``.
        rgb: uint8, shape (h, w, 3).
        mpp: Resolution of ``rgb`` in um/px, in (0, 100).
        tile_px: Side of a tile, a multiple of 16 (TIFF 6.0, section 15).
        levels: Number of levels, at least 1; by default until a level fits into one tile.
        jpeg_quality: 1 to 100.

    Raises:
        SlideError: ``mpp`` is not a resolution a slide can have.
        ValueError: The array, the tile or the number of levels is not as described.
        OSError: The file cannot be written; nothing is left behind.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be uint8 of shape (h, w, 3), not {rgb.dtype} of shape {rgb.shape}")
    height_px, width_px = rgb.shape[:2]
    write_pyramid_bands(
        path,
        (rgb[y : y + tile_px] for y in range(0, height_px, tile_px)),
        (width_px, height_px),
        mpp,
        tile_px=tile_px,
        levels=levels,
        jpeg_quality=jpeg_quality,
    )


def write_pyramid_bands(
    path: Path,
    bands: Iterable[NDArray[np.uint8]],
    size_px: tuple[int, int],
    mpp: float,
    *,
    tile_px: int = 256,
    levels: int | None = None,
    jpeg_quality: int = 90,
) -> None:
    """Write a slide that arrives in bands from top to bottom.

    Args:
        path: File to write, ``.tif`` or ``.tiff``.
        bands: uint8 arrays (tile_px, w, 3); the last may be lower. Together they make ``size_px``.
        size_px: (width, height) of level 0.
        mpp: Resolution of level 0 in um/px, in (0, 100).
        tile_px: Side of a tile, a multiple of 16.
        levels: Number of levels, at least 1; by default until a level fits into one tile. A level has
            floor(size / 2) of the level before: sizes that are multiples of 2**(levels - 1) lose no pixel.
        jpeg_quality: 1 to 100.

    Raises:
        SlideError: ``mpp`` is not a resolution a slide can have.
        ValueError: Bands, tile or number of levels are not as described.
        OSError: The file cannot be written; nothing is left behind.
    """
    if not (math.isfinite(mpp) and 0 < mpp < MAX_PLAUSIBLE_MPP):
        raise SlideError(
            f"{path.name}: {mpp} um/px is not a resolution of a slide; give one between 0 and"
            f" {MAX_PLAUSIBLE_MPP:g}, e.g. 0.5 for 20x",
            reason="SLIDE_MPP_INVALID",
        )
    if tile_px <= 0 or tile_px % 16:
        raise ValueError(f"tile_px must be a positive multiple of 16, not {tile_px}")
    wanted = level_count(size_px, tile_px) if levels is None else levels
    if wanted < 1 or min(size_px) >> (wanted - 1) < 1:
        raise ValueError(f"{size_px[0]}x{size_px[1]} px cannot have {wanted} levels")
    chain = [_Level(tile_px, jpeg_quality) for _ in range(wanted)]
    with atomic_path(path) as partial, tifffile.TiffWriter(partial, bigtiff=_needs_bigtiff(size_px)) as tiff:
        for index in range(wanted):
            # level 0 is written while it is read; by its end the smaller levels are ready
            tiles = _read_down(bands, size_px, chain) if index == 0 else iter(chain[index].tiles)
            level_size_px = (size_px[0] >> index, size_px[1] >> index)
            _write_level(tiff, tiles, level_size_px, mpp * 2**index, tile_px, reduced=index > 0)


class _Level:
    """One level being made: rows that do not fill a band yet, and the tiles made so far."""

    def __init__(self, tile_px: int, jpeg_quality: int) -> None:
        self.tile_px = tile_px
        self.jpeg_quality = jpeg_quality
        self.waiting: list[NDArray[np.uint8]] = []
        self.tiles: list[bytes] = []

    def encode(self, band: NDArray[np.uint8]) -> list[bytes]:
        """Return the JPEG tiles of ``band`` from left to right, padded at the slide's border by its edge."""
        height, width = band.shape[:2]
        t_columns = math.ceil(width / self.tile_px)
        padding = ((0, self.tile_px - height), (0, t_columns * self.tile_px - width), (0, 0))
        # edge, not black: JPEG would let black ring into the pixels that are shown
        padded = np.pad(band, padding, mode="edge") if height % self.tile_px or padding[1][1] else band
        return [
            bytes(imagecodecs.jpeg8_encode(tile, level=self.jpeg_quality, subsampling="444"))
            for tile in (
                np.ascontiguousarray(padded[:, x : x + self.tile_px])
                for x in range(0, padded.shape[1], self.tile_px)
            )
        ]


def _read_down(
    bands: Iterable[NDArray[np.uint8]], size_px: tuple[int, int], chain: list[_Level]
) -> Iterator[bytes]:
    """Yield the tiles of level 0 and fill the levels below on the way."""
    width_px, height_px = size_px
    tile_px = chain[0].tile_px
    l0_y = 0
    for band in bands:
        expected = (min(tile_px, height_px - l0_y), width_px, 3)
        if band.shape != expected or band.dtype != np.uint8:
            raise ValueError(
                f"band at row {l0_y} must be uint8 of shape {expected}, not {band.dtype} {band.shape}"
            )
        l0_y += band.shape[0]
        _pass_down(band, chain, 1, last=l0_y == height_px)  # first: nobody asks for more after the last tile
        yield from chain[0].encode(band)
    if l0_y != height_px:
        raise ValueError(f"the bands end at row {l0_y} of {height_px}")


def _pass_down(band: NDArray[np.uint8], chain: list[_Level], index: int, *, last: bool) -> None:
    """Give half of ``band`` to level ``index``; when that has a full band (or no more comes), go on below."""
    if index == len(chain):
        return
    level = chain[index]
    level.waiting.append(halve(band))
    rows = sum(part.shape[0] for part in level.waiting)
    if rows < level.tile_px and not last:
        return
    whole = np.concatenate(level.waiting)
    level.waiting = []
    if rows:
        level.tiles.extend(level.encode(whole))
    _pass_down(whole, chain, index + 1, last=last)


def halve(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the means of 2x2 blocks: uint8 (h, w, c) -> (h // 2, w // 2, c), rounded half up."""
    height, width = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    even = rgb[:height, :width].astype(np.uint16)
    rows = even[0::2] + even[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


def _write_level(
    tiff: tifffile.TiffWriter,
    tiles: Iterator[bytes],
    size_px: tuple[int, int],
    mpp: float,
    tile_px: int,
    *,
    reduced: bool,
) -> None:
    tiff.write(
        tiles,
        shape=(size_px[1], size_px[0], 3),
        dtype=np.uint8,
        tile=(tile_px, tile_px),
        photometric="ycbcr",
        subsampling=(1, 1),
        compression="jpeg",
        subfiletype=SUBFILE_REDUCED if reduced else 0,
        resolution=(UM_PER_CM / mpp, UM_PER_CM / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,  # no description, software or date: the bytes depend on the pixels alone
        software=False,
    )


def _needs_bigtiff(size_px: tuple[int, int]) -> bool:
    # JPEG tissue rarely passes 1 byte per pixel; 4 GiB is the limit of classic TIFF
    return size_px[0] * size_px[1] > 2**31
