"""Patients without room are left out, each by the own charges alone: an individual Rényi filter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.errors import LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Booking, Ledger, Release, Reservation
from histoflare.privacy.spend import Spend
from tests.privacy.ledgers import ABOUT, BUDGET, SPEND, most_rounds, new_ledger, paths, quick_folder, sha
from tests.refusals import raises_reason

SMALL = Budget(3.0, 1e-5)
OTHERS = "abcd"
ONE = "x"
"""The patient who is there in one of two worlds and not in the other."""

SPENDS = (Spend(6.0), Spend(10.0, steps=2), Spend(20.0, steps=3), Spend(9.0, sample_rate=0.3, steps=4))
KINDS = ["reserve"] * 5 + ["book"] * 5 + ["fail"] * 2 + ["close", "reopen"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(["one", "two", "three"]),
        st.sampled_from(SPENDS),
        st.integers(1, 12),
        st.frozensets(st.sampled_from(OTHERS), min_size=1),
        st.booleans(),
        st.sampled_from([1.0, 0.6]),
    ),
    min_size=10,
    max_size=30,
)


@dataclass
class Run:
    """A reservation of the model, which is too simple to be wrong."""

    run: str
    spend: Spend
    rounds: int
    cohort: set[str]
    is_open: bool = True
    booked: int = 0

    def events(self) -> int:
        return max(self.rounds, self.booked) if self.is_open else self.booked


@dataclass
class World:
    """A ledger, and what it should say."""

    folder: Path
    ledger: Ledger
    runs: list[Run] = field(default_factory=list)
    tokens: list[Reservation] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)

    def charged(self, patient: str, run: str | None = None) -> float:
        return math.fsum(
            SMALL.cost(each.spend.times(each.events()))
            for each in self.runs
            if patient in each.cohort and run in (None, each.run) and each.events()
        )

    def reserve(self, run: str, spend: Spend, rounds: int, manifest: set[str], share: float) -> None:
        roles = dict.fromkeys(sorted(manifest), "train")
        cost = SMALL.cost(spend.times(rounds))
        try:
            token = self.ledger.reserve(
                run=run,
                about=ABOUT,
                spend=spend,
                rounds=rounds,
                roles=roles,
                budget=SMALL,
                job_share=share,
                leave_out=True,
            )
        except LedgerError as error:
            # Public numbers alone refuse: the job costs more than anybody has, or may pay for one job.
            assert error.reason in ("BUDGET_EXHAUSTED", "JOB_SHARE_EXCEEDED")
            assert not SMALL.admits(cost, share)
            self.outcomes.append(error.reason)
            return
        left_out = self.ledger.left_out(token, roles)
        if token not in self.tokens:
            room = {
                patient
                for patient in manifest
                if SMALL.admits(self.charged(patient) + cost)
                and SMALL.admits(self.charged(patient, run) + cost, share)
            }
            assert left_out == manifest - room
            self.runs.append(Run(run, spend, rounds, room))
            self.tokens.append(token)
        self.outcomes.append((self.tokens.index(token), sorted(left_out - {ONE})))

    def book(self, index: int, number: int, fails: bool) -> None:
        if not self.tokens:
            return
        index %= len(self.tokens)
        run = self.runs[index]
        try:
            booked = self.ledger.book(self.tokens[index], number, sha("model"), SMALL)
        except LedgerError as error:
            expected = "RESERVATION_USED_UP" if run.is_open else "NOT_ADMITTED"
            assert error.reason == expected
            self.outcomes.append(error.reason)
            return
        assert isinstance(booked, Booking)
        if fails:
            self.ledger.fail(booked)
        with self.ledger._sessions.reading() as (state, _, _):
            run.booked = state.accounts[self.tokens[index].id].booked
        assert run.booked <= run.rounds
        self.outcomes.append((index, booked.attempt, run.booked))

    def close(self, name: str) -> None:
        found = [run for run in self.runs if run.is_open and run.run == name]
        if found:
            self.ledger.close(name)
        for run in found:
            run.is_open = False

    def charges(self) -> dict[str, list[str]]:
        """Return each patient's charges, to the last bit, after holding them to the budget."""
        with self.ledger._sessions.reading() as (state, _, _):
            found: dict[str, list[str]] = {}
            for patient in (*OTHERS, ONE):
                number = state.patients.get(state.keys.patient(patient))
                rhos = [0.0 if number is None else float(state.charges(each)[number - 1]) for each in FILTERS]
                assert all(rho <= SMALL.allowance * (1 + 1e-9) for rho in rhos)
                assert math.isclose(rhos[0], self.charged(patient), rel_tol=1e-9, abs_tol=1e-15)
                found[patient] = [rho.hex() for rho in rhos]
        return found


