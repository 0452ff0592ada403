"""The ledger says no: what is reserved, booked, released and refused."""

from __future__ import annotations

import json
import re
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.errors import HistoflareError, JobError, LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Booking, Ledger, Release, Reservation
from histoflare.privacy.ledger.chain import START, Keys, canonical_json
from histoflare.privacy.ledger.events import FIELDS
from histoflare.privacy.spend import Spend
from tests.privacy.ledgers import (
    ABOUT,
    BUDGET,
    ROLES,
    SPEND,
    book,
    fill,
    most_rounds,
    new_ledger,
    paths,
    reserve,
    sha,
)
from tests.refusals import raises_reason


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return new_ledger(tmp_path)


def refused(caught: pytest.ExceptionInfo[HistoflareError]) -> str:
    return caught.value.reason


def test_a_new_ledger_is_empty_and_its_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    path, key = paths(tmp_path)
    assert (len(key.read_bytes()), stat.S_IMODE(key.stat().st_mode)) == (32, 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = ledger.verify()
    assert (found.entries, found.patients, found.cohorts, found.ahead) == (1, 0, 0, 0)
    summary = ledger.summary(BUDGET)
    assert (summary.rho, summary.epsilon, summary.epsilon_rdp, summary.epsilon_pld) == (0, 0, 0, 0)
    assert (summary.runs, summary.remaining) == ((), 1.0)
    again = new_ledger(tmp_path)
    assert again.verify() == found


def test_the_key_is_not_kept_with_the_ledger(tmp_path: Path) -> None:
    with raises_reason("LEDGER_UNUSABLE", tmp_path / "ledger.sqlite", tmp_path / "ledger.key"):
        Ledger(tmp_path / "ledger.sqlite", tmp_path / "ledger.key")


def test_a_reservation_that_is_open_is_given_back_as_it_is(ledger: Ledger) -> None:
    first = reserve(ledger)
    assert (first.run, first.about, first.spend) == ("run", ABOUT, SPEND)
    assert (first.rounds, first.patients) == (3, 3)
    entries = ledger.verify().entries
    assert reserve(ledger) == first
    assert ledger.verify().entries == entries


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "other"},
        {"about": "trusted-server: server-noise, none against the server"},
        {"spend": Spend(21.0)},
        {"rounds": 4},
        {"roles": {**ROLES, "fred": "train"}},
        {"roles": {name: role for name, role in ROLES.items() if name != "anna"}},
    ],
)
def test_anything_else_is_charged_beside_it(ledger: Ledger, changed: dict[str, object]) -> None:
    first = reserve(ledger)
    arguments = {"run": "run", "about": ABOUT, "spend": SPEND, "rounds": 3, "roles": ROLES, **changed}
    second = ledger.reserve(budget=BUDGET, **arguments)  # type: ignore[arg-type]
    assert second.id != first.id
    costs = [BUDGET.cost(r.spend.times(r.rounds)) for r in (first, second)]
    assert ledger.summary(BUDGET).rho == pytest.approx(sum(costs))


def test_a_budget_is_filled_to_the_last_event_and_no_further(ledger: Ledger) -> None:
    most = most_rounds()
    reserve(ledger, "first", most - 1)
    with pytest.raises(LedgerError) as caught:
        reserve(ledger, "second", 2)
    assert refused(caught) == "BUDGET_EXHAUSTED"
    message = str(caught.value)
    before = BUDGET.epsilon_of(BUDGET.cost(SPEND.times(most - 1)))
    assert f"{before:.3g}" in message and f"{BUDGET.epsilon_of(BUDGET.cost(SPEND.times(2))):.3g}" in message
    assert "ε = 8" in message and not any(name in message for name in ROLES)
    assert ledger.verify().entries == 4, "a refusal leaves nothing"
    reserve(ledger, "second", 1)
    with raises_reason("BUDGET_EXHAUSTED"):
        reserve(ledger, "third", 1)


def test_the_charge_is_that_of_the_closed_form(ledger: Ledger) -> None:
    """RDP of the Gaussian mechanism at order α is α ÷ (2 σ²) per event (Mironov 2017, Proposition 7)."""
    reserve(ledger, rounds=5, spend=Spend(30.0))
    reserve(ledger, "other", rounds=2, spend=Spend(25.0))
    expected = BUDGET.order * (5 / (2 * 30.0**2) + 2 / (2 * 25.0**2))
    assert ledger.summary(BUDGET).rho == pytest.approx(expected, rel=1e-12)


