"""What a ledger refuses, and on which grounds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from histoflare.errors import JobError, LedgerError
from histoflare.privacy.ledger.chain import normalised
from histoflare.privacy.ledger.events import ROLES
from histoflare.privacy.ledger.session import Page
from histoflare.privacy.ledger.state import LedgerState
from histoflare.privacy.ledger.tokens import Account, Reservation
from histoflare.privacy.spend import Spend

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget, Filter

TRAIN = "train"


def normalise_roles(roles: Mapping[str, str]) -> dict[str, str]:
    """Return the roles by normalised name; refuse names and roles that cannot be used."""
    known_as: dict[str, str] = {}
    for patient, role in roles.items():
        name = normalised(patient)
        if not name or role not in ROLES:
            raise JobError(
                f"Patient {patient!r}: needs a name, and one of the roles {', '.join(ROLES)}, not {role!r}.",
                reason="PRIVACY_INVALID",
            )
        if known_as.setdefault(name, role) != role:
            raise LedgerError(
                f"Patient {name!r} is both {known_as[name]} and {role}: one patient has one role.",
                reason="ROLE_CHANGED",
            )
    return known_as


def enter_patients(page: Page, known_as: Mapping[str, str]) -> dict[str, int]:
    """Return patient → number; patients the ledger has not met are added."""
    state = page.state
    macs = {name: page.keys.patient(name) for name in known_as}
    refuse_other_roles(
        [
            name
            for name, mac in macs.items()
            if mac in state.patients and state.roles[state.patients[mac] - 1] != known_as[name]
        ]
    )
    # In order of their MACs: the manifest's order would tell who is who.
    page.add_patients(
        sorted((mac, known_as[name]) for name, mac in macs.items() if mac not in state.patients)
    )
    return {name: state.patients[mac] for name, mac in macs.items()}


def refuse_nobody(known_as: Mapping[str, str], role: str) -> None:
    """Refuse patients of whom none has the role that is asked for: to be trained on, or asked about."""
    if role in known_as.values():
        return
    if role == TRAIN:
        raise LedgerError("There is no patient to train on.", reason="SITE_HAS_NO_TRAINING_DATA")
    raise LedgerError("There is no patient to evaluate on.", reason="NOTHING_TO_EVALUATE")


def refuse_other_roles(changed: list[str]) -> None:
    """Refuse patients who have another role in the ledger, if there are any."""
    if changed:
        raise LedgerError(
            f"{len(changed)} patients have another role than they had before: {some_of(changed)}. Who was "
            "trained on is never evaluated on, nor the other way round: put the old split back.",
            reason="ROLE_CHANGED",
        )


def most_charged(
    state: LedgerState, known_as: Mapping[str, str], filters: Iterable[Filter], role: str
) -> tuple[float, ...]:
    """Return what the most exposed patient of a role was charged (ρ) by each filter; refuse other roles."""
    ids = {name: state.patients.get(state.keys.patient(name)) for name in known_as}
    refuse_other_roles([name for name, id_ in ids.items() if id_ and state.roles[id_ - 1] != known_as[name]])
    cohort = [id_ - 1 for name, id_ in ids.items() if id_ and known_as[name] == role]
    return tuple(float(state.charges(kept)[cohort].max(initial=0.0)) for kept in filters)


def members_of(state: LedgerState, cohort: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return where a cohort's patients are in arrays over all patients."""
    return np.flatnonzero(state.members(cohort))


def open_account(state: LedgerState, reservation: Reservation) -> Account:
    """Return a reservation's account; refuse one that was closed, or is not of this ledger."""
    account = state.accounts.get(reservation.id)
    if account is None or account.reservation != reservation:
        raise LedgerError("This reservation is not one of this ledger.", reason="NOT_ADMITTED")
    if not account.is_open:
        raise LedgerError(
            f"Run {reservation.run} was closed; it goes on only if its job is admitted anew.",
            reason="NOT_ADMITTED",
        )
    return account


def admit_further(
    state: LedgerState, account: Account, budget: Budget, job_share: float = 1.0, countable: int | None = None
) -> None:
    """Refuse a further event if the budget, or its run's share, has no room for it by one of its filters."""
    id_, members = account.reservation.id, members_of(state, account.cohort)
    run, is_shared = account.reservation.run, account.reservation.spend.honest > 1
    for kept in budget.filters():
        before = float(state.charges(kept, without=id_)[members].max())
        cost = kept.cost(account.charged(kept, further=countable or 0))
        refuse_over_budget(kept, before, cost, f"run {run} with one more round", is_shared)
        admit_share(state, kept, run, account.cohort, cost, job_share, is_shared, without=id_)


