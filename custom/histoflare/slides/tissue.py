"""Tissue on a slide, by colour.

An absolute rule for haematoxylin and eosin rather than a threshold fitted to the slide (Otsu and its kin need
background to be there, and a section cut out of a slide has none). Both stains absorb green more than at
least one of the other two colours. With the optical density OD_c = −log10(I_c / white_c) of a pixel (Ruifrok
& Johnston 2001, Anal Quant Cytol Histol 23:291; haematoxylin (0.65, 0.70, 0.29), eosin (0.07, 0.99, 0.11)),

    violet  OD_G − OD_B > max(0.04, 0.2·OD_G) and OD_G > 0.8·OD_R     not grey, black, brown; not blue ink
    pink    OD_G − OD_R > max(0.04, 0.3·OD_G) and OD_B < 1.5·OD_G     not grey, brown, yellow, orange
    marker  OD_G > 0.7 and OD_R < 0.2·OD_G                            saturated red or pink ink
            OD_R > 0.7 and OD_G < 0.95·OD_R                           or blue ink

and tissue is (violet or pink) and not marker. A purple marker has the colour of tissue and is taken for it;
dense blood has the colour of a red marker and is left out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import SlideError
from histoflare.slides.components import remove_small_parts
from histoflare.slides.pixels import Block
from histoflare.slides.reader import Slide

COARSEST_MASK_MPP = 8.0
"""Of the mask; about 1.25x, the magnification of the papers' thumbnails."""

MASK_PX_PER_PATCH = 32
"""Small patches get a finer mask, so that the share of tissue in each is still meaningful."""

UM2_SMALLEST = 2500.0
"""Smaller specks (50 x 50 µm) are dust, smaller holes belong to the tissue around them."""

DARK_LEVEL, BRIGHT_LEVEL = 60, 190
"""A pixel with no channel above the first is dark; one with every channel above the second can be glass."""


BAND_PX = 1 << 18
"""Pixels whose colours are looked at at once, at some 20 bytes each."""

KEPT_BYTES = 1 << 27
"""Of the picture the mask is made of. It is needed twice, and a larger one is read twice."""


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide: ``mask`` bool (h, w), each pixel of it ``l0_per_px`` level-0 pixels wide."""

    mask: NDArray[np.bool_]
    l0_per_px: float

    def shares(self, l0_xy: NDArray[np.integer], l0_side_px: int) -> NDArray[np.float64]:
        """Return the share of tissue (n,) in the squares with upper left corners ``l0_xy`` (n, 2)."""
        height, width = self.mask.shape
        limits = np.array([width, height])
        low = np.clip(np.round(l0_xy / self.l0_per_px).astype(np.int64), 0, limits - 1)
        high = np.clip(np.round((l0_xy + l0_side_px) / self.l0_per_px).astype(np.int64), low + 1, limits)
        (x0, y0), (x1, y1) = low.T, high.T
        total, row_of = self._sums_above(np.union1d(y0, y1))
        top, bottom = row_of[y0], row_of[y1]
        inside = total[bottom, x1] - total[top, x1] - total[bottom, x0] + total[top, x0]
        shares: NDArray[np.float64] = inside / ((x1 - x0) * (y1 - y0))
        return shares

    def _sums_above(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return how much tissue lies above each of ``rows`` (n, ascending) and left of each column.

        Returns:
            The sums (n, w + 1), counted from the first of ``rows`` on, and the index of each row of the mask
            among ``rows``, where it is one of them.
        """
        height, width = self.mask.shape
        total = np.zeros((len(rows), width + 1), np.int32)
        between = np.add.reduceat(self.mask.view(np.uint8), rows[rows < height], axis=0, dtype=np.int32)
        between[: len(rows) - 1].cumsum(axis=0, out=total[1:, 1:])
        total[:, 1:].cumsum(axis=1, out=total[:, 1:])
        row_of = np.zeros(height + 1, np.int64)
        row_of[rows] = np.arange(len(rows))
        return total, row_of