FILTERS = SMALL.filters()


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_one_patient_more_or_less_changes_nobody_elses_part(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Two worlds that differ in one patient: what is said outside, who of the others is in, what they are
    charged to the last bit. And in both nobody is ever charged more than the budget."""
    with quick_folder() as folder:
        worlds = [World(folder / name, new_ledger(folder / name)) for name in ("with", "without")]
        for kind, run, spend, number, others, is_there, share in steps:
            for world in worlds:
                if kind == "reserve":
                    more = {ONE} if is_there and world is worlds[0] else set()
                    world.reserve(run, spend, number, set(others) | more, share)
                elif kind in ("book", "fail"):
                    world.book(len(others), number % 4, kind == "fail")
                elif kind == "close":
                    world.close(run)
                else:
                    world.ledger = Ledger(*paths(world.folder))
            there, gone = (world.charges() for world in worlds)
            assert {p: there[p] for p in OTHERS} == {p: gone[p] for p in OTHERS}
            assert worlds[0].outcomes == worlds[1].outcomes
        for world in worlds:
            world.ledger.verify()
            assert len(list(world.ledger.events())) == world.ledger.verify().entries


def reserve(ledger: Ledger, run: str, rounds: int, roles: dict[str, str], **changes: object) -> Reservation:
    arguments: dict[str, object] = {"about": ABOUT, "spend": SPEND, "budget": BUDGET, "leave_out": True}
    return ledger.reserve(run=run, rounds=rounds, roles=roles, **(arguments | changes))  # type: ignore[arg-type]


def left_of(ledger: Ledger, name: str) -> float:
    """Return which share of the budget a patient has left; all of it, if the ledger does not know one."""
    found = [group.left[0] for group in ledger.remaining(BUDGET, [name]) if group.names]
    return found[0] if found else 1.0


def train(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "train")


def test_who_has_no_room_is_left_out_and_the_others_are_charged(tmp_path: Path) -> None:
    ledger, most = new_ledger(tmp_path), most_rounds()
    first = reserve(ledger, "first", most, train("anna"))
    assert ledger.left_out(first, train("anna")) == frozenset()
    second = reserve(ledger, "second", 1, train("anna bert"))
    assert ledger.left_out(second, train("anna bert")) == {"anna"} and second.patients == 1
    left = {group.names: group.left[0] for group in ledger.remaining(BUDGET, ("anna", "bert"))}
    assert left["anna",] < left["bert",] < 1


def test_a_job_of_which_everybody_is_left_out_is_reserved_for_nobody(tmp_path: Path) -> None:
    """To refuse it would tell that all are exhausted."""
    ledger, most = new_ledger(tmp_path), most_rounds()
    reserve(ledger, "first", most, train("anna bert"))
    nobody = reserve(ledger, "second", 2, train("anna bert"))
    assert nobody.patients == 0 and ledger.left_out(nobody, train("anna bert")) == {"anna", "bert"}
    booked = ledger.book(nobody, 0, sha("model"), BUDGET)
    assert isinstance(booked, Booking)
    ledger.release(booked, sha("noise"))
    assert isinstance(ledger.book(nobody, 0, sha("model"), BUDGET), Release)
    assert reserve(Ledger(*paths(tmp_path)), "second", 2, train("anna bert")) == nobody
    history = ledger.history("second")
    assert list(history.by_role) == ["train"] and history.events[0].what == "update"
    assert ledger.summary(BUDGET).runs[1].released == 1
    asked = reserve(ledger, "third", most, {"emil": "test"}, role="test")
    none = reserve(ledger, "fourth", 1, {"emil": "test"}, role="test")
    assert (asked.patients, none.patients) == (1, 0)
    assert list(ledger.history("fourth").by_role) == ["test"]
    ledger.verify()


def test_a_run_goes_on_with_the_patients_of_its_first_time(tmp_path: Path) -> None:
    """After a crash it must not count against itself, and a manifest that grew must charge nobody twice."""
    ledger, most = new_ledger(tmp_path), most_rounds()
    reserve(ledger, "other", most, train("anna"))
    run = reserve(ledger, "run", most - 1, train("anna bert"))
    reserve(ledger, "later", 1, train("bert cleo"))
    before = left_of(ledger, "bert")
    ledger.close("other")
    for roles, left_out in (
        (train("anna bert"), {"anna"}),
        (train("anna bert dora"), {"anna", "dora"}),
        (train("anna"), {"anna"}),
    ):
        again = Ledger(*paths(tmp_path))
        assert reserve(again, "run", most - 1, roles) == run
        assert again.left_out(run, roles) == left_out, "once left out, and whoever came later, stay out"
    assert left_of(ledger, "bert") == before and left_of(ledger, "dora") == 1.0


def test_names_are_those_of_the_manifest(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    reserve(ledger, "first", most_rounds(), {"Zoe\u0308 ": "train"})
    roles = {" Zo\u00eb": "train", "anna": "train"}
    assert ledger.left_out(reserve(ledger, "second", 1, roles), roles) == {" Zo\u00eb"}
    with raises_reason("ROLE_CHANGED"):
        reserve(ledger, "third", 1, {"Zo\u00eb": "test"}, role="test")


def test_nothing_is_booked_beyond_what_was_reserved(tmp_path: Path) -> None:
    """Though everybody had room: that a further event has none would tell of the patients."""
    ledger = new_ledger(tmp_path)
    run = reserve(ledger, "run", 1, train("anna"))
    first = ledger.book(run, 0, sha("model"), BUDGET)
    assert isinstance(first, Booking)
    ledger.fail(first)
    with raises_reason("RESERVATION_USED_UP"):
        ledger.book(run, 0, sha("model"), BUDGET)


def test_shared_noise_is_booked_as_it_was_reserved(tmp_path: Path) -> None:
    budget, spend = Budget(20.0, 1e-5), Spend(9.0, honest=3)
    ledger = new_ledger(tmp_path)
    run = reserve(ledger, "run", 2, train("anna bert"), spend=spend, budget=budget)
    for number, sites in enumerate((4, 6)):
        ledger.book(run, number, sha(f"list {number}"), budget, countable=sites)
    with raises_reason("RESERVATION_USED_UP"):
        ledger.book(run, 2, sha("list 2"), budget, countable=9)
    # Of the second budget, should all others collude, much more was taken: it decides here.
    second = budget.filters()[1]
    rounds = budget.if_all_collude.room_for(second.cost([second.price(spend)]))
    assert rounds is not None
    more = reserve(ledger, "more", rounds, train("anna cleo"), spend=spend, budget=budget)
    assert ledger.left_out(more, train("anna cleo")) == {"anna"}


def test_what_nobody_could_pay_is_refused_by_public_numbers(tmp_path: Path) -> None:
    ledger, most = new_ledger(tmp_path), most_rounds()
    with raises_reason("BUDGET_EXHAUSTED"):
        reserve(ledger, "run", most + 1, train("anna"))
    with raises_reason("JOB_SHARE_EXCEEDED"):
        reserve(ledger, "run", most, train("anna"), job_share=0.5)
    reserve(ledger, "run", 1, train("anna"))
    # A second reservation of the run that is too much together: by the patient, and not by the job.
    more = reserve(ledger, "run", most // 2, train("anna bert"), job_share=0.5)
    assert ledger.left_out(more, train("anna bert")) == {"anna"}


@pytest.mark.parametrize(
    "changes", [{"trusts_server": True}, {"budget": Budget(8.0, 1e-5, sites_per_patient=2)}]
)
def test_where_epsilon_does_not_cover_it_nobody_is_left_out(
    changes: dict[str, object], tmp_path: Path
) -> None:
    ledger = new_ledger(tmp_path)
    with raises_reason("LEAVE_OUT_UNSOUND"):
        reserve(ledger, "run", 1, train("anna"), **changes)
    assert ledger.verify().entries == 1


def test_a_run_that_was_reserved_twice_by_who_is_there_is_closed_first(tmp_path: Path) -> None:
    """By a policy that refuses, a manifest that grew makes a second reservation beside the first: what the
    run charges anna then tells of bert."""
    ledger = new_ledger(tmp_path)
    for names in ("anna", "anna bert"):
        reserve(ledger, "grown", 1, train(names), leave_out=False)
    with raises_reason("LEAVE_OUT_UNSOUND"):
        reserve(ledger, "run", 1, train("anna bert"))
    with raises_reason("LEAVE_OUT_UNSOUND"):
        ledger.check_room(spend=SPEND, rounds=1, roles=train("anna"), budget=BUDGET, leave_out=True)
    ledger.close("grown")
    assert ledger.left_out(reserve(ledger, "run", 1, train("anna bert")), train("anna bert")) == frozenset()


def test_a_look_beforehand_says_who_would_be_left_out_and_writes_nothing(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    reserve(ledger, "first", most_rounds(), train("anna"))
    entries = ledger.verify().entries
    roles = train("anna bert")
    found = ledger.check_room(spend=SPEND, rounds=1, roles=roles, budget=BUDGET, leave_out=True)
    assert found == {"anna"} and ledger.verify().entries == entries
    assert ledger.left_out(reserve(ledger, "second", 1, roles), roles) == found
    with raises_reason("BUDGET_EXHAUSTED"):
        ledger.check_room(spend=SPEND, rounds=1, roles=roles, budget=BUDGET)


def test_a_policy_that_refuses_is_another_reservation(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    first = reserve(ledger, "run", 1, train("anna"))
    second = reserve(ledger, "run", 1, train("anna"), leave_out=False)
    assert first.leaves_out and not second.leaves_out and first.id != second.id
    assert ledger.left_out(second, train("anna bert")) == frozenset()