def test_cohorts_compose_per_patient(ledger: Ledger) -> None:
    most = most_rounds()
    half = most // 2

    def on(run: str, rounds: int, *patients: str) -> Reservation:
        roles = dict.fromkeys(patients, "train")
        return ledger.reserve(run=run, about=ABOUT, spend=SPEND, rounds=rounds, roles=roles, budget=BUDGET)

    on("a", half, "anna", "bert")
    on("b", most - half, "bert", "cleo")
    with raises_reason("BUDGET_EXHAUSTED"):
        on("c", 1, "bert", "dora")
    on("d", half, "anna", "cleo")
    on("e", most, "dora")
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND.times(most)))


def test_exposure_is_that_of_the_patients_asked_about(ledger: Ledger) -> None:
    assert ledger.exposure(ROLES, BUDGET) == (0, 0)
    reserve(ledger, rounds=2)
    ledger.reserve(
        run="b", about=ABOUT, spend=SPEND, rounds=3, roles={"anna": "train", "new": "train"}, budget=BUDGET
    )
    entries = ledger.verify().entries
    for patients, rounds in ((["anna", "bert"], 5), (["bert"], 2), (["new", "unknown"], 3), (["unknown"], 0)):
        found, _ = ledger.exposure(dict.fromkeys(patients, "train"), BUDGET)
        assert found == pytest.approx(BUDGET.cost(SPEND.times(rounds)))
    assert ledger.exposure({"dora": "validation"}, BUDGET) == (0, 0)
    with pytest.raises(LedgerError) as caught:
        ledger.exposure({"anna": "test"}, BUDGET)
    assert refused(caught) == "ROLE_CHANGED"
    assert ledger.verify().entries == entries


@pytest.mark.parametrize(
    ("spend", "budget", "admitted"),
    [
        (Spend(0.0), BUDGET, False),
        (Spend(0.0, steps=0), BUDGET, True),
        (Spend(1.0, steps=0), BUDGET, True),
        (Spend(1e-9), BUDGET, False),
        (Spend(1e9, steps=1000), BUDGET, True),
    ],
)
def test_the_table_of_edges(ledger: Ledger, spend: Spend, budget: Budget, admitted: bool) -> None:
    if admitted:
        ledger.reserve(run="run", about=ABOUT, spend=spend, rounds=1, roles=ROLES, budget=budget)
    else:
        with pytest.raises(LedgerError) as caught:
            ledger.reserve(run="run", about=ABOUT, spend=spend, rounds=1, roles=ROLES, budget=budget)
        assert refused(caught) == "BUDGET_EXHAUSTED"


@pytest.mark.parametrize("roles", [{}, {"dora": "validation"}])
def test_without_patients_to_train_on_nothing_is_reserved(ledger: Ledger, roles: dict[str, str]) -> None:
    with pytest.raises(LedgerError) as caught:
        ledger.reserve(run="run", about=ABOUT, spend=SPEND, rounds=1, roles=roles, budget=BUDGET)
    assert refused(caught) == "SITE_HAS_NO_TRAINING_DATA"


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"rounds": True},
        {"rounds": 1.0},
        {"run": " "},
        {"about": " "},
        {"about": None},
        {"roles": {"anna": "training"}},
        {"roles": {" ": "train"}},
    ],
)
def test_wrong_arguments(ledger: Ledger, wrong: dict[str, object]) -> None:
    arguments = {"run": "run", "about": ABOUT, "spend": SPEND, "rounds": 3, "roles": ROLES, **wrong}
    with pytest.raises(JobError) as caught:
        ledger.reserve(budget=BUDGET, **arguments)  # type: ignore[arg-type]
    assert refused(caught) == "PRIVACY_INVALID"


def test_two_ways_to_write_a_name_are_one_patient(ledger: Ledger) -> None:
    for run, name in (("a", "Zoë"), ("b", " Zoe\u0308 ")):
        ledger.reserve(run=run, about=ABOUT, spend=SPEND, rounds=2, roles={name: "train"}, budget=BUDGET)
    assert ledger.verify().patients == 1
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND.times(4)))
    with raises_reason("ROLE_CHANGED"):
        roles = {"Zoë": "train", "Zoe\u0308": "test"}
        ledger.reserve(run="c", about=ABOUT, spend=SPEND, rounds=1, roles=roles, budget=BUDGET)


