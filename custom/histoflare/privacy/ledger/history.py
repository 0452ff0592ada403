"""What happened in one run, entry by entry, for the site's own people. No patient is named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from histoflare.privacy.ledger.rules import TRAIN
from histoflare.privacy.ledger.state import LedgerState
from histoflare.privacy.ledger.tokens import EVALUATION, UPDATE, Account

FAILED = "failed"
UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Event:
    """What was paid for, or left without protection.

    Attributes:
        unix_time: Of the answer; of the booking, where there was no answer.
        what: ``update``, ``evaluation``, ``failed`` (answered so, and paid for) or ``unanswered``.
        round_index: From 0; None: of no round.
        patients: Of how many patients.
        figures: Names of the figures that left.
        is_protected: Whether it was booked under a mechanism.
    """

    unix_time: int
    what: str
    round_index: int | None
    patients: int
    figures: tuple[str, ...]
    is_protected: bool


@dataclass(frozen=True)
class RunHistory:
    """One run.

    Attributes:
        accounts: What it reserved, and what became of that.
        by_role: Role of the patients who are charged → those of the accounts: other patients each.
        events: In order of time.
    """

    accounts: tuple[Account, ...]
    by_role: dict[str, tuple[Account, ...]]
    events: tuple[Event, ...]


class Entry(Protocol):
    """An entry as :func:`summarise_run` reads it."""

    @property
    def seq(self) -> int: ...
    @property
    def unix_time(self) -> int: ...
    @property
    def kind(self) -> str: ...
    def content(self) -> dict[str, Any]: ...


def summarise_history(state: LedgerState, entries: Iterable[Entry], run: str) -> RunHistory:
    """Return what verified entries say of a run; nothing is in it if the ledger does not know the run."""
    accounts = {id_: each for id_, each in state.accounts.items() if each.reservation.run == run}
    found: dict[int, Event] = {}
    updates: set[int] = set()
    for entry in entries:
        if entry.kind not in ("booking", "disclosure", "release", "failure"):
            continue
        body = entry.content()
        if entry.kind == "booking" and body["reservation"] in accounts:
            account = accounts[body["reservation"]]
            patients = account.reservation.patients
            if account.role == TRAIN:
                updates.add(entry.seq)
            found[entry.seq] = Event(entry.unix_time, UNANSWERED, body["round"], patients, (), True)
        elif entry.kind == "disclosure" and body["run"] == run:
            what = UNANSWERED if body["digest"] is None else body["what"]
            figures = tuple(body["figures"] or ())
            found[entry.seq] = Event(entry.unix_time, what, body["round"], body["patients"], figures, False)
        elif entry.kind in ("release", "failure") and body["of"] in found:
            paid = found[body["of"]]
            what = FAILED if entry.kind == "failure" else UPDATE if body["of"] in updates else EVALUATION
            figures = tuple(body.get("figures") or ())
            found[body["of"]] = Event(
                entry.unix_time, what, paid.round_index, paid.patients, figures, paid.is_protected
            )
    by_role: dict[str, tuple[Account, ...]] = {}
    for account in accounts.values():
        by_role[account.role] = (*by_role.get(account.role, ()), account)
    return RunHistory(
        tuple(accounts.values()), by_role, tuple(sorted(found.values(), key=lambda each: each.unix_time))
    )
