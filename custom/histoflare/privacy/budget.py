"""How much a site lets out in all: a privacy filter for jobs that are chosen after seeing earlier results.

The next job is chosen after seeing what earlier ones released, so its cost depends on outcomes. Adding up
costs and stopping at a bound is then not private for every notion of cost. It is for Rényi DP of one order α
fixed beforehand: if jobs stop before Σ ρ(α) exceeds a bound, all of them together are (α, bound)-RDP
(Feldman & Zrnic 2021, Individual Privacy Accounting via a Rényi Filter).

The order must be fixed: "the best of many orders at the end" would let the order of the certificate depend on
the outcomes, and the theorem says nothing of that. So :class:`Budget` takes its order from (ε, δ) alone.

Nor may it depend on the job against whom a figure holds. Where sites share their noise, what an event costs
depends on how many of them collude with the server. A budget therefore has two filters, each against one
adversary for all jobs and each with its own order (:meth:`Budget.filters`): the server together with so many
sites, and all other sites together. Only what both have room for is admitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from histoflare.checks import is_above_zero, is_whole
from histoflare.errors import JobError, list_lines
from histoflare.privacy.accountant import MOST_DELTA, least_noise, rdp
from histoflare.privacy.sampler import sampler_delta
from histoflare.privacy.spend import Spend

ORDERS: tuple[float, ...] = (
    *(1 + hundredths / 100 for hundredths in range(2, 10)),
    *(tenths / 10 for tenths in range(11, 110)),
    *range(11, 256),
    *(math.floor(256 * 2 ** (eighths / 8)) for eighths in range(49)),
)
"""The orders a budget chooses from: by hundredths from 1.02, by tenths from 1.1, whole from 11, in eighths of
an octave from 256 to 16,384. A change of this grid changes what old budgets allow."""

MOST_OF_SAMPLER = 0.1
"""Of δ: a job whose noise takes a greater part of it, because no sampler is ideal, is refused."""

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Budget:
    """(ε, δ) differential privacy for everything that is ever booked on it, in an order chosen as one goes.

    The guarantee: while :meth:`admits` held for the total before each job, all jobs together are
    (``order``, ``allowance`` · (1 + 1e-9))-RDP, so (``epsilon``, ``delta``)-DP up to that 1e-9 of the
    allowance, for one patient with all slides, add or remove one.

    Attributes:
        epsilon: Above 0, finite. Of what the server and ``colluders`` sites see.
        delta: In (0, 0.1].
        colluders: How many of the sites that a site counts on may collude with the server; at least 1, as
            each of them sees the sum and knows its own noise.
        all_collude_epsilon: ε of the second filter, in which all other sites collude; None: ``epsilon``.
        sites_per_patient: At how many sites of one sum a patient may be; what the sites vouch for. It counts
            for shared noise, to which the patient's contributions at all of them add up. Noise of a site's
            own is booked in each site's own ledger.

    Raises:
        JobError: A number is out of its range, or the two allow nothing at any order (PRIVACY_INVALID).
    """

    epsilon: float
    delta: float
    colluders: int = 1
    all_collude_epsilon: float | None = None
    sites_per_patient: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not is_above_zero(self.epsilon):
            problems.append(f"epsilon: a number above 0 and not infinite, not {self.epsilon!r}")
        if not is_above_zero(self.delta, MOST_DELTA):
            problems.append(f"delta: a number above 0 and at most {MOST_DELTA}, not {self.delta!r}")
        if not is_whole(self.colluders, 1):
            problems.append(f"colluders: a whole number of at least 1, not {self.colluders!r}")
        if not is_whole(self.sites_per_patient, 1):
            problems.append(
                f"sites_per_patient: a whole number of at least 1, not {self.sites_per_patient!r}"
            )
        if not (self.all_collude_epsilon is None or is_above_zero(self.all_collude_epsilon)):
            problems.append(f"all_collude_epsilon: a number above 0, not {self.all_collude_epsilon!r}")
        if problems:
            raise JobError(
                f"This is no privacy budget; correct:{list_lines(problems)}", reason="PRIVACY_INVALID"
            )
        if not self.allowance > 0:
            raise JobError(
                f"A budget of epsilon {self.epsilon:g} at delta {self.delta:g} allows nothing at any Rényi "
                f"order up to {ORDERS[-1]:,}: raise epsilon, or delta.",
                reason="PRIVACY_INVALID",
            )

    @property
    def if_all_collude(self) -> Budget:
        """The budget of the second filter, as one by itself."""
        return Budget(self.all_collude_epsilon or self.epsilon, self.delta)

    def filters(self) -> tuple[Filter, Filter]:
        """Return the two filters that must both have room, the one against fewer sites first."""
        k = self.sites_per_patient
        return Filter(self, self.colluders, k), Filter(self.if_all_collude, None, k)

    @property
    def order(self) -> float:
        """The Rényi order α in which this budget counts, above 1; from (``epsilon``, ``delta``) alone.

        It is the order of :data:`ORDERS` at which most unsampled Gaussian noise fits: there ρ(α) = α r, and
        r is largest. Sampled jobs would fit a little better at another one.
        """
        return _order(self.epsilon, self.delta)

    @property
    def allowance(self) -> float:
        """The most ρ at ``order``, above 0: what converts to ``epsilon``."""
        return self.epsilon - _conversion(self.order, self.delta)

    def cost(self, spend: Spend) -> float:
        """Return the event's ρ at ``order``, in [0, ∞]; costs are added up.

        Shared noise counts as its noise multiplier says; :meth:`Filter.price` says what it is against whom.
        """
        return rdp(spend, self.order)

    def epsilon_of(self, rho: float) -> float:
        """Return the ε at ``delta`` of a total ``rho`` at ``order``, in [0, ∞]; 0 for 0 and ∞ for ∞.

        Canonne, Kamath & Steinke 2020, Proposition 12. Any ``rho`` above 0 costs the conversion's own share
        at once: half an allowance is more than half of ``epsilon``.

        Raises:
            JobError: ``rho`` is negative or NaN (PRIVACY_INVALID).
        """
        if not rho >= 0:
            raise JobError(f"rho: a number of at least 0, not {rho!r}", reason="PRIVACY_INVALID")
        return max(0.0, rho + _conversion(self.order, self.delta)) if rho > 0 else 0.0

    def spent(self, spends: Iterable[Spend]) -> float:
        """Return the ε that events together spend of this budget, in [0, ∞].

        This is the one figure by which jobs are admitted, and the one that plans, ledgers and reports show.
        It does not add up: the first event of all costs the conversion's own share. What adds up are shares
        of the allowance (:meth:`share_of`).
        """
        return self.epsilon_of(math.fsum(self.cost(spend) for spend in spends))

    def share_of(self, rho: float) -> float:
        """Return which part of the allowance a total ``rho`` takes, from 0 on; shares of jobs add up."""
        return rho / self.allowance

    def room_for(self, cost: float, spent: float = 0.0) -> int | None:
        """Return how many jobs of ρ = ``cost`` fit after ρ = ``spent``; None: any number, they cost nothing.

        Raises:
            JobError: A number is negative or NaN (PRIVACY_INVALID).
        """
        if not (cost >= 0 and spent >= 0):
            raise JobError(f"Costs are at least 0, not {cost!r} and {spent!r}", reason="PRIVACY_INVALID")
        if cost == 0:
            return None
        if not self.admits(spent + cost):
            return 0
        most = int((self.allowance * (1 + _TOLERANCE) - spent) / cost)
        return most if self.admits(spent + most * cost) else most - 1

    def admits(self, rho: float, share: float = 1.0) -> bool:
        """Return whether a total ``rho`` at ``order`` is within a share of the allowance; never for ∞ or NaN.

        Up to 1e-9 of the allowance too much is let pass: a job calibrated to the whole budget, or costs that
        were added up in another order, must not fail by a rounding.
        """
        return rho <= share * self.allowance * (1 + _TOLERANCE)

    def sampler_delta(self, numbers: int) -> float:
        """Return what ``numbers`` samples take of ``delta``, in [0, 1]; see ``privacy.sampler``."""
        return sampler_delta(self.epsilon, numbers)

    def without_sampler(self, numbers: int) -> Budget:
        """Return this budget with what is left of ``delta`` beside the part that ``numbers`` samples take.

        Raises:
            JobError: That part is more than a tenth of ``delta`` (PRIVACY_INVALID).
        """
        taken = self.sampler_delta(numbers)
        if taken > MOST_OF_SAMPLER * self.delta:
            raise JobError(
                f"Drawing {numbers:,} numbers of noise takes {taken:.2g} of δ = {self.delta:g} at "
                f"ε = {self.epsilon:g}, more than a tenth: no sampler is ideal, and the difference counts "
                "1 + e^ε times. Ask for a smaller ε, for fewer rounds or steps, or for a smaller model.",
                reason="PRIVACY_INVALID",
            )
        return replace(self, delta=self.delta - taken)

    def calibrate(self, sample_rate: float, steps: int, share: float = 1.0) -> float:
        """Return the least noise multiplier with which an event takes at most a share of the allowance.

        Found to about 2e-4 of itself and rounded up; 0.0 for 0 steps.

        Args:
            sample_rate: In (0, 1].
            steps: At least 0.
            share: Of the allowance, in (0, 1]; 1: all of it.

        Raises:
            JobError: An argument is out of its range, or it takes a noise multiplier above a million
                (PRIVACY_INVALID).
        """
        if not 0 < share <= 1:
            raise JobError(f"share: above 0 and at most 1, not {share!r}", reason="PRIVACY_INVALID")
        return least_noise(
            lambda noise: self.cost(Spend(noise, sample_rate, steps)) <= share * self.allowance,
            f"a share of {share:g} of a budget of epsilon {self.epsilon:g} at delta {self.delta:g} with "
            f"{steps} steps at sample rate {sample_rate:g}",
        )


@dataclass(frozen=True)
class Filter:
    """A budget kept against one adversary, the same for all jobs: the server together with some sites.

    Attributes:
        budget: What there is; of the first filter's other numbers nothing counts here.
        colluders: How many of the sites that a site counts on collude with the server; None: all others.
        sites_per_patient: At how many sites of a sum the patient is.
    """

    budget: Budget
    colluders: int | None
    sites_per_patient: int = 1

    def price(self, spend: Spend, countable: int | None = None) -> Spend:
        """Return what an event is against this adversary.

        Args:
            spend: As it was planned.
            countable: On how many sites of the sum the site counted, itself included. None: not booked yet;
                priced at the fewest sites with which it would be (``spend.honest`` beside the colluders).
        """
        if spend.honest == 1:
            return spend
        honest = 1
        if self.colluders is not None:
            honest = spend.honest if countable is None else countable - self.colluders
        return spend.against(honest).together(self.sites_per_patient)

    def cost(self, spends: Iterable[Spend]) -> float:
        """Return the ρ of priced events together, in [0, ∞]."""
        return math.fsum(self.budget.cost(spend) for spend in spends)

    def whom(self) -> str:
        """Return against whom it holds, in words."""
        k = self.sites_per_patient
        patient = f", for a patient of up to {k} sites" if k > 1 else ""
        if self.colluders is None:
            return f"all other sites, should all of them collude with the server{patient}"
        return f"the server and any {self.colluders} other site{'s' if self.colluders > 1 else ''}{patient}"


@lru_cache(maxsize=256)
def _order(epsilon: float, delta: float) -> float:
    return max(ORDERS, key=lambda order: (epsilon - _conversion(order, delta)) / order)


def _conversion(order: float, delta: float) -> float:
    """Return ε - ρ at one order (Canonne, Kamath & Steinke 2020, Proposition 12)."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
