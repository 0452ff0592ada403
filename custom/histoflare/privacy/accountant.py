"""From events to ε: three accountants over the same :class:`~histoflare.privacy.spend.Spend`.

All figures are (ε, δ) differential privacy for one patient with all of that patient's slides, cohorts
differing by that patient (add or remove one). Each is an upper bound, and holds for events that were fixed
beforehand; for jobs chosen after earlier results see :class:`~histoflare.privacy.budget.Budget`.

* ``rdp``: Rényi DP (Mironov 2017; sampled: Mironov, Talwar & Zhang 2019). Valid for every event and quick.
* ``pld``: privacy loss distributions (dp_accounting). The tight figure, where it is worth its price:
  see :func:`epsilon`.
* ``gaussian``: the exact figure (Balle & Wang 2018), only where nothing is sampled.

======================================  ==========================================================
Event                                   ε
======================================  ==========================================================
none, or 0 steps                        0
noise_multiplier 0, at least one step   ∞ (no protection, whatever the sample rate)
a figure too large for a float          ∞
======================================  ==========================================================
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from histoflare.errors import JobError
from histoflare.privacy.privacy_loss import gaussian_epsilon, pld_epsilon
from histoflare.privacy.spend import Spend

ACCOUNTANTS = ("rdp", "pld", "gaussian")

LEAST_NOISE = 1e-6
MOST_NOISE = 1e6
"""Between these a noise multiplier is looked for. Noise beyond leaves nothing to learn from."""

_ROUNDING = 1e-14
"""Added to a sampled step's ρ, absolutely and relatively: ten times its rounding error in float64."""


def epsilon(spends: Iterable[Spend], delta: float, accountant: str = "rdp") -> float:
    """Return the ε of all ``spends`` together at ``delta``, in [0, ∞].

    ``pld`` never answers with more than ``rdp``, and no parameter of an event decides its time (some
    seconds at most) or memory (some 100 MB): it returns

    * the exact Gaussian figure where no event is sampled;
    * otherwise the least of three upper bounds: RDP's, the exact one of the same events without sampling
      (a sampled step is an unsampled one whose output is now and then replaced), and PLD's;
    * without PLD's where its distribution would not be worth making: losses wider than 2,000 (ε in the
      hundreds), noise above 100,000, an event over 100,000 steps, more than 8 different events, or a δ below
      1e-10 (the bounds of :mod:`~histoflare.privacy.privacy_loss`).

    Args:
        spends: The events; their order does not matter.
        delta: In (0, 1), both ends excluded.
        accountant: One of :data:`ACCOUNTANTS`.

    Raises:
        JobError: ``delta`` or ``accountant`` is none, or ``gaussian`` is asked of a sampled event
            (PRIVACY_INVALID).
    """
    _check(delta, accountant)
    steps: Counter[tuple[float, float]] = Counter()
    for spend in spends:
        if spend.steps > 0:
            steps[spend.noise_multiplier, spend.sample_rate] += spend.steps
    events = [Spend(noise, rate, n) for (noise, rate), n in steps.items()]
    unsampled = all(event.sample_rate == 1 for event in events)
    if accountant == "gaussian" and not unsampled:
        raise JobError(
            "The exact Gaussian figure is only for events without sampling (sample_rate 1); ask for rdp or "
            "pld.",
            reason="PRIVACY_INVALID",
        )
    if not events:
        return 0.0
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    if accountant == "gaussian" or (accountant == "pld" and unsampled):
        return gaussian_epsilon(events, delta)
    library = _rdp_library()
    orders = library.DEFAULT_RDP_ORDERS
    rhos = {event: [rdp(event, order) for order in orders] for event in events}
    totals = [sum(of_order) for of_order in zip(*rhos.values(), strict=True)]
    bound = float(library.compute_epsilon(orders, totals, delta)[0])
    if accountant == "rdp" or bound == math.inf:
        return bound
    pairs = {event: list(zip(orders, rhos[event], strict=True)) for event in events}
    return min(bound, gaussian_epsilon(events, delta), pld_epsilon(pairs, delta))


