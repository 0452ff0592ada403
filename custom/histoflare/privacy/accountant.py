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

MOST_DELTA = 0.1
"""A δ is the chance of no protection at all, and has to be well below 1 ÷ the number of patients: nobody
protects fewer than ten."""

_MOST_POINTS = 20_000
"""Of a quadrature; noise so little that it takes more protects nobody, and its ρ is bounded more plainly."""

_ROUNDING = 1e-14
"""Added to a sampled step's ρ, absolutely and relatively: ten times its rounding error in float64."""


def epsilon(spends: Iterable[Spend], delta: float, accountant: str = "rdp") -> float:
    """Return the ε of all ``spends`` together at ``delta``, in [0, ∞]; see :func:`count`.

    >>> from histoflare import DpSgd, epsilon
    >>> plan = DpSgd(noise_multiplier=4.0, sample_rate=0.1, batch_size=8, steps=2)
    >>> 0 < epsilon([plan.spend()] * 20, delta=1e-5) < epsilon([plan.spend()] * 40, delta=1e-5)
    True
    """
    return count(spends, delta, accountant)[0]


def count(spends: Iterable[Spend], delta: float, accountant: str = "rdp") -> tuple[float, str]:
    """Return the ε of all ``spends`` together at ``delta``, in [0, ∞], and whose figure it is.

    The latter is ``accountant`` itself, or for ``pld`` the accountant whose plainer bound stands in for it.
    ``pld`` never answers with more than ``rdp``, and no parameter of an event decides its time (some
    seconds at most) or memory (some 100 MB): it returns

    * the exact Gaussian figure where no event is sampled;
    * otherwise the least of three upper bounds: RDP's, the exact one of the same events without sampling
      (a sampled step is an unsampled one whose output is now and then replaced), and PLD's;
    * without PLD's where its distribution would not be worth making: an ε in the hundreds of thousands, noise
      above 100,000, an event over 100,000 steps, more than 8 different events, or a δ below 1e-10 (the
      bounds of :mod:`~histoflare.privacy.privacy_loss`).

    Args:
        spends: The events; their order does not matter.
        delta: Above 0, at most :data:`MOST_DELTA`.
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
        return 0.0, accountant
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf, accountant
    if accountant == "gaussian" or (accountant == "pld" and unsampled):
        return gaussian_epsilon(events, delta), "gaussian"
    library = _rdp_library()
    orders = library.DEFAULT_RDP_ORDERS
    totals = [sum(rdp(event, order) for event in events) for order in orders]
    bound = float(library.compute_epsilon(orders, totals, delta)[0])
    if accountant == "rdp":
        return bound, "rdp"
    figures = {"pld": pld_epsilon(events, delta), "rdp": bound, "gaussian": gaussian_epsilon(events, delta)}
    least = min(figures, key=lambda name: figures[name])
    return figures[least], least


def calibrate(
    target_epsilon: float, delta: float, *, sample_rate: float, steps: int, accountant: str = "rdp"
) -> float:
    """Return the least noise multiplier with which an event costs at most ``target_epsilon`` at ``delta``.

    Found to about 2e-4 of itself and rounded up to five digits, so that the event never costs more.
    0.0 for 0 steps, and never below :data:`LEAST_NOISE` otherwise.

    Args:
        target_epsilon: Above 0, finite.
        delta: Above 0, at most :data:`MOST_DELTA`.
        sample_rate: In (0, 1].
        steps: At least 0.
        accountant: One of :data:`ACCOUNTANTS`; ``gaussian`` needs sample_rate 1.

    Raises:
        JobError: An argument is out of its range, or it takes more noise than :data:`MOST_NOISE`
            (PRIVACY_INVALID).

    >>> from histoflare import DpSgd, calibrate, epsilon
    >>> noise = calibrate(8.0, 1e-5, sample_rate=0.1, steps=500)
    >>> plan = DpSgd(noise_multiplier=noise, sample_rate=0.1, steps=500)
    >>> 7.9 < epsilon([plan.spend()], delta=1e-5) <= 8.0
    True
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
    if not 0 < delta <= MOST_DELTA:
        raise JobError(
            f"delta: a number above 0 and at most {MOST_DELTA}, not {delta!r}; it has to be well below 1 ÷ "
            "the number of patients",
            reason="PRIVACY_INVALID",
        )
    if accountant not in ACCOUNTANTS:
        raise JobError(
            f"accountant: one of {', '.join(ACCOUNTANTS)}, not {accountant!r}", reason="PRIVACY_INVALID"
        )


