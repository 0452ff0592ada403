"""Connected parts of a mask by size, in the memory of a band of it.

Two pixels are connected if they share a side. The mask is worked off in bands of rows: what lies within one
band is measured there; what touches a band's edge is joined to what it touches on the other side, which takes
some 40 bytes for each such part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BAND_PX = 1 << 19
"""Pixels labelled at once, at some 20 bytes each."""


def remove_small_parts(mask: NDArray[np.bool_], smallest_px: float, *, band_px: int = BAND_PX) -> None:
    """Clear, in place, the connected parts of ``mask`` (h, w) that have fewer than ``smallest_px`` pixels.

    Args:
        band_px: Pixels of a band, rounded down to whole rows; changes memory only.
    """
    height, width = mask.shape
    rows = max(1, band_px // max(1, width))
    bands = [mask[y : y + rows] for y in range(0, height, rows)]
    joined = _JoinedSizes()
    for band in bands:
        joined.add(band)
    sizes = joined.sizes()
    for names, band in zip(joined.names, bands, strict=True):
        touching = sizes[names.first : names.first + len(names.labels)]
        if touching.min(initial=names.smallest_inside) >= smallest_px:
            continue  # nothing to clear
        parts, own = _label(band)
        own[names.labels] = touching
        keep = own >= smallest_px
        keep[0] = False
        band[...] = keep[parts]


class _Names:
    """The parts of a band that touch its first or last row: ``labels`` there, named from ``first`` on.

    ``smallest_inside`` is the size of the smallest of the others.
    """

    def __init__(self, labels: NDArray[np.int64], first: int, smallest_inside: float) -> None:
        self.labels, self.first, self.smallest_inside = labels, first, smallest_inside

    def of(self, row: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the names of a row's labels."""
        return np.searchsorted(self.labels, row) + self.first


class _JoinedSizes:
    """Takes bands from top to bottom; knows the sizes of the parts that reach from one into the next."""

    def __init__(self) -> None:
        self.names: list[_Names] = []
        self._sizes: list[NDArray[np.int64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        self._above: NDArray[np.int32] | None = None  # labels in the last row so far

    def add(self, band: NDArray[np.bool_]) -> None:
        """Measure the next band."""
        parts, own = _label(band)
        touches = np.zeros(len(own), np.bool_)
        touches[parts[0]] = touches[parts[-1]] = True
        touches[0] = False
        first = self.names[-1].first + len(self.names[-1].labels) if self.names else 0
        inside = ~touches
        inside[0] = False
        names = _Names(np.flatnonzero(touches), first, own.min(where=inside, initial=np.iinfo(np.int64).max))
        if self._above is not None:
            both = (self._above > 0) & (parts[0] > 0)
            pairs = np.stack([self.names[-1].of(self._above[both]), names.of(parts[0][both])])
            self._pairs.append(np.unique(pairs, axis=1))
        self.names.append(names)
        self._sizes.append(own[names.labels])
        self._above = parts[-1].copy()

    def sizes(self) -> NDArray[np.int64]:
        """Return, by name, how many pixels the whole part has."""
        own = np.concatenate([*self._sizes, np.zeros(0, np.int64)])
        if not len(own):
            return own
        one, other = np.concatenate([*self._pairs, np.zeros((2, 0), np.int64)], axis=1)
        joins = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(len(own), len(own)))
        _, whole = connected_components(joins, directed=False)
        total = np.zeros(len(own), np.int64)
        np.add.at(total, whole, own)
        sizes: NDArray[np.int64] = total[whole]
        return sizes


def _label(band: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the labels (h, w) of a band's parts, and the pixels of each label, 0 (no part) first."""
    parts, count = ndimage.label(band)
    return parts, np.bincount(parts.ravel(), minlength=count + 1)