@pytest.mark.parametrize("changed", [{"anna": "test"}, {"emil": "train"}, {"dora": "test"}])
def test_a_role_never_changes(ledger: Ledger, changed: dict[str, str]) -> None:
    reserve(ledger)
    with raises_reason("ROLE_CHANGED", repr(next(iter(changed)))):
        ledger.reserve(run="b", about=ABOUT, spend=SPEND, rounds=1, roles={**ROLES, **changed}, budget=BUDGET)
    ledger.reserve(
        run="b", about=ABOUT, spend=SPEND, rounds=1, roles={**ROLES, "fred": "test"}, budget=BUDGET
    )
    assert ledger.verify().patients == len(ROLES) + 1


def test_a_round_is_booked_once_until_it_is_released(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    first = book(ledger, reservation, 0)
    assert first.attempt == 1
    assert book(ledger, reservation, 0) == first, "it may run again: none of its bytes left"
    assert ledger.book_again(reservation, 0, sha("model 0"), BUDGET) == first
    assert book(ledger, reservation, 1).id > first.id
    other_model = ledger.book(reservation, 0, sha("another"), BUDGET)
    assert isinstance(other_model, Booking) and other_model.id not in (first.id, reservation.id)
    assert ledger.summary(BUDGET).runs[0].booked == 3


def test_only_released_bytes_may_leave_and_only_the_same_again(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    assert not ledger.is_released(sha("bytes"))
    ledger.release(booking, sha("bytes"))
    entries = ledger.verify().entries
    ledger.release(booking, sha("bytes"))
    assert ledger.verify().entries == entries
    with pytest.raises(LedgerError) as caught:
        ledger.release(booking, sha("other bytes"))
    assert refused(caught) == "NOT_RELEASED"
    assert ledger.book(reservation, 0, sha("model 0"), BUDGET) == Release(booking, sha("bytes"))
    assert ledger.is_released(sha("bytes")) and not ledger.is_released(sha("other bytes"))


def test_lost_bytes_are_booked_anew(ledger: Ledger) -> None:
    reservation = reserve(ledger, rounds=2)
    ledger.release(book(ledger, reservation, 0), sha("lost"))
    second = ledger.book_again(reservation, 0, sha("model 0"), BUDGET)
    assert second.attempt == 2
    assert book(ledger, reservation, 0) == second
    ledger.release(second, sha("new"))
    assert ledger.book(reservation, 0, sha("model 0"), BUDGET) == Release(second, sha("new"))
    assert ledger.is_released(sha("lost")) and ledger.is_released(sha("new"))
    assert ledger.summary(BUDGET).runs[0].booked == 2


def test_a_failure_is_an_answer_and_the_next_one_is_charged(ledger: Ledger) -> None:
    reservation = reserve(ledger, rounds=2)
    first = book(ledger, reservation, 0)
    ledger.fail(first)
    second = book(ledger, reservation, 0)
    assert (second.attempt, second.round_index) == (2, 0) and second.id > first.id
    assert book(ledger, reservation, 0) == second, "not answered: it may run again"
    ledger.fail(second)
    third = ledger.book_again(reservation, 0, sha("model 0"), BUDGET)
    assert third.attempt == 3
    ledger.release(third, sha("bytes"))
    assert ledger.book(reservation, 0, sha("model 0"), BUDGET) == Release(third, sha("bytes"))
    (run,) = ledger.summary(BUDGET).runs
    assert (run.booked, run.released, run.failed) == (3, 1, 2)
    assert ledger.summary(BUDGET).rho == BUDGET.cost(SPEND.times(3))


def test_a_failure_counts_once_and_outlives_the_process(ledger: Ledger, tmp_path: Path) -> None:
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    ledger.fail(booking)
    said = ledger.verify(), ledger.summary(BUDGET)
    Ledger(*paths(tmp_path)).fail(booking)
    assert (ledger.verify(), ledger.summary(BUDGET)) == said
    assert book(Ledger(*paths(tmp_path)), reservation, 0).attempt == 2
    ledger.fail(booking)
    assert book(ledger, reservation, 0).attempt == 2, "the old booking's failure is not the new one's"


def test_nothing_is_released_for_a_failure(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    failed = book(ledger, reservation, 0)
    ledger.fail(failed)
    with raises_reason("NOT_RELEASED", "Entry 5 "):
        ledger.release(failed, sha("bytes"))
    ledger.release(book(ledger, reservation, 0), sha("new bytes"))
    with raises_reason("NOT_RELEASED", "Entry 5 "):
        ledger.release(failed, sha("new bytes"))
    assert ledger.is_released(sha("new bytes")) and not ledger.is_released(sha("bytes"))


def test_what_is_released_cannot_fail(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    ledger.release(booking, sha("bytes"))
    said = ledger.verify(), ledger.summary(BUDGET)
    ledger.fail(booking)
    assert (ledger.verify(), ledger.summary(BUDGET)) == said
    assert ledger.book(reservation, 0, sha("model 0"), BUDGET) == Release(booking, sha("bytes"))


def test_a_failed_round_asks_the_budget_like_any_other(ledger: Ledger) -> None:
    reservation = reserve(ledger, rounds=2)
    reserve(ledger, "rest", most_rounds() - 3)
    for attempt in (1, 2, 3):  # two of them reserved, one for which there is room
        booking = book(ledger, reservation, 0)
        assert booking.attempt == attempt
        ledger.fail(booking)
    entries = ledger.verify().entries
    for ask in (ledger.book, ledger.book_again):
        with pytest.raises(LedgerError) as caught:
            ask(reservation, 0, sha("model 0"), BUDGET)
        assert refused(caught) == "BUDGET_EXHAUSTED"
    assert ledger.verify().entries == entries
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND.times(most_rounds())))


def test_a_failure_stays_charged_when_its_run_is_closed(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    before, after = book(ledger, reservation, 0), book(ledger, reservation, 1)
    ledger.fail(before)
    ledger.close("run")
    ledger.fail(after)
    (run,) = ledger.summary(BUDGET).runs
    assert (run.booked, run.failed) == (2, 2)
    assert ledger.summary(BUDGET).rho == BUDGET.cost(SPEND.times(2))
    with raises_reason("NOT_ADMITTED", " run "):
        book(ledger, reservation, 0)


def test_only_what_is_booked_here_can_fail(ledger: Ledger, tmp_path: Path) -> None:
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    done = ledger.disclose(run="run", model_sha256=sha("m"), patients=["emil"], roles=ROLES, limit=1)
    other = new_ledger(tmp_path / "other")
    entries = ledger.verify().entries
    strangers = [
        book(other, reserve(other), 1),
        replace(booking, id=booking.id + 1),
        replace(booking, attempt=2),
    ]
    for stranger in (*strangers, done, reservation):
        with pytest.raises(LedgerError) as caught:
            ledger.fail(stranger)  # type: ignore[arg-type]
        assert refused(caught) == "NOT_ADMITTED"
    assert ledger.verify().entries == entries


def test_events_beyond_the_reserved_ones_are_admitted_anew(ledger: Ledger) -> None:
    most = most_rounds()
    reservation = reserve(ledger, rounds=2)
    rest = reserve(ledger, "rest", most - 3)
    for round_index in range(3):
        book(ledger, reservation, round_index)
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND.times(most)))
    with pytest.raises(LedgerError) as caught:
        book(ledger, reservation, 3)
    assert refused(caught) == "BUDGET_EXHAUSTED"
    book(ledger, rest, 0)  # what is reserved is there
    ledger.release(book(ledger, reservation, 2), sha("lost"))
    with raises_reason("BUDGET_EXHAUSTED"):
        ledger.book_again(reservation, 2, sha("model 2"), BUDGET)


def test_a_closed_run_gives_back_what_it_did_not_book(ledger: Ledger) -> None:
    reservation = reserve(ledger, rounds=most_rounds())
    booked = book(ledger, reservation, 0)
    with raises_reason("BUDGET_EXHAUSTED"):
        reserve(ledger, "other", 1)
    assert ledger.close("run") == [reservation]
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND))
    for key in (0, 1):
        with raises_reason("NOT_ADMITTED", " run "):
            book(ledger, reservation, key)
    ledger.release(booked, sha("bytes"))
    assert ledger.is_released(sha("bytes")), "it is paid for"
    with pytest.raises(LedgerError) as caught:
        ledger.close("run")
    assert refused(caught) == "RUN_INVALID"
    anew = reserve(ledger, rounds=2)
    assert anew.id != reservation.id
    assert book(ledger, anew, 0).id != booked.id
    assert ledger.summary(BUDGET).rho == pytest.approx(BUDGET.cost(SPEND.times(3)))