def find_tissue(
    slide: Slide, um_patch: float, *, threads: int = 1, also: Callable[[Block], None] | None = None
) -> Tissue:
    """Return the tissue of ``slide``, fine enough for patches of side ``um_patch``.

    Memory holds the mask, a byte a pixel, the picture it is made of if that is not too large, and a block of
    it for each thread.

    Args:
        slide: Is read once or twice, whole.
        um_patch: Side of the patches in micrometres.
        threads: Threads that read; the result is the same.
        also: Called once with every block that is read, from ``threads`` threads, to make more of it.

    Raises:
        SlideError: There is none (``SLIDE_NO_TISSUE``), or the background is dark
            (``SLIDE_DARK_BACKGROUND``).
    """
    mpp = max(slide.mpp, min(COARSEST_MASK_MPP, um_patch / MASK_PX_PER_PATCH))
    l0_per_px = slide.l0_per_px(mpp)
    um2_smallest = min(UM2_SMALLEST, um_patch**2 / 4)  # what fills a patch is never a speck
    width_px, height_px = slide.thumbnail_size_px(mpp)
    mask = np.empty((height_px, width_px), np.bool_)
    picture = np.empty((height_px, width_px, 3), np.uint8) if mask.size * 3 <= KEPT_BYTES else None
    light = Light()

    def look(block: Block) -> None:
        pixels = block.pixels()
        light.add(pixels, block.scanned())
        if picture is not None:
            picture[block.place] = pixels
        if also is not None:
            also(block)

    slide.each_block(mpp, look, threads)
    if light.is_dark():
        raise SlideError(
            f"{slide.path}: the background is dark, as in fluorescence. Only bright-field slides, "
            "stained with haematoxylin and eosin, can be used.",
            reason="SLIDE_DARK_BACKGROUND",
        )
    colours = TissueColours(light.white_point())
    if picture is not None:
        _fill_mask(mask, picture, colours, threads)
        del picture
    else:

        def mark(block: Block) -> None:
            mask[block.place] = colours.find(block.pixels())

        slide.each_block(mpp, mark, threads)
    slide.drop_cache()  # what is read next is finer
    _drop_specks(mask, um2_smallest / (l0_per_px * slide.mpp) ** 2)
    if not mask.any():
        raise SlideError(
            f"{slide.path}: no tissue found. It is sought by the colours of haematoxylin and eosin; leave "
            "out empty slides and other stains.",
            reason="SLIDE_NO_TISSUE",
        )
    return Tissue(mask, l0_per_px)


def tissue_mask(
    rgb: NDArray[np.uint8], *, mpp: float = COARSEST_MASK_MPP, um2_smallest: float = UM2_SMALLEST
) -> NDArray[np.bool_]:
    """Return where the image (h, w, 3) shows tissue: bool (h, w), without specks and small holes.

    Args:
        rgb: uint8 image of a slide, light background.
        mpp: Its resolution in µm/px; decides how many pixels a speck has.
        um2_smallest: Smaller parts and holes (µm²) do not count.
    """
    light = Light()
    light.add(rgb)
    mask = np.empty(rgb.shape[:2], np.bool_)
    _fill_mask(mask, rgb, TissueColours(light.white_point()))
    _drop_specks(mask, um2_smallest / mpp**2)
    return mask


def _fill_mask(
    mask: NDArray[np.bool_], rgb: NDArray[np.uint8], colours: TissueColours, threads: int = 1
) -> None:
    """Set the mask (h, w) to where the image (h, w, 3) has the colour of tissue."""

    def fill(part: tuple[int, NDArray[np.uint8]]) -> None:
        top, band = part
        mask[top : top + len(band)] = colours.find(band)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(fill, _bands(rgb)))


def _drop_specks(mask: NDArray[np.bool_], smallest_px: float) -> None:
    """Clear smaller parts of the mask, then fill smaller holes, in place."""
    for _ in range(2):
        remove_small_parts(mask, smallest_px)
        np.logical_not(mask, out=mask)


