"""Connected parts by size: the same as of the whole mask at once, in the memory of a band."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from histoflare.slides.components import remove_small_parts


def at_once(mask: NDArray[np.bool_], smallest_px: float) -> NDArray[np.bool_]:
    parts, count = ndimage.label(mask)
    keep = np.bincount(parts.ravel(), minlength=count + 1) >= smallest_px
    keep[0] = False
    kept: NDArray[np.bool_] = keep[parts]
    return kept


@settings(deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    density=st.floats(0, 1),
    smallest_px=st.floats(0, 200),
    band_px=st.integers(1, 400),
    seed=st.integers(0, 1000),
)
def test_bands_change_nothing(
    height: int, width: int, density: float, smallest_px: float, band_px: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    expected = at_once(mask, smallest_px)
    remove_small_parts(mask, smallest_px, band_px=band_px)
    np.testing.assert_array_equal(mask, expected)


def test_a_part_that_leaves_a_band_and_comes_back_is_one() -> None:
    """A comb: its teeth meet five bands below, each alone would be a speck."""
    comb = np.zeros((12, 11), np.bool_)
    comb[:, ::2] = True
    comb[-1] = True
    expected = comb.copy()
    remove_small_parts(comb, comb.sum(), band_px=22)
    np.testing.assert_array_equal(comb, expected)
    remove_small_parts(comb, expected.sum() + 1, band_px=22)
    assert not comb.any()


def peak_bytes(height: int) -> int:
    mask = np.random.default_rng(0).random((height, 500)) < 0.55
    tracemalloc.start()
    try:
        remove_small_parts(mask, 50, band_px=50_000)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_band() -> None:
    """Four times the mask: at once it would be four times the memory; what crosses bands is a little."""
    assert peak_bytes(8_000) < 1.6 * peak_bytes(2_000)
