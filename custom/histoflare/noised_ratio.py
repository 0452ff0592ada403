"""The interval of a ratio whose two parts are sums with noise.

Above and below are sums over patients, with noise; θ is what their ratio would be over all the patients whom
those counted are drawn from. Then D(θ) = above - θ · below has the mean 0 and a variance V(θ) that is known:
what sampling gives, and what the noise gives. The interval is every θ that such a test of 5 % would not
reject, D(θ)² <= z² V(θ): Fieller (1954, JRSS B 16:175-185), and for a share without noise the score interval
of Wilson (1927, JASA 22:209-212). It needs no resampling, holds where the ratio is at the end of its range,
and grows to [0, 1] where the noise says nothing.

θ is in [0, 1], but noise can lead out of it. Only the mean of all parts of a figure is put back into the
range: if each part were, the mean of parts near an end would be pushed away from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Variance = Callable[[Floats], Floats]
"""θ (t,) → the variance (t,) of D(θ)."""

Z = 1.959963984540054
"""Of a two-sided test of 5 %."""

DROWNED = 3.0
"""A sum below so many standard deviations of its noise divides nothing: a sum of nobody passes it by a chance
of 0.1 %, and one that passes is known to a third."""

GRID = np.unique(
    np.r_[np.linspace(-1, 0, 101), (1 - np.cos(np.linspace(0, np.pi, 401))) / 2, np.linspace(1, 2, 101)]
)
"""Ratios that are tried, closer to one another near 0 and 1, where a variance changes quickly; between two of
them what is compared is nearly a line."""


@dataclass(frozen=True)
class Estimate:
    """A ratio with its 95 % interval, perhaps beyond [0, 1]; ``few``: the interval were there no noise."""

    value: float
    low: float
    high: float
    few: tuple[float, float]


def is_drowned(size: float, std: float) -> bool:
    """Return whether a sum with noise of ``std`` is too small to divide by."""
    return not size > DROWNED * std


def estimate(
    above: float, below: float, sampling: Variance, noise: Variance, *, step: float = 0.0
) -> Estimate:
    """Return above / below with its interval.

    Args:
        above: With noise. below: With noise, > 0 (see :func:`is_drowned`).
        sampling: Variance of D that the draw of patients gives; asked of ratios in [0, 1].
        noise: Variance of D that the noise gives.
        step: What D can be off for nothing: half a patient where D counts whole ones (Yates 1934). Without
            it the interval of a share near 0 or 1 holds it too seldom (Newcombe 1998, Statistics in
            Medicine 17:857-872).
    """
    value = min(max(above / below, GRID[0]), GRID[-1])
    ratios = np.unique(np.append(GRID, value))
    few = np.maximum(sampling(np.clip(ratios, 0.0, 1.0)), 0.0)
    distance = np.maximum(abs(ratios - value) * below - step, 0.0)
    both = _accepted(ratios, Z * np.sqrt(few + noise(ratios)) - distance, value)
    return Estimate(value, *both, _accepted(ratios, Z * np.sqrt(few) - distance, value))


def mean_estimate(parts: Sequence[Estimate], *, same_patients: bool) -> tuple[float, float, float]:
    """Return the mean of estimates with its interval, within [0, 1]: value, low, high.

    The distances from value to end add up as standard deviations do (MOVER, Zou & Donner 2008, Statistics in
    Medicine 27:1693-1702). Noise is independent in each part.

    Args:
        parts: At least one.
        same_patients: Whether the parts tell of the same patients, so that these may move all of them
            together: then sampling counts as if it did. Otherwise each part has patients of its own.
    """
    value = float(np.mean([part.value for part in parts]))
    below = _added([(part.value - part.low, part.value - part.few[0]) for part in parts], same_patients)
    over = _added([(part.high - part.value, part.few[1] - part.value) for part in parts], same_patients)
    value = min(max(value, 0.0), 1.0)
    return value, max(0.0, value - below), min(1.0, value + over)


def _added(distances: Sequence[tuple[float, float]], same_patients: bool) -> float:
    """Return the distance of a mean from that of each part: with noise, and of sampling alone."""
    whole, few = np.array(distances).T
    noise = np.maximum(whole**2 - few**2, 0.0).sum()
    sampling = few.sum() ** 2 if same_patients else (few**2).sum()
    return float(np.sqrt(noise + sampling)) / len(whole)


def _accepted(ratios: Floats, room: Floats, value: float) -> tuple[float, float]:
    """Return the least and the greatest ratio that is not rejected; ``value`` itself never is."""
    kept = np.flatnonzero((room >= 0) | (ratios == value))
    return _crossing(ratios, room, kept[0], kept[0] - 1), _crossing(ratios, room, kept[-1], kept[-1] + 1)


def _crossing(ratios: Floats, room: Floats, inside: int, outside: int) -> float:
    """Return where ``room`` gets 0 between two neighbours, or the end of the range."""
    if not 0 <= outside < len(ratios):
        return float(ratios[inside])
    part = max(0.0, room[inside]) / (max(0.0, room[inside]) - room[outside])
    return float(ratios[inside] + part * (ratios[outside] - ratios[inside]))
