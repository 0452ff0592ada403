"""Intervals of ratios of noised sums, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from histoflare.noised_ratio import DROWNED, Estimate, Z, estimate, is_drowned, mean_estimate


def nothing(ratio: np.ndarray) -> np.ndarray:
    return np.zeros_like(ratio)


@pytest.mark.parametrize(("right", "size"), [(0, 7), (3, 7), (17, 40), (40, 40), (159, 160)])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_a_share_without_noise_has_wilson_s_interval(right: int, size: int, step: float) -> None:
    """Newcombe 1998, methods 3 and 4."""
    found = estimate(right, size, lambda share: size * share * (1 - share), nothing, step=step)
    p, z2 = right / size, Z**2
    low, high = (
        (2 * size * x + z2 + sign * Z * math.sqrt(max(0.0, z2 + 4 * size * x * (1 - x)))) / (2 * (size + z2))
        for sign, x in ((-1, p - step / size), (1, p + step / size))
    )
    ends = (0.0 if right == 0 else low, 1.0 if right == size else high)  # as Newcombe has it
    assert mean_estimate([found], same_patients=True) == pytest.approx((p, *ends), abs=2e-4)
    assert found.value == p and found.few == (found.low, found.high)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_narrow_intervals_are_as_exact(size: float) -> None:
    found = estimate(0.3 * size, size, lambda share: size * share * (1 - share), nothing)
    half = Z * math.sqrt(0.21 / size)
    assert (found.high - found.low) == pytest.approx(2 * half, rel=0.02)


@pytest.mark.parametrize("above", [-3.0, 4.0, 12.0])
def test_noise_above_alone_is_a_normal_interval(above: float) -> None:
    found = estimate(above, 10.0, nothing, lambda ratio: np.full_like(ratio, 2.25))
    ends = (above / 10 - Z * 0.15, above / 10 + Z * 0.15)
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-9 + 1e-3)
    assert found.few == (found.value, found.value) == (above / 10, above / 10)


def test_fieller_s_interval() -> None:
    """Noise of one size above and below: the ends are the roots of a quadratic equation."""
    above, below, std = 12.0, 20.0, 2.0
    found = estimate(above, below, nothing, lambda ratio: std**2 * (1 + ratio**2))
    roots = np.roots([below**2 - (Z * std) ** 2, -2 * above * below, above**2 - (Z * std) ** 2])
    assert (found.low, found.high) == pytest.approx(tuple(sorted(roots)), abs=1e-5)


def test_a_mean_of_parts() -> None:
    parts = [Estimate(0.6, 0.3, 0.8, (0.36, 0.75)), Estimate(0.8, 0.75, 0.9, (0.76, 0.87))]
    apart = mean_estimate(parts, same_patients=False)
    assert apart == pytest.approx((0.7, 0.7 - math.hypot(0.3, 0.05) / 2, 0.7 + math.hypot(0.2, 0.1) / 2))
    noise = math.sqrt(0.3**2 - 0.24**2), math.sqrt(0.05**2 - 0.04**2)
    together = mean_estimate(parts, same_patients=True)
    assert together[1] == pytest.approx(0.7 - math.hypot(*noise, 0.24 + 0.04) / 2)
    assert together[1] < apart[1] and together[2] > apart[2]


def test_only_the_mean_is_put_back_into_the_range() -> None:
    over = Estimate(1.2, 0.9, 1.5, (1.2, 1.2))
    assert mean_estimate([over], same_patients=True) == pytest.approx((1.0, 0.7, 1.0))
    value, low, high = mean_estimate([over, Estimate(0.7, 0.5, 0.9, (0.7, 0.7))], same_patients=False)
    assert (value, high) == pytest.approx((0.95, 1.0)) and low == pytest.approx(
        0.95 - math.hypot(0.3, 0.2) / 2
    )


def test_what_is_drowned() -> None:
    assert is_drowned(0.0, 0.0) and is_drowned(-1.0, 0.0) and is_drowned(math.nan, 0.0)
    assert is_drowned(DROWNED, 1.0) and not is_drowned(DROWNED + 0.01, 1.0) and not is_drowned(0.5, 0.0)