def calibrate(
    target_epsilon: float, delta: float, *, sample_rate: float, steps: int, accountant: str = "rdp"
) -> float:
    """Return the least noise multiplier with which an event costs at most ``target_epsilon`` at ``delta``.

    Found to about 2e-4 of itself and rounded up to five digits, so that the event never costs more.
    0.0 for 0 steps, and never below :data:`LEAST_NOISE` otherwise.

    Args:
        target_epsilon: Above 0, finite.
        delta: In (0, 1).
        sample_rate: In (0, 1].
        steps: At least 0.
        accountant: One of :data:`ACCOUNTANTS`; ``gaussian`` needs sample_rate 1.

    Raises:
        JobError: An argument is out of its range, or it takes more noise than :data:`MOST_NOISE`
            (PRIVACY_INVALID).
    """
    _check(delta, accountant)
    if not 0 < target_epsilon < math.inf:
        raise JobError(
            f"target_epsilon: a number above 0 and not infinite, not {target_epsilon!r}",
            reason="PRIVACY_INVALID",
        )

    def fits(noise_multiplier: float, by: str = accountant) -> bool:
        return epsilon([Spend(noise_multiplier, sample_rate, steps)], delta, by) <= target_epsilon

    what = f"epsilon {target_epsilon:g} at delta {delta:g} with {steps} steps at sample rate {sample_rate:g}"
    if accountant != "pld" or sample_rate == 1:
        return least_noise(fits, what)
    # PLD is never above RDP: RDP's noise is an upper end, from which it is not far down.
    high = least_noise(lambda noise: fits(noise, "rdp"), what)
    low = high
    while low > LEAST_NOISE and fits(low):
        high, low = low, 0.9 * low
    return least_noise(fits, what, low, high)


def rdp(spend: Spend, order: float) -> float:
    """Return ρ: the event is (``order``, ρ)-RDP. In [0, ∞].

    0 steps give 0; noise 0, and whatever is too large for a float, give ∞. Unsampled steps give
    steps · order / (2 · noise_multiplier²) exactly (Mironov 2017, Proposition 7). A sampled step never costs
    more than an unsampled one (quasi-convexity of the Rényi divergence).

    Args:
        spend: The event.
        order: Above 1, finite.

    Raises:
        JobError: ``order`` is none (PRIVACY_INVALID).
    """
    if not 1 < order < math.inf:
        raise JobError(f"order: a number above 1 and not infinite, not {order!r}", reason="PRIVACY_INVALID")
    if spend.steps == 0:
        return 0.0
    try:
        steps = float(spend.steps)
    except OverflowError:  # more than any float
        return math.inf
    return steps * _step_rdp(spend.noise_multiplier, spend.sample_rate, float(order))


def least_noise(
    fits: Callable[[float], bool], what: str, low: float = LEAST_NOISE, high: float = MOST_NOISE
) -> float:
    """Return the least noise multiplier between ``low`` and ``high`` that ``fits``, by bisection of its log.

    ``fits`` should be false up to some noise and true from there on. The result was tried and fits; it is at
    most about 2e-4 of itself too large.

    Args:
        what: What is asked for, for the error.

    Raises:
        JobError: Not even ``high`` fits (PRIVACY_INVALID).
    """
    if fits(0.0):
        return 0.0
    if fits(low):
        return low
    if not fits(high):
        raise JobError(
            f"There is no use in this: {what} takes a noise multiplier above {high:g}. Ask for fewer steps, "
            "or allow a larger epsilon.",
            reason="PRIVACY_INVALID",
        )
    while high > low * (1 + 1e-4):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    digits = 4 - math.floor(math.log10(high))
    rounded = math.ceil(high * 10.0**digits) / 10.0**digits
    return rounded if fits(rounded) else high


def _check(delta: float, accountant: str) -> None:
    if not 0 < delta < 1:
        raise JobError(f"delta: a number above 0 and below 1, not {delta!r}", reason="PRIVACY_INVALID")
    if accountant not in ACCOUNTANTS:
        raise JobError(
            f"accountant: one of {', '.join(ACCOUNTANTS)}, not {accountant!r}", reason="PRIVACY_INVALID"
        )


@lru_cache(maxsize=16384)
def _step_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Return ρ of one step.

    dp_accounting's value is exact at whole orders. Between them it sums the moduli of an alternating series:
    an upper bound, at times a poor one, and ∞ where the sum does not converge (sample_rate 0.5). There
    (α - 1) ρ(α), the log of a moment, is convex in α and 0 at 1, so its chord is another.
    """
    squared = noise_multiplier * noise_multiplier
    unsampled = order / (2 * squared) if squared > 0 else math.inf
    if sample_rate == 1 or not _ROUNDING < unsampled < 1e300:
        return unsampled
    library = _rdp_library()
    (value,) = library._compute_rdp_poisson_subsampled_gaussian(sample_rate, noise_multiplier, [order])
    # Rounding may take a tiny ρ below 0.
    bounds = [unsampled, max(0.0, float(value)) * (1 + _ROUNDING) + _ROUNDING]
    below = math.floor(order)
    if below < order:
        lower = (below - 1) * _step_rdp(noise_multiplier, sample_rate, below) if below > 1 else 0.0
        upper = below * _step_rdp(noise_multiplier, sample_rate, below + 1)
        bounds.append((lower + (order - below) * (upper - lower)) / (order - 1))
    return min(bound for bound in bounds if not math.isnan(bound))


def _rdp_library() -> Any:
    """Return dp_accounting's module; it would warn on stderr of each order between two whole ones."""
    from dp_accounting.rdp import rdp_privacy_accountant

    logging.getLogger("absl").addFilter(_is_worth_saying)
    return rdp_privacy_accountant


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("_compute_log_a_frac failed to converge")