def test_tokens_of_another_ledger_are_worth_nothing(ledger: Ledger, tmp_path: Path) -> None:
    other = new_ledger(tmp_path / "other")
    reserve(other, "before")
    reservation = reserve(other)
    booking = book(other, reservation, 0)
    reserve(ledger)
    with pytest.raises(LedgerError) as caught:
        book(ledger, reservation, 0)
    assert refused(caught) == "NOT_ADMITTED"
    with pytest.raises(LedgerError) as caught:
        ledger.release(booking, sha("bytes"))
    assert refused(caught) == "NOT_ADMITTED"


@pytest.mark.parametrize("digest", ["", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", 5])
def test_a_digest_is_a_digest(ledger: Ledger, digest: str) -> None:
    reservation = reserve(ledger)
    booking = book(ledger, reservation, 0)
    with pytest.raises(JobError):
        ledger.book(reservation, 0, digest, BUDGET)
    with pytest.raises(JobError):
        ledger.release(booking, digest)


def disclose(ledger: Ledger, model: str, *patients: str, limit: int = 2) -> int:
    done = ledger.disclose(run="run", model_sha256=sha(model), patients=patients, roles=ROLES, limit=limit)
    assert done.patients == len(set(patients))
    return done.id


def test_evaluations_run_out(ledger: Ledger) -> None:
    first = disclose(ledger, "model 1", "emil", "dora")
    assert disclose(ledger, "model 1", "dora", "emil") == first
    assert disclose(ledger, "model 1", "emil") != first
    with pytest.raises(LedgerError) as caught:
        disclose(ledger, "model 2", "emil", "dora")
    assert refused(caught) == "EVALUATIONS_EXHAUSTED"
    assert disclose(ledger, "model 1", "emil", "dora", limit=1) == first
    disclose(ledger, "model 2", "dora")
    summary = ledger.summary(BUDGET)
    assert (summary.disclosures, summary.most_disclosures) == (3, 2)
    with pytest.raises(LedgerError) as caught:
        disclose(ledger, "model 1", "emil", "dora", limit=0)
    assert refused(caught) == "EVALUATION_NOT_ALLOWED"


def test_the_figures_of_an_evaluation_are_released_too(ledger: Ledger) -> None:
    reserve(ledger)
    done = ledger.disclose(run="run", model_sha256=sha("m"), patients=["emil"], roles=ROLES, limit=1)
    ledger.release(done, sha("auc 0.8"))
    ledger.release(done, sha("auc 0.8"))
    assert ledger.is_released(sha("auc 0.8"))
    with pytest.raises(LedgerError) as caught:
        ledger.release(done, sha("auc 0.81"))
    assert refused(caught) == "NOT_RELEASED"
    assert ledger.summary(BUDGET).runs[0].released == 0


@pytest.mark.parametrize("patients", [["anna"], ["emil", "anna"], ["nobody"]])
def test_who_is_trained_on_is_not_evaluated(ledger: Ledger, patients: list[str]) -> None:
    with pytest.raises(LedgerError) as caught:
        disclose(ledger, "model", *patients)
    assert refused(caught) == "ROLE_CHANGED"


def test_an_evaluation_sets_roles_too(ledger: Ledger) -> None:
    disclose(ledger, "model", "emil")
    with pytest.raises(LedgerError) as caught:
        ledger.reserve(run="r", about=ABOUT, spend=SPEND, rounds=1, roles={"emil": "train"}, budget=BUDGET)
    assert refused(caught) == "ROLE_CHANGED"
    with pytest.raises(LedgerError) as caught:
        disclose(ledger, "model")
    assert refused(caught) == "NOTHING_TO_EVALUATE"


def test_the_summary_names_nobody_and_adds_up(ledger: Ledger) -> None:
    reservation = fill(ledger)
    summary = ledger.summary(BUDGET)
    run, gone = summary.runs
    assert (run.run, run.about, run.rounds) == ("run", ABOUT, 3)
    assert (run.booked, run.released, run.failed) == (2, 1, 1)
    assert (run.is_open, run.patients) == (True, 3)
    assert (gone.run, gone.rounds, gone.booked, gone.is_open, gone.epsilon) == ("gone", 2, 0, False, 0.0)
    assert summary.rho == BUDGET.cost(reservation.spend.times(3))
    assert summary.epsilon == BUDGET.epsilon_of(summary.rho)
    assert 0 < summary.epsilon_pld <= summary.epsilon_rdp <= summary.epsilon * 1.01
    assert summary.remaining == pytest.approx(1 - summary.rho / BUDGET.allowance)
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert not any(name in text for name in ROLES)


def test_the_export_can_be_checked_by_whoever_has_the_key(ledger: Ledger, tmp_path: Path) -> None:
    fill(ledger)
    path, key_path = paths(tmp_path)
    keys = Keys(key_path.read_bytes())
    lines = [json.loads(json.dumps(line)) for line in ledger.events()]
    chain = START
    for seq, line in enumerate(lines, start=1):
        body = canonical_json(line["body"]).encode()
        chain = keys.link(chain, seq, line["unix_time"], line["kind"].encode(), body)
        assert (line["seq"], line["chain"]) == (seq, chain.hex())
    (failed,) = [line["body"]["of"] for line in lines if line["kind"] == "failure"]
    assert lines[failed - 1]["kind"] == "booking"
    reserved = [line["body"]["about"] for line in lines if line["kind"] == "reservation"]
    assert reserved == [ABOUT, ABOUT]
    (added,) = [line["patients"] for line in lines if line["kind"] == "patients"]
    assert dict(added) == {keys.patient(n).hex(): role for n, role in ROLES.items()}
    kinds = {line["kind"] for line in lines}
    assert kinds == set(FIELDS), "of every kind one"
    for line in lines:
        if line["kind"] in ("reservation", "booking", "disclosure"):
            assert {"kind"} <= set(line["body"]["mechanism"]) and line["body"]["trust"] is None
    for text in (json.dumps(lines).encode(), path.read_bytes()):
        assert not any(re.search(name.encode(), text) for name in ROLES)


def test_threads_of_one_process_may_share_a_ledger(ledger: Ledger) -> None:
    reservation = reserve(ledger, rounds=40)
    ids: list[int] = []

    def work(first: int) -> None:
        for round_index in range(first, first + 10):
            booking = book(ledger, reservation, round_index)
            ledger.release(booking, sha(f"bytes {round_index}"))
            ids.append(booking.id)

    threads = [threading.Thread(target=work, args=(10 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 40
    summary = ledger.summary(BUDGET)
    assert (summary.runs[0].booked, summary.runs[0].released) == (40, 40)


def test_a_run_takes_no_more_than_its_share_however_often_it_is_asked_again(tmp_path: Path) -> None:
    """A server that asks for rounds again and again spends the run's share, and not the whole budget."""
    ledger, half = new_ledger(tmp_path), most_rounds() // 2
    share = BUDGET.cost(SPEND.times(half)) / BUDGET.allowance
    asked: dict[str, Any] = {"about": ABOUT, "spend": SPEND, "roles": ROLES, "budget": BUDGET}
    with pytest.raises(LedgerError) as caught:
        ledger.reserve(run="run", rounds=half + 1, job_share=share, **asked)
    assert caught.value.reason == "JOB_SHARE_EXCEEDED"
    reservation = ledger.reserve(run="run", rounds=half - 1, job_share=share, **asked)
    for index in range(half):
        ledger.book(reservation, index, sha(f"model {index}"), BUDGET, share)
    with pytest.raises(LedgerError) as caught:
        ledger.book(reservation, half, sha("one more"), BUDGET, share)
    assert caught.value.reason == "JOB_SHARE_EXCEEDED"
    with pytest.raises(LedgerError):
        ledger.reserve(run="run", rounds=1, job_share=share, **asked)
    ledger.reserve(run="another", rounds=1, job_share=share, **asked)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rounds": most_rounds() + 1}, "BUDGET_EXHAUSTED"),
        ({"job_share": 0.5}, "JOB_SHARE_EXCEEDED"),
        ({"roles": dict.fromkeys(ROLES, "test")}, "SITE_HAS_NO_TRAINING_DATA"),
        (
            {
                "roles": {
                    name: {"train": "test", "test": "train"}.get(role, role) for name, role in ROLES.items()
                }
            },
            "ROLE_CHANGED",
        ),
        ({}, None),
    ],
)
def test_what_would_be_refused_is_known_beforehand_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    ledger = new_ledger(tmp_path)
    if reason == "ROLE_CHANGED":
        reserve(ledger, "before", 1)
    asked: dict[str, Any] = {"spend": SPEND, "rounds": most_rounds(), "roles": ROLES, "budget": BUDGET}
    entries = ledger.verify().entries
    said = []
    for ask in (ledger.check_room, lambda **asked: ledger.reserve(run="run", about=ABOUT, **asked)):
        try:
            ask(**asked | changes)
            said.append(None)
        except LedgerError as error:
            said.append(error.reason)
        if ask == ledger.check_room:
            assert ledger.verify().entries == entries
    assert said == [reason, reason]