@lru_cache(maxsize=16384)
def _step_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Return ρ of one step: dp_accounting's at whole orders, the log of its moment ÷ (α - 1) between them.

    Between whole orders dp_accounting sums the moduli of an alternating series, which is at times far above
    the moment, and ∞ where the sum does not converge: its ε rose where noise grew. A quadrature is exact.
    """
    squared = noise_multiplier * noise_multiplier
    unsampled = order / (2 * squared) if squared > 0 else math.inf
    if sample_rate == 1 or not _ROUNDING < unsampled < 1e300:
        return unsampled
    if order != math.floor(order):
        log_moment = _log_moment(noise_multiplier, sample_rate, order)
        return min(unsampled, (log_moment * (1 + _ROUNDING) + _ROUNDING) / (order - 1))
    library = _rdp_library()
    (value,) = library._compute_rdp_poisson_subsampled_gaussian(sample_rate, noise_multiplier, [order])
    # Rounding may take a tiny ρ below 0.
    bounds = [unsampled, max(0.0, float(value)) * (1 + _ROUNDING) + _ROUNDING]
    return min(bound for bound in bounds if not math.isnan(bound))


def _log_moment(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Return ln E[((1 - q) + q e^((2x - 1)/(2z²)))^α] over x ~ N(0, z²), for α above 1, or a bound of it.

    By the trapezoid rule, whose error falls as exp(-2π a/h) with the step h, where a is how far the integrand
    is analytic beside the real line: π z², where the base of the power is 0. With h = z²/2, and z/4 for
    large z, that is below float64's rounding. For the little noise that takes too many points, above 2 the
    chord between two whole orders (the log of a moment is convex in α); below 2 termwise
    (a + b)^α <= a^α + α a^(α-1) b + b^α, which for so little noise is nearly exact.
    """
    import numpy as np
    from scipy.special import logsumexp

    z, q = noise_multiplier, sample_rate
    step = min(z * z / 2, z / 4)
    low, high = -12 * z, order + 12 * z  # beyond lies less than exp(-70) of the moment
    if not (high - low) / step < _MOST_POINTS:
        below = math.floor(order)
        if below >= 2:
            lower = (below - 1) * _step_rdp(z, q, below)
            return lower + (order - below) * (below * _step_rdp(z, q, below + 1) - lower)
        whole = order * math.log(q) + order * (order - 1) / 2 / z / z
        rest = (order - 1) * math.log1p(-q) + math.log(1 - q + order * q)
        return float(np.logaddexp(whole, rest))
    x = np.arange(low, high, step)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (x - 0.5) / (z * z))  # (points,)
    log_mass = -x * x / (2 * z * z) + math.log(step / (z * math.sqrt(2 * math.pi)))  # (points,)
    if order * log_ratio.max() > 300:
        return max(0.0, float(logsumexp(order * log_ratio + log_mass)))
    # Since E[ratio] = 1, this is the moment - 1, without its cancellation; no term is below 0.
    excess = np.expm1(order * log_ratio) - order * np.expm1(log_ratio)  # (points,)
    return math.log1p(max(0.0, float(np.sum(np.exp(log_mass) * excess))))


def _rdp_library() -> Any:
    from dp_accounting.rdp import rdp_privacy_accountant

    return rdp_privacy_accountant