def _bands(rgb: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the rows of an image some at a time, with the first one's number."""
    rows = max(1, BAND_PX // max(1, rgb.shape[1]))
    for y in range(0, len(rgb), rows):
        yield y, rgb[y : y + rows]


class TissueColours:
    """The module's rules as two tables. Each rule is one on green and blue and one on green and red.

    Args:
        white: Colour (3,) of the light through bare glass, in 0 .. 255.
    """

    def __init__(self, white: NDArray[np.float64]) -> None:
        values = np.maximum(np.arange(256), 1)[:, None]
        density = np.maximum(-np.log10(values / white), 0)  # (256, 3), of each value of each colour
        red, green, blue = density[None, :, 0], density[:, None, 1], density[None, :, 2]
        marker = ((green > 0.7) & (red < 0.2 * green)) | ((red > 0.7) & (green < 0.95 * red))
        violet = green - blue > np.maximum(0.04, 0.2 * green), (green > 0.8 * red) & ~marker
        pink = blue < 1.5 * green, (green - red > np.maximum(0.04, 0.3 * green)) & ~marker
        # bit 0 of an entry is the violet rule's part, bit 1 the pink one's; its index is 256 G + B (or R)
        self._green_blue, self._green_red = (
            (violet[part] | pink[part].astype(np.uint8) << 1).astype(np.uint8).ravel() for part in range(2)
        )

    def find(self, rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which pixels (h, w) of an image (h, w, 3) have the colour of tissue."""
        green = rgb[..., 1].astype(np.uint16) << 8
        found = self._green_blue.take(green | rgb[..., 2])
        found &= self._green_red.take(green | rgb[..., 0])
        return found > 0


class Light:
    """What the brightness of an image's pixels says of its background. Takes the image part by part.

    Parts may come from several threads and in any order.
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._pixels = self._dark = self._bright = 0
        self._glass = np.zeros((3, 256), np.int64)  # how often each value of glass occurs, by colour

    def add(self, rgb: NDArray[np.uint8], scanned: NDArray[np.bool_] | None = None) -> None:
        """Look at a part (h, w, 3) of the image; only where it was ``scanned`` (h, w), if that is given."""
        for top, band in _bands(rgb):
            pixels = band.reshape(-1, 3)
            if scanned is not None and not scanned[top : top + len(band)].all():
                pixels = band[scanned[top : top + len(band)]]
            red, green, blue = np.ascontiguousarray(pixels.T)
            darkest = np.minimum(np.minimum(red, green), blue)
            brightest = np.maximum(np.maximum(red, green), blue)
            is_bright = darkest > BRIGHT_LEVEL
            is_glass = is_bright & (brightest - darkest < 20)
            glass = [np.bincount(colour[is_glass], minlength=256) for colour in (red, green, blue)]
            with self._adding:
                self._pixels += len(pixels)
                self._dark += int(np.count_nonzero(brightest < DARK_LEVEL))
                self._bright += int(np.count_nonzero(is_bright))
                self._glass += glass

    def white_point(self) -> NDArray[np.float64]:
        """Return the colour (3,) of the light through bare glass: that of the brighter nearly grey pixels.

        Where an image has hardly any (a piece cut from within the tissue), pure white. Green is never below
        the other two: a pinkish white is pale tissue rather than glass.
        """
        if not self._glass[0].any() or self._glass[0].sum() < 0.02 * self._pixels:
            return np.full(3, 255.0)
        white = np.array([_percentile(each, 75) for each in self._glass])
        white[1] = white.max()
        return white

    def is_dark(self) -> bool:
        """Tell whether most of the image is dark and hardly any of the rest bright."""
        lit = self._pixels - self._dark
        return self._dark > 0.5 * self._pixels and self._bright <= 0.05 * lit


def _percentile(counts: NDArray[np.int64], percent: float) -> float:
    """Return a percentile, as NumPy defines it, of whole numbers given by how often each occurs."""
    place = (int(counts.sum()) - 1) * percent / 100
    low, high = np.searchsorted(counts.cumsum(), [int(place), math.ceil(place)], side="right")
    return float(low + (high - low) * (place - int(place)))
