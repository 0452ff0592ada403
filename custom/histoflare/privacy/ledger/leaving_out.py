"""Who is left out of a job because there is no room, where a policy leaves out and does not refuse.

Guarantee: an individual Rényi filter (Feldman and Zrnic, Individual Privacy Accounting via a Rényi Filter,
2021). A patient takes part in a job if what the patient was charged and the job's whole cost are within the
allowance, by each of the budget's filters. Then all jobs together are within (ε, δ) for each patient, and
that includes who was left out, of what and when. What the theorem asks for, and where it is:

- *Charges from the patient's own data and earlier outcomes alone.* A job's cost follows from its public
  numbers; a patient is charged it or nothing, by the patient's own part in the cohort. Sums are exact and
  rounded once (``LedgerState.charges``), so no other patient moves the last bit.
- *The choice, too.* Whether a patient is in is decided by that patient's charges alone, and once for a run:
  whoever asks again, after a crash or with another manifest, gets the cohort of the first time, less those
  who are gone. (To decide again would count the run against itself; and one patient more in the manifest
  would make a second reservation, which charges all the others a second time.)
- *Nothing else depends on it.* What is refused follows from public numbers: a job that nobody could pay, and
  a round beyond those that were reserved. A job of which everybody is left out is trained on nobody, and
  what leaves is noise.

Not so, and refused (LEAVE_OUT_UNSOUND): see :func:`refuse_unsound`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from histoflare.errors import LedgerError
from histoflare.privacy.ledger.rules import refuse_over_budget, refuse_share
from histoflare.privacy.ledger.state import LedgerState
from histoflare.privacy.ledger.tokens import Account, Reservation
from histoflare.privacy.spend import Spend

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget


def refuse_unsound(state: LedgerState, budget: Budget, *, trusts_server: bool) -> None:
    """Refuse to leave anybody out where that is not covered by ε.

    Args:
        trusts_server: Whether the server sees updates without noise.

    Raises:
        LedgerError: One of these (LEAVE_OUT_UNSOUND). The server sees updates without noise, and so who is
            missing. A patient may be at several sites of a sum: left out at one, the patient stays at the
            others, and the two ledgers are no longer about the same sums. Or a run is open that was reserved
            twice, for other patients each time, by a policy that refuses: what it charges each of them
            depends on who else was in the manifest in between.
    """
    why = None
    if trusts_server:
        why = "the server sees the updates of this job without noise"
    elif budget.sites_per_patient > 1:
        why = "a patient may be at several sites of a sum (sites_per_patient), and would stay at the others"
    else:
        doubled = _doubled(state)
        if doubled is not None:
            why = (
                f"run {doubled!r} was reserved twice, for other patients the second time, and is open: close "
                "it (histoflare ledger close)"
            )
    if why is not None:
        raise LedgerError(
            f"Nobody can be left out unnoticed here: {why}. Else the policy must say that a job is refused "
            '(exhausted = "refuse").',
            reason="LEAVE_OUT_UNSOUND",
        )


def refuse_public(budget: Budget, spend: Spend, rounds: int, job_share: float) -> None:
    """Refuse a job that nobody could pay: that follows from public numbers, and tells nothing.

    Raises:
        LedgerError: It costs more than a whole budget (BUDGET_EXHAUSTED), or than the share of it that one
            job may take (JOB_SHARE_EXCEEDED).
    """
    for kept in budget.filters():
        cost = kept.cost([kept.price(spend).times(rounds)])
        refuse_over_budget(kept, 0.0, cost, "this job", spend.honest > 1)
        refuse_share(kept, cost, job_share, spend.honest > 1)


def with_room(
    state: LedgerState,
    ids: Mapping[str, int | None],
    *,
    budget: Budget,
    spend: Spend,
    rounds: int,
    job_share: float = 1.0,
    run: str | None = None,
) -> set[str]:
    """Return the names of those who have room for a new job, each by the own charges alone.

    Args:
        ids: Name → the patient's number; None: one whom the ledger has not met.
        budget, spend, rounds, job_share: As for ``Ledger.reserve``.
        run: What the run has charged a patient already counts in its share; None: it is a new one.
    """
    found = set(ids)
    for kept in budget.filters():
        cost = kept.cost([kept.price(spend).times(rounds)])
        charged = state.charges(kept)
        of_run = np.zeros(len(charged)) if run is None else state.charges(kept, run=run)
        for name, number in ids.items():
            before, own = (0.0, 0.0) if number is None else (charged[number - 1], of_run[number - 1])
            if not kept.budget.admits(float(before) + cost):
                found.discard(name)
            if not kept.budget.admits(float(own) + cost, job_share):
                found.discard(name)
    return found


def same_run(state: LedgerState, asked: tuple[object, ...], role: str) -> Account | None:
    """Return the open account of a run that leaves out, whoever is in its cohort; None if there is none.

    Args:
        asked: The reservation's (run, about, spend, rounds, trusts_server, trusts_ca).
        role: Of its patients.
    """
    for account in state.accounts.values():
        reservation = account.reservation
        if (
            account.is_open
            and reservation.leaves_out
            and account.role == role
            and key_of(reservation) == asked
        ):
            return account
    return None


def key_of(reservation: Reservation) -> tuple[object, ...]:
    """Return by what a reservation is known again, beside its cohort."""
    return (
        reservation.run,
        reservation.about,
        reservation.spend,
        reservation.rounds,
        reservation.trusts_server,
        reservation.trusts_ca,
    )


def not_among(state: LedgerState, account: Account, names: Iterable[str], ids: Mapping[str, int]) -> set[str]:
    """Return those of ``names`` who are not in an account's cohort."""
    members = state.members(account.cohort)
    return {name for name in names if not (ids[name] <= len(members) and members[ids[name] - 1])}


def _doubled(state: LedgerState) -> str | None:
    """Return a run with two open reservations that differ in their patients alone.

    Once they are closed each patient is charged what was booked, as if there had been one.
    """
    found: dict[tuple[object, ...], int] = {}
    for account in state.accounts.values():
        if account.is_open and not account.reservation.leaves_out:
            key = (*key_of(account.reservation), account.role)
            if found.setdefault(key, account.cohort) != account.cohort:
                return account.reservation.run
    return None
