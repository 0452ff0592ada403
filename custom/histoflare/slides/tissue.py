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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histoflare.errors import SlideError
from histoflare.slides.reader import Slide

COARSEST_MASK_MPP = 8.0
"""Of the mask; about 1.25x, the magnification of the papers' thumbnails."""

MASK_PX_PER_PATCH = 32
"""Small patches get a finer mask, so that the share of tissue in each is still meaningful."""

UM2_SMALLEST = 2500.0
"""Smaller specks (50 x 50 µm) are dust, smaller holes belong to the tissue around them."""

DARK_LEVEL, BRIGHT_LEVEL = 60, 190
"""A pixel with no channel above the first is dark; one with every channel above the second can be glass."""


BAND_PX = 1 << 20
"""Pixels whose optical densities are held at once: memory is then the picture's, at a few bytes a pixel."""

BAND_ROWS = 256


@dataclass(frozen=True)
class Tissue:
    """The tissue of a slide: ``mask`` bool (h, w), each pixel of it ``l0_per_px`` level-0 pixels wide."""

    mask: NDArray[np.bool_]
    l0_per_px: float

    def shares(self, l0_xy: NDArray[np.integer], l0_side_px: int) -> NDArray[np.float64]:
        """Return the share of tissue (n,) in the squares with upper left corners ``l0_xy`` (n, 2)."""
        total = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int64)
        total[1:, 1:] = self.mask.cumsum(axis=0).cumsum(axis=1)
        height, width = self.mask.shape
        limits = np.array([width, height])
        low = np.clip(np.round(l0_xy / self.l0_per_px).astype(np.int64), 0, limits - 1)
        high = np.clip(np.round((l0_xy + l0_side_px) / self.l0_per_px).astype(np.int64), low + 1, limits)
        (x0, y0), (x1, y1) = low.T, high.T
        inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
        shares: NDArray[np.float64] = inside / ((x1 - x0) * (y1 - y0))
        return shares


def find_tissue(slide: Slide, um_patch: float) -> Tissue:
    """Return the tissue of ``slide``, fine enough for patches of side ``um_patch``.

    Raises:
        SlideError: There is none (``SLIDE_NO_TISSUE``), or the background is dark
            (``SLIDE_DARK_BACKGROUND``).
    """
    mpp = max(slide.mpp, min(COARSEST_MASK_MPP, um_patch / MASK_PX_PER_PATCH))
    l0_per_px = slide.l0_per_px(mpp)
    rgb = slide.thumbnail(mpp)
    if has_dark_background(rgb):
        raise SlideError(
            f"{slide.path}: the background is dark, as in fluorescence. Only bright-field slides, "
            "stained with haematoxylin and eosin, can be used.",
            reason="SLIDE_DARK_BACKGROUND",
        )
    um2_smallest = min(UM2_SMALLEST, um_patch**2 / 4)  # what fills a patch is never a speck
    mask = tissue_mask(rgb, mpp=l0_per_px * slide.mpp, um2_smallest=um2_smallest)
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
    white = white_point(rgb)
    coloured = np.empty(rgb.shape[:2], np.bool_)
    rows = max(1, BAND_PX // max(1, rgb.shape[1]))
    for y in range(0, rgb.shape[0], rows):
        coloured[y : y + rows] = _has_colour_of_tissue(rgb[y : y + rows], white)
    smallest_px = um2_smallest / mpp**2
    mask = _without_small(coloured, smallest_px)
    return ~_without_small(~mask, smallest_px)


def _has_colour_of_tissue(rgb: NDArray[np.uint8], white: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which pixels (h, w) of an image (h, w, 3) have the colour of tissue, by the module's rules."""
    density = -np.log10(np.maximum(rgb, 1) / white)
    red, green, blue = np.maximum(density, 0).transpose(2, 0, 1)
    violet = (green - blue > np.maximum(0.04, 0.2 * green)) & (green > 0.8 * red)
    pink = (green - red > np.maximum(0.04, 0.3 * green)) & (blue < 1.5 * green)
    marker = ((green > 0.7) & (red < 0.2 * green)) | ((red > 0.7) & (green < 0.95 * red))
    tissue: NDArray[np.bool_] = (violet | pink) & ~marker
    return tissue


def white_point(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the colour (3,) of the light through bare glass: that of the brighter nearly grey pixels.

    Where an image has hardly any (a piece cut from within the tissue), pure white. Green is never below the
    other two: a pinkish white is pale tissue rather than glass.
    """
    counts = np.zeros((3, 256), np.int64)  # of the values of glass, by colour
    rows = max(1, BAND_PX // max(1, rgb.shape[1]))
    for y in range(0, rgb.shape[0], rows):
        pixels = rgb[y : y + rows].reshape(-1, 3)
        darkest, brightest = pixels.min(axis=1), pixels.max(axis=1)
        glass = pixels[(darkest > BRIGHT_LEVEL) & (brightest - darkest < 20)]
        counts += [np.bincount(glass[:, colour], minlength=256) for colour in range(3)]
    if counts[0].sum() < 0.02 * rgb[..., 0].size:
        return np.full(3, 255.0)
    white = np.array([_percentile(each, 75) for each in counts])
    white[1] = white.max()
    return white


def _percentile(counts: NDArray[np.int64], percent: float) -> float:
    """Return a percentile, as NumPy defines it, of whole numbers given by how often each occurs."""
    place = (int(counts.sum()) - 1) * percent / 100
    low, high = np.searchsorted(counts.cumsum(), [int(place), math.ceil(place)], side="right")
    return float(low + (high - low) * (place - int(place)))


def has_dark_background(rgb: NDArray[np.uint8]) -> bool:
    """Tell whether most of the image (h, w, 3) is dark and hardly any of the rest bright."""
    dark = rgb.max(axis=2) < DARK_LEVEL
    bright = rgb.min(axis=2) > BRIGHT_LEVEL
    lit = int((~dark).sum())
    return bool(dark.mean() > 0.5 and bright.sum() <= 0.05 * lit)


def _without_small(mask: NDArray[np.bool_], smallest_px: float) -> NDArray[np.bool_]:
    """Return ``mask`` without its connected parts of fewer than ``smallest_px`` pixels."""
    parts, count = ndimage.label(mask)
    sizes = np.zeros(count + 1, np.int64)
    for y in range(0, len(parts), BAND_ROWS):  # all at once, bincount would take eight bytes a pixel
        sizes += np.bincount(parts[y : y + BAND_ROWS].ravel(), minlength=count + 1)
    keep = sizes >= smallest_px
    keep[0] = False
    kept: NDArray[np.bool_] = keep[parts]
    return kept
