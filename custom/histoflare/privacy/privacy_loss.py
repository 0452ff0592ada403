"""ε from the distribution of the privacy loss: exactly for Gaussians, on a grid for sampled ones.

Called by :func:`histoflare.privacy.accountant.epsilon`, which says when which is used.

The grid is bounded here. Its size follows from an event's numbers, which a job chooses; so a request is
measured before a grid is made, and no job decides how much time or memory a site's process takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from histoflare.privacy.spend import Spend

PLD_CELLS = 100_000
"""Most cells of a whole composed privacy loss distribution; a wider one is cut more coarsely.

dp_accounting's connect-the-dots rounds so that coarser stays an upper bound. With a fixed fineness, noise
0.05 over 150 steps takes more than 20 GiB.
"""

PLD_FINEST = 1e-4
"""Least loss of a cell; dp_accounting's default. Far finer ones are spoilt by rounding, so noise of more than
100,000, of which no loss is as large as a cell, is not put on a grid."""

PLD_WIDEST_LOSS = 5e6
"""A distribution of losses wider than this is not made: its ε would be in the hundreds of thousands, and a
cell wider than 50."""

PLD_MOST_STEPS = 100_000
"""Of one event. dp_accounting's time and the error of its Fourier transform grow with the steps."""

PLD_MOST_EVENTS = 8
"""Different events in one figure."""

PLD_LEAST_DELTA = 1e-10
"""Below, the tails that dp_accounting cuts off and the rounding of its Fourier transform would show."""

_TAIL = 10.0  # standard deviations that dp_accounting keeps: the mass beyond is below exp(-50)
_TAIL_MASS = 1e-15  # what dp_accounting cuts off a composed distribution
_MEASURING_CELLS = 20_000  # of one step, to find out how wide the distribution of all steps will be


def gaussian_epsilon(events: Iterable[Spend], delta: float) -> float:
    """Return the exact ε of ``events`` together as if none were sampled, in [0, ∞]; ``delta`` in (0, 1).

    Where δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) is ``delta`` (Balle & Wang 2018, Theorem 8), with
    μ² = Σ steps/noise_multiplier². 0 where δ(0) is at most ``delta`` already; ∞ for what no float holds.

    It is solved for x = ε/μ - μ/2, as a log, where nothing overflows and nothing large cancels:
    e^ε Φ(-x - μ) = erfcx((x + μ)/√2) e^(-x²/2) / 2, and erfcx is at most 1 here.
    """
    from scipy.special import erfcx, log_ndtr

    mu = _mu(events)

    def log_delta(x: float) -> float:
        first = float(log_ndtr(-x))
        second = math.log(0.5 * float(erfcx((x + mu) / math.sqrt(2)))) - x * x / 2
        return first + math.log(-math.expm1(second - first)) if second < first else -math.inf

    if mu == 0:
        return 0.0
    if mu > 1e150:  # ε is about μ²/2
        return math.inf
    log_target = math.log(delta)
    low, high = -mu / 2, math.sqrt(-2 * log_target)  # ε = 0; and Φ(-x) <= exp(-x²/2)
    if log_delta(low) <= log_target:
        return 0.0
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if log_delta(middle) > log_target else (low, middle)
    return mu * (high + mu / 2)


def pld_epsilon(events: Sequence[Spend], delta: float) -> float:
    """Return an upper bound of the ε of ``events`` together by dp_accounting's privacy loss distributions.

    ∞ where that is not worth its price, as the constants above have it.

    Args:
        events: Events, all different, with noise and steps above 0.
        delta: In (0, 1).
    """
    if delta < PLD_LEAST_DELTA or len(events) > PLD_MOST_EVENTS:
        return math.inf
    if any(event.steps > PLD_MOST_STEPS for event in events):
        return math.inf
    width = 0.0
    for event in events:
        width += _loss_width(event)
        if not width < PLD_WIDEST_LOSS:
            return math.inf

    from dp_accounting.pld import privacy_loss_distribution as library

    interval = max(PLD_FINEST, width / PLD_CELLS)
    composed = library.identity(value_discretization_interval=interval)
    for event in events:
        composed = composed.compose(_one_step(event, interval).self_compose(event.steps, _TAIL_MASS))
    return float(composed.get_epsilon_for_delta(delta))


def _one_step(event: Spend, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as library

    return library.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.sample_rate, value_discretization_interval=interval
    )


def _loss_width(event: Spend) -> float:
    """Return how wide a span of losses dp_accounting will keep for all steps of an event.

    It cuts the tails off by Chernoff's bound, and is asked where, on a coarse grid of one step.
    """
    farthest = _TAIL / event.noise_multiplier + 0.5 / event.noise_multiplier / event.noise_multiplier
    if not PLD_FINEST < farthest < PLD_WIDEST_LOSS / 2:
        return math.inf

    from dp_accounting.pld import common

    interval = max(PLD_FINEST, 2 * farthest / _MEASURING_CELLS)
    one = _one_step(event, interval)
    cells = 1
    for distribution in (one._pmf_remove.to_dense_pmf(), one._pmf_add.to_dense_pmf()):
        bounds = common.compute_self_convolve_bounds(distribution._probs, event.steps, _TAIL_MASS)
        cells = max(cells, distribution.size, bounds[1] - bounds[0] + 1)
    return cells * interval


def _mu(events: Iterable[Spend]) -> float:
    """Return μ: unsampled Gaussian mechanisms together are one whose noise multiplier is 1/μ."""
    try:
        return math.hypot(*(math.sqrt(event.steps) / event.noise_multiplier for event in events))
    except OverflowError:
        return math.inf