def refuse_beyond(account: Account) -> None:
    """Refuse a further event than those reserved where patients are left out: a public number decides.

    Whether each patient has room for one more would tell of the patients. What a reserved event costs never
    rises: of shared noise it is reserved at the fewest sites with which it would be booked.
    """
    if account.booked >= account.reservation.rounds:
        raise LedgerError(
            f"All {account.reservation.rounds} rounds that were reserved for run {account.reservation.run} "
            "are booked, those that were lost or failed too, and where patients are left out none is booked "
            "beyond.",
            reason="RESERVATION_USED_UP",
        )


def admit_share(
    state: LedgerState,
    kept: Filter,
    run: str,
    cohort: int,
    cost: float,
    job_share: float,
    is_shared: bool,
    without: int | None = None,
) -> None:
    """Refuse what makes a run cost a patient more than the share of a budget that one job may take.

    A run's reservations for cohorts without a patient in common, such as those trained on and those asked
    about, do not add up.

    Args:
        kept: The filter by which it is counted.
        cohort: Whom it is asked for.
        cost: ρ of what is asked for. job_share: Of the allowance. is_shared: Whether its noise is.
        without: A reservation that is in it already.
    """
    if job_share >= 1:
        return  # the budget of each patient is all that counts
    for id_, account in state.accounts.items():
        if account.reservation.run == run and id_ != without and state.overlap(cohort, account.cohort):
            cost += kept.cost(account.charged(kept))
    refuse_share(kept, cost, job_share, is_shared)


def refuse_share(kept: Filter, cost: float, job_share: float, is_shared: bool = False) -> None:
    """Refuse a job of ρ = ``cost`` that takes more than ``job_share`` of the allowance."""
    budget = kept.budget
    if not budget.admits(cost, job_share):
        raise LedgerError(
            f"The job takes {budget.share_of(cost):.3g} of the budget of ε = {budget.epsilon:g} at δ = "
            f"{budget.delta:g}{_against(kept, is_shared)}, and the site's policy lets one job have "
            f"{job_share:g} of it (job_share).",
            reason="JOB_SHARE_EXCEEDED",
        )


def refuse_over_budget(kept: Filter, before: float, cost: float, what: str, is_shared: bool = False) -> None:
    """Refuse ``what``, of ρ = ``cost``, if the most exposed patient (ρ = ``before``) cannot pay it."""
    budget = kept.budget
    if not budget.admits(before + cost):
        entry = "all_collude_epsilon" if kept.colluders is None else "epsilon"
        raise LedgerError(
            f"The budget is ε = {budget.epsilon:g} at δ = {budget.delta:g}{_against(kept, is_shared)} "
            f"({entry} of the policy). The most exposed patient of this cohort is at "
            f"ε = {budget.epsilon_of(before):.3g}, {what} alone costs ε = {budget.epsilon_of(cost):.3g}, and "
            f"both together come to ε = {budget.epsilon_of(before + cost):.3g}. Run fewer rounds or with "
            "more noise, close runs that will not go on, or train on other patients.",
            reason="BUDGET_EXHAUSTED",
        )


def _against(kept: Filter, is_shared: bool) -> str:
    """Return against whom a budget holds; nothing where that is everybody, as no noise is shared."""
    return f" against {kept.whom()}" if is_shared or kept.colluders is None else ""


def refuse_few_known(spend: Spend, countable: int, colluders: int) -> None:
    """Refuse a sum of shared noise in which too few sites are known for the noise that was reserved."""
    if countable - colluders < spend.least_honest:
        raise LedgerError(
            f"The job counts on the noise of {spend.honest} sites that keep it to themselves. Of this sum's "
            f"sites {countable} are known here, and {colluders} of them may collude (colluders).",
            reason="SUM_TOO_FEW_KNOWN",
        )


def check_text(**texts: str) -> None:
    """Refuse what is no text, or an empty one."""
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise JobError(f"{name}: a text, not {text!r}", reason="PRIVACY_INVALID")


def check_digest(digest: str) -> None:
    """Refuse what is no SHA-256 in hexadecimal."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise JobError(
            f"A SHA-256 has 64 hexadecimal digits in lower case, not {digest!r}.", reason="PRIVACY_INVALID"
        )


def some_of(names: list[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    shown = ", ".join(map(repr, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
