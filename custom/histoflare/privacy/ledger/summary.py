"""What a ledger comes to, for the site's own people: figures, no patients."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from histoflare.privacy.ledger.state import LedgerState
from histoflare.privacy.ledger.tokens import Account, Disclosure
from histoflare.privacy.spend import Spend

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget, Filter


@dataclass(frozen=True)
class RunSummary:
    """One reservation.

    Attributes:
        run: The run's name; a run that reserved twice has two of these.
        about: What the noise protects against, as it was reserved.
        spend: The event of one round.
        rounds, booked, released, failed: Events reserved, booked, released, and answered with a failure.
        is_open: Whether more may be booked. While open, at least ``rounds`` events are charged.
        trusts_server: Whether the protection does not hold against the server.
        patients: Size of the cohort.
        epsilon: Of what is charged for it alone, as ``Summary.epsilon``.
        epsilon_if_all_collude: The same by the second filter.
        trusts_ca: Whether sites were counted on that only the certificate authority vouches for.
    """

    run: str
    about: str
    spend: Spend
    rounds: int
    booked: int
    released: int
    failed: int
    is_open: bool
    trusts_server: bool
    patients: int
    epsilon: float
    epsilon_if_all_collude: float
    trusts_ca: bool = False


@dataclass(frozen=True)
class DisclosureSummary:
    """What left of one run without protection: its evaluations, or its updates.

    Attributes:
        what: ``evaluation`` or ``update``. run: The run's name.
        times: How many of them.
        patients: Of how many patients; the largest number.
        figures: Names of the figures that left. An evaluation that was counted and not let out has none.
        is_counted: Whether they count among the evaluations that a policy with a budget allows.
        first_unix_time, last_unix_time: Of the first and the last.
    """

    what: str
    run: str
    times: int
    patients: int
    figures: tuple[str, ...]
    is_counted: bool
    first_unix_time: int
    last_unix_time: int


@dataclass(frozen=True)
class Spent:
    """What was spent by one filter. Every ε is at the budget's δ and for the most exposed patient.

    Attributes:
        budget_epsilon: What there is.
        rho, allowance: What the most exposed patient was charged, at the filter's order, and may be at most.
        epsilon: ε of ``rho``: the figure by which the next job is admitted.
        epsilon_rdp: ε of the same events by RDP at the best order, which is chosen afterwards.
        epsilon_pld: ε of the same events by PLD: tight if no job was chosen by results. Admits nothing.
        remaining: Share of the budget that is left, 0 to 1.
    """

    budget_epsilon: float
    rho: float
    allowance: float
    epsilon: float
    epsilon_rdp: float
    epsilon_pld: float
    remaining: float


@dataclass(frozen=True)
class Summary(Spent):
    """A whole ledger beside a budget; what is spent is that of the budget's first filter.

    Attributes:
        delta: Of the budget.
        patients: Known patients, of any role.
        runs: In order of reservation.
        disclosures: Evaluations under a budget that left, and the most that one patient had part in.
        colluders: Against the server and how many colluding sites the first filter counts.
        sites_per_patient: At how many sites of a sum a patient is counted.
        if_all_collude: What was spent by the second; None: no noise is shared, and both are the same.
    """

    delta: float
    patients: int
    runs: tuple[RunSummary, ...]
    disclosures: int
    most_disclosures: int
    colluders: int
    sites_per_patient: int
    if_all_collude: Spent | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what is infinite is the text ``"inf"``, JSON has no number for it."""
        content: dict[str, Any] = _finite(asdict(self))
        return content


def summarise(state: LedgerState, budget: Budget) -> Summary:
    """Return what a verified state comes to beside a budget."""
    first, second = budget.filters()
    is_shared = any(account.reservation.spend.honest > 1 for account in state.accounts.values())
    return Summary(
        **vars(_spent(state, first)),
        delta=budget.delta,
        patients=len(state.roles),
        runs=tuple(_summarise_run(account, budget) for account in state.accounts.values()),
        disclosures=len(state.counted),
        most_disclosures=int(state.disclosed().max(initial=0)),
        colluders=budget.colluders,
        sites_per_patient=budget.sites_per_patient,
        if_all_collude=_spent(state, second) if is_shared else None,
    )


def _spent(state: LedgerState, kept: Filter) -> Spent:
    charges, budget = state.charges(kept), kept.budget
    rho = float(charges.max(initial=0.0))
    spends = _most_exposed(state, charges, kept)
    return Spent(
        budget_epsilon=budget.epsilon,
        rho=rho,
        allowance=budget.allowance,
        epsilon=budget.epsilon_of(rho),
        epsilon_rdp=_epsilon(spends, budget.delta, "rdp"),
        epsilon_pld=_epsilon(spends, budget.delta, "pld"),
        remaining=_remaining(rho, budget.allowance),
    )


def summarise_disclosures(state: LedgerState) -> tuple[DisclosureSummary, ...]:
    """Return what left without protection, by run and kind, in the order of their first entries."""
    by_run: dict[tuple[str, str, bool], list[Disclosure]] = {}
    for each in sorted([*state.counted.values(), *state.noted.values()], key=lambda each: each.id):
        by_run.setdefault((each.what, each.run, each.is_counted), []).append(each)
    return tuple(
        DisclosureSummary(
            what=what,
            run=run,
            times=len(found),
            patients=max(each.patients for each in found),
            figures=tuple(sorted({name for each in found for name in state.figures.get(each.id, ())})),
            is_counted=is_counted,
            first_unix_time=found[0].unix_time,
            last_unix_time=found[-1].unix_time,
        )
        for (what, run, is_counted), found in by_run.items()
    )


def _summarise_run(account: Account, budget: Budget) -> RunSummary:
    reservation = account.reservation
    first, second = budget.filters()
    return RunSummary(
        run=reservation.run,
        about=reservation.about,
        spend=reservation.spend,
        rounds=reservation.rounds,
        booked=account.booked,
        released=account.released,
        failed=account.failed,
        is_open=account.is_open,
        trusts_server=reservation.trusts_server,
        patients=reservation.patients,
        epsilon=first.budget.spent(account.charged(first)),
        epsilon_if_all_collude=second.budget.spent(account.charged(second)),
        trusts_ca=reservation.trusts_ca,
    )


def _most_exposed(
    state: LedgerState, charges: np.ndarray[Any, np.dtype[np.float64]], kept: Filter
) -> list[Spend]:
    """Return the events that the most exposed patient is charged, each spend once with all its steps."""
    if not len(charges):
        return []
    index = int(charges.argmax())
    steps: dict[Spend, int] = {}
    for account in state.accounts.values():
        members = state.members(account.cohort)
        if index < len(members) and members[index]:
            for spend in account.charged(kept):
                one = replace(spend, steps=1)
                steps[one] = steps.get(one, 0) + spend.steps
    return [one.times(count) for one, count in steps.items()]


def _epsilon(spends: list[Spend], delta: float, accountant: str) -> float:
    from histoflare.privacy.accountant import epsilon

    spends = [spend for spend in spends if spend.steps]
    return epsilon(spends, delta, accountant) if spends else 0.0


def _remaining(rho: float, allowance: float) -> float:
    if math.isinf(allowance):
        return 1.0
    return max(0.0, 1.0 - rho / allowance) if allowance else 0.0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
