"""The ledger beside a model of it that is too simple to be wrong: a dict of lists, per patient."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.errors import LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Booking, Ledger, Reservation
from histoflare.privacy.spend import Spend
from tests.privacy.ledgers import new_ledger, paths, quick_folder, sha

BUDGET = Budget(3.0, 1e-5)
PATIENTS = "abcdef"
MODEL = sha("model")
SPENDS = (Spend(6.0), Spend(10.0, steps=2), Spend(20.0, steps=3))


@dataclass
class Row:
    """One reservation of the model."""

    run: str
    spend: Spend
    rounds: int
    cohort: frozenset[str]
    is_open: bool = True
    booked: list[tuple[int, str]] = field(default_factory=list)
    released: set[tuple[int, str]] = field(default_factory=set)
    n_released: int = 0

    def events(self) -> int:
        return max(len(self.booked), self.rounds) if self.is_open else len(self.booked)


class Model:
    """What the ledger should say."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

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


KINDS = ["reserve"] * 3 + ["book"] * 8 + ["again"] * 4 + ["release"] * 5 + ["close", "reopen"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(["one", "two"]),
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
        ledger = new_ledger(folder)
        model, tokens = Model(), list[Reservation]()
        for kind, run, spend, number, cohort, back in steps:
            if kind == "reopen":
                ledger = Ledger(*paths(folder))
            elif kind == "reserve":
                reserve(ledger, model, tokens, run, spend, number, cohort)
            elif kind == "close":
                close(ledger, model, run)
            elif tokens:
                index = max(0, len(tokens) - 1 - back)
                if kind == "release":
                    release(ledger, model.rows[index], tokens[index], number)
                else:
                    book(ledger, model, index, tokens[index], number, again=kind == "again")
        charges = [math.fsum(parts) for parts in model.charges().values()]
        summary = Ledger(*paths(folder)).summary(BUDGET)
        assert math.isclose(summary.rho, max(charges, default=0.0), rel_tol=1e-9)
        found = [(run.run, run.booked, run.released, run.is_open) for run in summary.runs]
        assert found == [(row.run, len(row.booked), row.n_released, row.is_open) for row in model.rows]


def reserve(
    ledger: Ledger,
    model: Model,
    tokens: list[Reservation],
    run: str,
    spend: Spend,
    rounds: int,
    cohort: frozenset[str],
) -> None:
    roles = dict.fromkeys(cohort, "train")
    wanted = (run, spend, rounds, cohort, True)
    same = [row for row in model.rows if (row.run, row.spend, row.rounds, row.cohort, row.is_open) == wanted]
    admits = model.admits(cohort, BUDGET.cost(spend.times(rounds)))
    try:
        token = ledger.reserve(run=run, spend=spend, rounds=rounds, roles=roles, budget=BUDGET)
    except LedgerError as error:
        assert error.reason == "BUDGET_EXHAUSTED" and not same and admits is not True
        return
    if same:
        assert token == tokens[model.rows.index(same[0])]
        return
    assert admits is not False
    model.rows.append(Row(run, spend, rounds, cohort))
    tokens.append(token)


def book(
    ledger: Ledger, model: Model, index: int, token: Reservation, round_index: int, *, again: bool
) -> None:
    row, key = model.rows[index], (round_index, MODEL)
    attempts = row.booked.count(key)
    is_new = attempts == 0 or (again and key in row.released)
    admits: bool | None = True
    if len(row.booked) >= row.rounds:
        row.booked.append(key)
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
        row.booked.append(key)
        row.released.discard(key)
    elif key in row.released:
        assert not isinstance(answer, Booking)
    else:
        assert isinstance(answer, Booking) and answer.attempt == attempts


def release(ledger: Ledger, row: Row, token: Reservation, round_index: int) -> None:
    key = (round_index, MODEL)
    if not row.is_open or key not in row.booked or key in row.released:
        return
    booking = ledger.book(token, round_index, MODEL, BUDGET)
    assert isinstance(booking, Booking)
    digest = sha(f"{booking.id} {booking.attempt}")
    assert not ledger.is_released(digest)
    ledger.release(booking, digest)
    assert ledger.is_released(digest)
    row.released.add(key)
    row.n_released += 1


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
