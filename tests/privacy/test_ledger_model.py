"""The ledger beside a model of it that is too simple to be wrong: a dict of lists, per patient."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.errors import LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Booking, Ledger, Release, Reservation
from histoflare.privacy.spend import Spend
from tests.privacy.ledgers import copied, new_ledger, paths, quick_folder, sha
from tests.refusals import raises_reason

BUDGET = Budget(3.0, 1e-5)
PATIENTS = "abcdef"
MODEL = sha("model")
SPENDS = (Spend(6.0), Spend(10.0, steps=2), Spend(20.0, steps=3))


@dataclass
class Row:
    """One reservation of the model."""

    run: str
    about: str
    spend: Spend
    rounds: int
    cohort: frozenset[str]
    is_open: bool = True
    booked: list[int] = field(default_factory=list)
    newest: dict[int, Booking] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=lambda: {"released": 0, "failed": 0})

    def answer(self, round_index: int, what: str) -> None:
        self.answered[round_index] = what
        self.n[what] += 1

    def events(self) -> int:
        return max(len(self.booked), self.rounds) if self.is_open else len(self.booked)


class Model:
    """What the ledger should say."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.noted: set[tuple[str, int]] = set()

    def charges(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            for patient in row.cohort:
                found[patient] += [BUDGET.cost(row.spend)] * row.events()
        return found

    def admits(self, cohort: frozenset[str], cost: float) -> bool | None:
        """Return whether there is room; None where rounding may decide."""
        charges = self.charges()
        total = max(math.fsum(charges[patient]) for patient in cohort) + cost
        if math.isclose(total, BUDGET.allowance, rel_tol=1e-9):
            return None
        return total <= BUDGET.allowance


KINDS = ["reserve"] * 3 + ["book"] * 8 + ["again"] * 4 + ["release"] * 5 + ["fail"] * 4 + ["close", "reopen"]
KINDS += ["create", "move", "note"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from([("one", "x"), ("one", "y"), ("two", "x")]),
        st.sampled_from(SPENDS),
        st.integers(1, 4),
        st.frozensets(st.sampled_from(PATIENTS), min_size=1),
        st.integers(0, 2),
    ),
    min_size=30,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_the_ledger_says_what_the_model_says(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    with quick_folder() as folder:
        base, at = folder, folder / "0"
        ledger = new_ledger(at)
        model, tokens = Model(), list[Reservation]()
        for kind, (run, about), spend, number, cohort, back in steps:
            if kind == "reopen":
                ledger = Ledger(*paths(at))
            elif kind == "create":
                with raises_reason("LEDGER_UNUSABLE", paths(at)[0]):
                    Ledger.create(*paths(at), "another")
            elif kind == "note":
                model.noted.add((run, number))
                note(ledger, run, number)
            elif kind == "move":
                ledger, at = move(ledger, at, base / str(int(at.name) + 1))
            elif kind == "reserve":
                reserve(ledger, model, tokens, Row(run, about, spend, number, cohort))
            elif kind == "close":
                close(ledger, model, run)
            elif tokens:
                index = max(0, len(tokens) - 1 - back)
                if kind == "release":
                    release(ledger, model.rows[index], number)
                elif kind == "fail":
                    fail(ledger, model.rows[index], number)
                else:
                    book(ledger, model, index, tokens[index], number, again=kind == "again")
        charges = [math.fsum(parts) for parts in model.charges().values()]
        summary = Ledger(*paths(at)).summary(BUDGET)
        left = {each.run: each.times for each in Ledger(*paths(at)).disclosures()}
        assert left == Counter(run for run, _ in model.noted)
        assert math.isclose(summary.rho, max(charges, default=0.0), rel_tol=1e-9)
        found = [(r.run, r.about, r.booked, r.released, r.failed, r.is_open) for r in summary.runs]
        assert found == [
            (row.run, row.about, len(row.booked), row.n["released"], row.n["failed"], row.is_open)
            for row in model.rows
        ]


def move(old: Ledger, at: Path, to: Path) -> tuple[Ledger, Path]:
    """Go on with a copy; the one that was copied is closed."""
    ledger = Ledger(*paths(copied(at, to)))
    check_moved(ledger)
    assert ledger.move()
    check_moved(old)
    return ledger, to


def check_moved(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as caught:
        note(ledger, "one", 0)
    assert caught.value.reason == "LEDGER_MOVED"


def note(ledger: Ledger, run: str, number: int) -> None:
    """Note an update; the same one again is the same entry."""
    ledger.note(
        what="update",
        run=run,
        model_sha256=MODEL,
        digest=sha(f"{run} {number}"),
        figures=[],
        patients=2,
        round_index=number,
    )


def reserve(ledger: Ledger, model: Model, tokens: list[Reservation], new: Row) -> None:
    def wanted(row: Row) -> tuple[object, ...]:
        return row.run, row.about, row.spend, row.rounds, row.cohort, row.is_open

    same = [row for row in model.rows if wanted(row) == wanted(new)]
    admits = model.admits(new.cohort, BUDGET.cost(new.spend.times(new.rounds)))
    try:
        token = ledger.reserve(
            run=new.run,
            about=new.about,
            spend=new.spend,
            rounds=new.rounds,
            roles=dict.fromkeys(new.cohort, "train"),
            budget=BUDGET,
        )
    except LedgerError as error:
        assert error.reason == "BUDGET_EXHAUSTED" and not same and admits is not True
        return
    if same:
        assert token == tokens[next(n for n, row in enumerate(model.rows) if row is same[0])]
        return
    assert admits is not False
    model.rows.append(new)
    tokens.append(token)


def book(
    ledger: Ledger, model: Model, index: int, token: Reservation, round_index: int, *, again: bool
) -> None:
    row = model.rows[index]
    attempts, answered = row.booked.count(round_index), row.answered.get(round_index)
    is_new = attempts == 0 or answered == "failed" or (again and answered == "released")
    admits: bool | None = True
    if len(row.booked) >= row.rounds:
        row.booked.append(round_index)
        admits = model.admits(row.cohort, 0.0)
        row.booked.pop()
    ask = ledger.book_again if again else ledger.book
    try:
        answer = ask(token, round_index, MODEL, BUDGET)
    except LedgerError as error:
        if error.reason == "NOT_ADMITTED":
            assert not row.is_open
        else:
            assert error.reason == "BUDGET_EXHAUSTED" and is_new and admits is not True
        return
    assert row.is_open
    if is_new:
        assert admits is not False and isinstance(answer, Booking) and answer.attempt == attempts + 1
        row.booked.append(round_index)
        row.newest[round_index] = answer
        row.answered.pop(round_index, None)
    elif answered == "released":
        assert isinstance(answer, Release) and answer.booking == row.newest[round_index]
    else:
        assert answer == row.newest[round_index]


def release(ledger: Ledger, row: Row, round_index: int) -> None:
    """Release the newest booking, whether the run is open or not; the second time changes nothing."""
    if round_index not in row.newest:
        return
    booking, before = row.newest[round_index], row.answered.get(round_index)
    digest = sha(f"{booking.id}")
    assert ledger.is_released(digest) == (before == "released")
    try:
        ledger.release(booking, digest)
    except LedgerError as error:
        assert error.reason == "NOT_RELEASED" and before == "failed"
        assert not ledger.is_released(digest)
        return
    assert before != "failed" and ledger.is_released(digest)
    if before is None:
        row.answer(round_index, "released")


def fail(ledger: Ledger, row: Row, round_index: int) -> None:
    """Fail the newest booking, whether the run is open or not; what is answered stays as it is."""
    if round_index not in row.newest:
        return
    ledger.fail(row.newest[round_index])
    if round_index not in row.answered:
        row.answer(round_index, "failed")


def close(ledger: Ledger, model: Model, run: str) -> None:
    rows = [row for row in model.rows if row.run == run and row.is_open]
    try:
        closed = ledger.close(run)
    except LedgerError as error:
        assert error.reason == "RUN_INVALID" and not rows
        return
    assert len(closed) == len(rows)
    for row in rows:
        row.is_open = False
