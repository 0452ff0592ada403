"""What a site books before it trains, and what it lets go on that ground."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from histoflare.errors import HistoflareError, JobError, LedgerError
from histoflare.privacy import sampler
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.own_policy import Narrowing, StewardPolicy, narrowed
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.policy import POLICIES, Policy, read_policy
from histoflare.privacy.spend import Spend
from histoflare.privacy.tally import Tally, like_training
from histoflare.site.bookkeeping import Answer, Bookkeeping
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import (
    audit_log_of,
    ledger_holds,
    on_workstation,
    open_ledger,
)
from histoflare.site.messages import EvaluateAnswer, TrainAnswer, digest_of
from histoflare.site.own_run import read_notes, read_own_run
from histoflare.site.preview import preview
from histoflare.site.refusals import LONGEST_DETAIL, MOST_NOTED, note_refusal
from histoflare.slides.splits import SplitRule
from tests.mem import make_mem_task
from tests.privacy.ledgers import SITE, sha, steward_ledger
from tests.refusals import raises_reason

LABELS = ["glandular", "solid"]
MODEL = {"w": np.zeros(3, dtype=np.float32)}
PLAN = DpSgd(noise_multiplier=20.0, sample_rate=0.1, steps=2)
ROUNDS = 3
WEIGHTS = 50_000


def site(folder: Path, train: int = 6, test: int = 2, **options: Any) -> SiteConfiguration:
    """Return a site of so many patients, two slides each."""
    folder.mkdir(parents=True, exist_ok=True)
    roles = ["train"] * train + ["test"] * test
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide", "patient", "label", "split"])
        for number, role in enumerate(roles):
            for slide in "ab":
                table.writerow([f"{number}{slide}.tif", f"p{number}", LABELS[number % 2], role])
    ledger, key = steward_ledger(folder)
    named = {"ledger": ledger, "ledger_key": key, "site": SITE, **options}
    return SiteConfiguration({"manifest": folder / "manifest.csv", "bags": folder / "bags"}, **named)


def is_empty(configuration: SiteConfiguration) -> bool:
    """Return whether nothing was ever written into a site's ledger."""
    return open_ledger(configuration).verify().entries == 1


def policy(**changes: Any) -> Policy:
    read = read_policy(POLICIES / "dp-patient.toml")
    names = ("epsilon", "evaluations", "job_share")
    protection: dict[str, Any] = {"job_share": 1.0, "evaluations": 10}
    protection |= {name: changes.pop(name) for name in names if name in changes}
    assert read.protection is not None
    return replace(read, protection=replace(read.protection, **protection), **changes)


def bookkeeping(
    configuration: SiteConfiguration, plan: PrivacyPlan = PLAN, rules: Policy | None = None, run: str = "run"
) -> Bookkeeping:
    return Bookkeeping(
        configuration,
        rules or policy(),
        plan,
        rounds=ROUNDS,
        weights=WEIGHTS,
        run=run,
        labels=LABELS,
        data="bags",
    )


class Training:
    """Gives another update at each call, as noise does."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> TrainAnswer:
        self.calls += 1
        return TrainAnswer({"w": np.full(3, self.calls, dtype=np.float32)}, 1.0, {}, patients=6)


def what(configuration: SiteConfiguration) -> list[str]:
    return [event["what"] for event in audit_log_of(configuration).read()]


def test_a_round_is_booked_then_trained_then_released(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at)
    of_job.reserve()

    def train() -> TrainAnswer:
        (run,) = open_ledger(at).summary(of_job.budget).runs
        assert (run.booked, run.released) == (1, 0), "before the first gradient, and not yet released"
        return training()

    answer = of_job.train(MODEL, 0, train)
    assert not answer.again
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.released, run.rounds) == (1, 1, ROUNDS)
    assert ledger_holds(at, answer.digest)
    assert what(at) == ["reserved", "released"]


def test_the_same_question_gets_the_same_bytes_and_no_training(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    for _ in range(2):  # the second time in a new process, of a job that resumes the run
        of_job = bookkeeping(at)
        of_job.reserve()
        first = of_job.train(MODEL, 0, training)
        again = of_job.train(MODEL, 0, training)
        assert again.again and training.calls == 1
        assert np.array_equal(first.answer.tensors["w"], again.answer.tensors["w"])
        assert (again.answer.weight, again.answer.patients) == (1.0, 6)


def test_another_model_is_another_event(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at)
    of_job.reserve()
    of_job.train(MODEL, 0, training)
    of_job.train({"w": np.ones(3, dtype=np.float32)}, 0, training)
    assert training.calls == 2
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert run.booked == 2


@pytest.mark.parametrize("reason", ["NOT_FINITE", "TRAINER_DIED", "BAG_DAMAGED"])
def test_that_training_failed_is_paid_for_and_says_no_more(tmp_path: Path, reason: str) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at)
    of_job.reserve()

    def fail() -> TrainAnswer:
        raise HistoflareError("the detail", reason=reason)

    for _ in range(ROUNDS):
        with pytest.raises(HistoflareError) as caught:
            of_job.train(MODEL, 0, fail)
        assert caught.value.reason == "TRAINING_FAILED"
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.failed, run.released) == (ROUNDS, ROUNDS, 0)
    events = list(audit_log_of(at).read())
    assert {event["reason"] for event in events if event["what"] == "refused"} == {reason}
    of_job.train(MODEL, 0, training)
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.released) == (ROUNDS + 1, 1), "beyond what was reserved, and the budget has room"


def test_an_error_nobody_thought_of_is_paid_for_too(tmp_path: Path) -> None:
    at = site(tmp_path)
    of_job = bookkeeping(at)
    of_job.reserve()

    def fail() -> TrainAnswer:
        raise MemoryError

    with pytest.raises(HistoflareError) as caught:
        of_job.train(MODEL, 0, fail)
    assert caught.value.reason == "TRAINING_FAILED"
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.failed) == (1, 1)


@pytest.mark.parametrize("end", [HistoflareError("stopped", reason="STOPPED"), KeyboardInterrupt()])
def test_a_round_that_was_stopped_runs_again_under_its_booking(tmp_path: Path, end: BaseException) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at)
    of_job.reserve()

    def stop() -> TrainAnswer:
        raise end

    with pytest.raises(type(end)):
        of_job.train(MODEL, 0, stop)
    of_job.train(MODEL, 0, training)
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.released) == (1, 1)


def test_a_round_under_a_trusted_server_is_booked_each_time(tmp_path: Path) -> None:
    """The server adds noise anew to the same bytes: outsiders see two draws."""
    at, training = site(tmp_path), Training()
    rules = read_policy(POLICIES / "trusted-server.toml")
    of_job = bookkeeping(at, UpdateNoise(noise_multiplier=60.0, noise_location="server"), rules)
    of_job.reserve()
    of_job.train(MODEL, 0, training)
    of_job.train(MODEL, 0, training)
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert run.booked == training.calls == 2
    assert "no protection from the server" in run.about and run.trusts_server


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_released_bytes_that_are_lost_are_booked_anew(tmp_path: Path, damage: str) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at)
    of_job.reserve()
    first = of_job.train(MODEL, 0, training)
    assert at.ledger is not None
    (stored,) = at.ledger.parent.rglob("release_*.safetensors")
    if damage == "gone":
        stored.unlink()
    else:
        content = bytearray(stored.read_bytes())
        content[-1] ^= 1
        stored.write_bytes(content)
    again = of_job.train(MODEL, 0, training)
    assert not again.again and again.digest != first.digest
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert run.booked == 2


def test_a_job_beyond_the_budget_is_refused_before_it_trains(tmp_path: Path) -> None:
    at = site(tmp_path)
    greedy = DpSgd(noise_multiplier=0.5, sample_rate=1.0, steps=10)
    with pytest.raises(LedgerError) as caught:
        bookkeeping(at, greedy).reserve()
    assert caught.value.reason == "BUDGET_EXHAUSTED"


def test_a_job_whose_sampler_takes_too_much_of_delta_is_refused_before_it_reserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = site(tmp_path)
    asked = bookkeeping(at)
    monkeypatch.setattr(sampler, "DISTANCE", 2.0**-60)  # 2e-8 of 1e-5
    asked.reserve()
    monkeypatch.setattr(sampler, "DISTANCE", 2.0**-53)
    with raises_reason("PRIVACY_INVALID", "sampler"):
        bookkeeping(at, run="other").reserve()
    (line,) = [event for event in audit_log_of(at).read() if event["what"] == "reserved"]
    assert line["sampler_delta"] == pytest.approx(
        (1 + math.exp(8)) * 2.0**-60 * asked.plan.numbers(ROUNDS, WEIGHTS)
    )


def test_the_sites_own_lower_epsilon_is_its_budget(tmp_path: Path) -> None:
    plan = DpSgd(budget_epsilon=3.0, budget_share=1.0, sample_rate=0.2, steps=2).settled(ROUNDS, WEIGHTS)
    own = StewardPolicy(everywhere=Narrowing(epsilon=2.0))
    bookkeeping(site(tmp_path / "a"), plan, policy(epsilon=3.0)).reserve()
    with raises_reason("BUDGET_EXHAUSTED", "ε = 2"):
        bookkeeping(site(tmp_path / "b"), plan, narrowed(policy(epsilon=3.0), own)).reserve()


def test_a_second_job_finds_what_the_first_has_left(tmp_path: Path) -> None:
    at = site(tmp_path)
    plan = DpSgd(budget_epsilon=7.0, budget_share=1.0, sample_rate=0.2, steps=2).settled(ROUNDS, WEIGHTS)
    bookkeeping(at, plan, run="first").reserve()
    with pytest.raises(LedgerError) as caught:
        bookkeeping(at, plan, run="second").reserve()
    assert caught.value.reason == "BUDGET_EXHAUSTED"
    bookkeeping(
        at,
        DpSgd(budget_epsilon=0.5, budget_share=1.0, sample_rate=0.2, steps=2).settled(ROUNDS, WEIGHTS),
        run="third",
    ).reserve()


def test_one_job_takes_no_more_than_its_share(tmp_path: Path) -> None:
    whole, half = (
        DpSgd(budget_share=share, sample_rate=0.2, steps=2).settled(ROUNDS, WEIGHTS) for share in (1.0, 0.5)
    )
    with pytest.raises(LedgerError) as caught:
        bookkeeping(site(tmp_path), whole, policy(job_share=0.5)).reserve()
    assert caught.value.reason == "JOB_SHARE_EXCEEDED"
    bookkeeping(site(tmp_path), half, policy(job_share=0.5)).reserve()


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Open(), ["open", "dp-sgd"]),
        (UpdateNoise(noise_multiplier=50.0), ["update-noise", "dp-sgd"]),
        (replace(PLAN, record="slide", slides_per_patient=2), ["slide", "patient"]),
        (replace(PLAN, noise_seed=1), ["noise_seed"]),
    ],
)
def test_a_plan_that_is_not_the_policys_is_refused(
    tmp_path: Path, plan: PrivacyPlan, says: list[str]
) -> None:
    with raises_reason("PRIVACY_MISMATCH", *says):
        bookkeeping(site(tmp_path), plan).reserve()


def test_too_few_patients_are_refused_before_anything_is_reserved(tmp_path: Path) -> None:
    at = site(tmp_path, train=4)
    with pytest.raises(JobError) as caught:
        bookkeeping(at).reserve()
    assert caught.value.reason == "TOO_FEW_PATIENTS"
    assert is_empty(at)


@pytest.mark.parametrize("scope", ["open", "dp-patient"])
def test_a_site_that_only_evaluates_reserves_nothing(tmp_path: Path, scope: str) -> None:
    at = site(tmp_path, evaluation_only=True)
    plan = Open() if scope == "open" else PLAN
    with pytest.raises(JobError) as caught:
        bookkeeping(at, plan, read_policy(POLICIES / f"{scope}.toml")).reserve()
    assert caught.value.reason == "EVALUATION_ONLY"
    assert is_empty(at)


def test_nothing_is_trained_that_was_not_reserved(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        bookkeeping(site(tmp_path)).train(MODEL, 0, Training())
    assert caught.value.reason == "NOT_ADMITTED"


def test_a_patient_keeps_the_role_of_the_first_job(tmp_path: Path) -> None:
    bookkeeping(site(tmp_path)).reserve()
    moved = site(tmp_path, train=7, test=1)
    with pytest.raises(LedgerError) as caught:
        bookkeeping(moved, run="later").reserve()
    assert caught.value.reason == "ROLE_CHANGED"


def test_a_patient_of_the_ledger_is_in_one_fold_only(tmp_path: Path) -> None:
    """A budget pays for training and not for figures: nobody is trained on here and tested there."""
    at = site(tmp_path, train=20, test=0)
    rows = [line.rpartition(",")[0] for line in at.files["manifest"].read_text().splitlines()]
    at.files["manifest"].write_text("\n".join(rows) + "\n")

    def of_fold(fold: int) -> Bookkeeping:
        rule = SplitRule(None, folds=5, fold=fold)
        named = {"rounds": ROUNDS, "weights": WEIGHTS, "run": f"fold-{fold}", "labels": LABELS}
        return Bookkeeping(at, policy(), PLAN, data="bags", split=rule, **named)

    first = of_fold(2)
    first.reserve()
    rule = SplitRule(None, folds=5, fold=2)
    assert first.roles == {f"p{number}": rule.role_of(f"p{number}") for number in range(20)}
    assert set(first.roles.values()) == {"train", "test"}
    with pytest.raises(LedgerError) as caught:
        of_fold(3).reserve()
    assert caught.value.reason == "ROLE_CHANGED"


def test_evaluations_are_counted(tmp_path: Path) -> None:
    at, rules = site(tmp_path, test=6), policy(evaluations=1)
    answer = EvaluateAnswer({"auc": 0.5}, patients=2)
    of_job = bookkeeping(at, rules=rules)
    assert of_job.evaluate(MODEL, "test", "task", lambda: answer) == answer
    assert of_job.evaluate(MODEL, "test", "task", lambda: answer) == answer, (
        "the same question, the same answer"
    )
    with pytest.raises(LedgerError) as caught:
        of_job.evaluate(MODEL, "test", "another seed", lambda: answer)
    assert caught.value.reason == "EVALUATIONS_EXHAUSTED"
    assert of_job.roles is not None and of_job.roles["p6"] == "test"
    assert ledger_holds(at, digest_of(answer.metrics))
    with pytest.raises(LedgerError) as caught:
        bookkeeping(at, rules=rules, run="later").evaluate(MODEL, "test", "task", lambda: answer)
    assert caught.value.reason == "EVALUATIONS_EXHAUSTED"
    with pytest.raises(LedgerError) as caught:
        bookkeeping(site(tmp_path / "b", test=6), rules=policy(evaluations=0)).evaluate(
            MODEL, "test", "task", lambda: answer
        )
    assert caught.value.reason == "EVALUATION_NOT_ALLOWED"


def test_a_question_in_a_training_job_lets_nobody_in_for_whom_nothing_is_reserved(tmp_path: Path) -> None:
    """The manifest grows while a job runs; a question about the model must not make that its cohort."""
    at = site(tmp_path / "s", test=6)
    of_job = bookkeeping(at)
    of_job.reserve()
    with (tmp_path / "s" / "manifest.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["new.tif", "p-new", "solid", "train"])
    reserved = dict(of_job.roles or {})
    with pytest.raises(JobError) as caught:
        of_job.evaluate(MODEL, "test", "question", lambda: EvaluateAnswer({"auc": 0.5}, 2))
    assert caught.value.reason == "COHORT_INVALID"
    assert of_job.roles == reserved and "p-new" not in reserved


def test_an_evaluation_over_too_few_patients_is_not_counted(tmp_path: Path) -> None:
    at = site(tmp_path, train=9, test=1)
    with pytest.raises(JobError) as caught:
        bookkeeping(at).evaluate(MODEL, "test", "task", lambda: EvaluateAnswer({"auc": 0.5}, patients=1))
    assert caught.value.reason == "TOO_FEW_PATIENTS"
    assert is_empty(at)


def test_all_patients_of_a_site_that_only_evaluates_are_for_testing(tmp_path: Path) -> None:
    at = site(tmp_path, evaluation_only=True)
    of_job = bookkeeping(at)
    of_job.evaluate(MODEL, "all", "task", lambda: EvaluateAnswer({"auc": 0.5}, patients=8))
    assert of_job.roles is not None and set(of_job.roles.values()) == {"test"}
    with pytest.raises(LedgerError) as caught:
        bookkeeping(site(tmp_path), run="later").reserve()
    assert caught.value.reason == "ROLE_CHANGED"


OPEN = read_policy(POLICIES / "open.toml")


def test_an_open_scope_books_nothing_and_still_says_what_left(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at, Open(), OPEN)
    of_job.reserve()
    assert is_empty(at)
    answers = [of_job.train(MODEL, index, training) for index in (0, 1)]
    note_refusal(at, "run", JobError("the details", reason="NOT_FINITE"))
    assert what(at) == ["released", "released", "refused"]
    (left,) = open_ledger(at).disclosures()
    assert (left.what, left.run, left.times, left.patients) == ("update", "run", 2, 6)
    assert all(ledger_holds(at, answer.digest) for answer in answers)
    assert open_ledger(at).summary(Budget(8.0, 1e-5)).rho == 0


def test_a_round_asked_for_again_with_the_same_bytes_is_noted_once(tmp_path: Path) -> None:
    at = site(tmp_path)
    of_job = bookkeeping(at, Open(), OPEN)
    of_job.reserve()
    for _ in range(2):
        of_job.train(MODEL, 0, Training())
    (left,) = open_ledger(at).disclosures()
    assert left.times == 1


def test_an_open_evaluation_is_noted_before_it_leaves(tmp_path: Path) -> None:
    at = site(tmp_path, test=8)
    answer = EvaluateAnswer({"auc": 0.5, "accuracy": 0.5, "secret": 1.0}, patients=8)
    for _ in range(2):
        assert bookkeeping(at, Open(), OPEN).evaluate(MODEL, "test", "task", lambda: answer) == answer
    (left,) = open_ledger(at).disclosures()
    assert (left.what, left.run, left.times, left.patients) == ("evaluation", "run", 1, 8)
    assert left.figures == ("accuracy", "auc"), "what the policy lets out"
    assert ledger_holds(at, digest_of(answer.metrics))


def test_an_evaluation_that_the_gate_keeps_is_not_noted(tmp_path: Path) -> None:
    at = site(tmp_path, test=1)
    bookkeeping(at, Open(), OPEN).evaluate(
        MODEL, "test", "task", lambda: EvaluateAnswer({"auc": 0.5}, patients=1)
    )
    assert is_empty(at)


@pytest.mark.parametrize("scope", ["open", "dp-patient", "trusted-server"])
def test_without_a_ledger_nothing_is_trained_or_evaluated(tmp_path: Path, scope: str) -> None:
    rules = read_policy(POLICIES / f"{scope}.toml")
    plan: PrivacyPlan = {
        "open": Open(),
        "dp-patient": PLAN,
        "trusted-server": UpdateNoise(noise_multiplier=60.0, noise_location="server"),
    }[scope]
    none = replace(site(tmp_path, test=8), ledger=None, ledger_key=None)
    gone = replace(none, ledger=tmp_path / "x" / "ledger.sqlite", ledger_key=tmp_path / "y" / "ledger.key")

    def nothing() -> Any:
        raise AssertionError("nothing is computed")

    for at in (none, gone):
        for ask in (
            lambda at=at: bookkeeping(at, plan, rules).reserve(),
            lambda at=at: bookkeeping(at, plan, rules).train(MODEL, 0, nothing),
            lambda at=at: bookkeeping(at, plan, rules).evaluate(MODEL, "test", "task", nothing),
            lambda at=at: bookkeeping(at, plan, rules).reserve_tally(TALLY, 1, 4),
        ):
            with pytest.raises(HistoflareError) as caught:
                ask()
            known = ("LEDGER_MISSING", "NOT_ADMITTED", "EVALUATION_NOT_ALLOWED", "PRIVACY_MISMATCH")
            assert caught.value.reason in known
        with pytest.raises(LedgerError) as caught:
            bookkeeping(at, plan, rules).reserve()
        assert caught.value.reason == "LEDGER_MISSING"
        note_refusal(at, "run", caught.value)
        assert what(at) == ["refused"]
    assert not (tmp_path / "x" / "ledger.sqlite").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize("plan", [PLAN, Open()])
def test_another_ledger_than_the_sites_own_is_refused(tmp_path: Path, plan: PrivacyPlan) -> None:
    rules = policy() if plan is PLAN else OPEN
    at = site(tmp_path)
    with pytest.raises(LedgerError) as caught:
        bookkeeping(replace(at, site="hospital-b"), plan, rules).reserve()
    assert caught.value.reason == "LEDGER_FOREIGN"
    tried_out = on_workstation(SITE, replace(at, ledger=None, ledger_key=None))
    bookkeeping(tried_out, plan, rules).reserve()
    with pytest.raises(LedgerError) as caught:
        bookkeeping(replace(tried_out, workstation=False), plan, rules).reserve()
    assert caught.value.reason == "LEDGER_FOREIGN"


def test_a_reason_that_comes_again_and_again_does_not_fill_the_disk(tmp_path: Path) -> None:
    at = site(tmp_path)
    for _ in range(MOST_NOTED + 50):
        note_refusal(at, "again and again", JobError("x" * 20_000, reason="NOT_ADMITTED"))
    note_refusal(at, "again and again", JobError("another", reason="KIT_CHANGED"))
    lines = list(audit_log_of(at).read())
    assert [line["reason"] for line in lines] == ["NOT_ADMITTED"] * MOST_NOTED + ["KIT_CHANGED"]
    assert [bool(line.get("further")) for line in lines].index(True) == MOST_NOTED - 1
    assert max(len(line["detail"]) for line in lines) == LONGEST_DETAIL


SHARED = DpSgd(noise="shared", honest=3, noise_multiplier=20.0, sample_rate=0.1, steps=1)
"""Noise that sites share: each round is one sum, of which this site knows four."""


def shared_policy(**changes: Any) -> Policy:
    return replace(read_policy(POLICIES / "dp-shared.toml"), **changes)


def attempt(of_job: Bookkeeping, name: str, train: Callable[[], TrainAnswer], countable: int = 4) -> Answer:
    return of_job.train(MODEL, 0, train, transcript=sha(name), countable=countable)


def test_each_attempt_at_a_sum_is_booked_by_its_transcript(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at, SHARED, shared_policy())
    of_job.reserve()
    first = attempt(of_job, "a", training)
    again = attempt(of_job, "a", training)
    assert (again.again, again.digest, training.calls) == (True, first.digest, 1)
    attempt(of_job, "b", training, countable=5)  # the first one was void: another list, the same model
    bookings = [line["body"] for line in open_ledger(at).events() if line["kind"] == "booking"]
    assert [(body["model"], body["mechanism"]["countable"]) for body in bookings] == [
        (sha("a"), 4),
        (sha("b"), 5),
    ]
    summary = open_ledger(at).summary(of_job.budget)
    (run,) = summary.runs
    assert (run.rounds, run.booked, run.released, run.spend.honest) == (ROUNDS, 2, 2, 3)
    assert summary.if_all_collude is not None and summary.if_all_collude.rho > summary.rho
    with raises_reason("SUM_TOO_FEW_KNOWN"):
        attempt(of_job, "c", training, countable=3)
    assert training.calls == 2, "nothing was trained"


@pytest.mark.parametrize("plan", [SHARED, replace(PLAN, steps=1)])
def test_lost_bytes_of_a_sum_are_never_made_anew(tmp_path: Path, plan: DpSgd) -> None:
    """The pads of a list hide one vector; the difference of two would be one site's with little noise."""
    at, training = site(tmp_path), Training()
    rules = shared_policy() if plan is SHARED else policy()
    of_job = bookkeeping(at, plan, rules)
    of_job.reserve()
    attempt(of_job, "a", training)
    for path in (open_ledger(at).path.with_suffix(".releases") / "run").iterdir():
        path.unlink()
    with raises_reason("NOT_RELEASED"):
        attempt(of_job, "a", training)
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, training.calls) == (1, 1)
    attempt(of_job, "b", training)


def test_a_failed_attempt_is_paid_for_and_its_list_serves_no_more(tmp_path: Path) -> None:
    at = site(tmp_path)
    of_job = bookkeeping(at, SHARED, shared_policy())
    of_job.reserve()

    def fail() -> TrainAnswer:
        raise HistoflareError("the detail", reason="NOT_FINITE")

    for name, reason in (("a", "TRAINING_FAILED"), ("a", "NOT_RELEASED"), ("b", "TRAINING_FAILED")):
        with pytest.raises(HistoflareError) as caught:
            attempt(of_job, name, fail)
        assert caught.value.reason == reason
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert (run.booked, run.failed) == (2, 2)


@pytest.mark.parametrize("trust_ca", [False, True])
def test_that_the_authority_is_trusted_stands_in_the_ledger(tmp_path: Path, trust_ca: bool) -> None:
    at = site(tmp_path)
    bookkeeping(at, SHARED, shared_policy(trust_ca=trust_ca)).reserve()
    (run,) = open_ledger(at).summary(Budget(8.0, 1e-5)).runs
    assert run.trusts_ca == trust_ca and ("certificate authority" in run.about) == trust_ca
    assert open_ledger(at).summary(Budget(8.0, 1e-5)).runs[0].trusts_server is False


def test_a_sampler_must_do_for_both_budgets(tmp_path: Path) -> None:
    rules = shared_policy()
    assert rules.protection is not None
    loose = replace(rules, protection=replace(rules.protection, all_collude_epsilon=60.0))
    at = site(tmp_path)
    with raises_reason("PRIVACY_INVALID", "sampler"):
        bookkeeping(at, SHARED, loose).reserve()
    assert is_empty(at)


def test_without_a_budget_an_attempt_is_noted_by_its_transcript(tmp_path: Path) -> None:
    at, training = site(tmp_path), Training()
    of_job = bookkeeping(at, Open(), read_policy(POLICIES / "open.toml"))
    of_job.reserve()
    attempt(of_job, "a", training)
    attempt(of_job, "b", training)
    noted = [line["body"]["model"] for line in open_ledger(at).events() if line["kind"] == "disclosure"]
    assert noted == [sha("a"), sha("b")]


TALLY = Tally(noise_multiplier=1.0)


def counts(configuration: SiteConfiguration, *, calls: list[int] | None = None) -> Callable[[], TrainAnswer]:
    """Return what makes other counts at each call, as noise does."""
    called = [] if calls is None else calls

    def make() -> TrainAnswer:
        called.append(1)
        return TrainAnswer({"tally": np.full(4, len(called), dtype=np.float64)}, 1.0, {}, patients=6)

    return make


def test_an_evaluation_under_the_budget_is_booked_on_those_asked_about(tmp_path: Path) -> None:
    at = site(tmp_path, train=6, test=6)
    of_job = bookkeeping(at)
    of_job.reserve()
    reservation = of_job.reserve_tally(TALLY, 1, 4)
    assert (reservation.patients, reservation.spend) == (6, TALLY.spend())
    answer = of_job.tally(reservation, MODEL, 0, "question", counts(at))
    assert ledger_holds(at, answer.digest)
    ledger = open_ledger(at)
    by_role = {
        role: ledger.exposure(of_job.roles or {}, of_job.budget, role)[0] for role in ("train", "test")
    }
    assert by_role["test"] == pytest.approx(of_job.budget.cost(TALLY.spend()))
    assert by_role["train"] == pytest.approx(of_job.budget.cost(PLAN.spend().times(ROUNDS)))
    events = ledger.history("run").events
    assert [(event.what, event.is_protected) for event in events] == [("evaluation", True)]
    assert ledger.disclosures() == ()


def test_the_same_evaluation_again_has_the_same_bytes_and_another_is_paid_for(tmp_path: Path) -> None:
    at, calls = site(tmp_path, test=6), list[int]()
    of_job = bookkeeping(at)
    found = []
    for question in ("one", "one", "other"):
        reservation = of_job.reserve_tally(TALLY, 1, 4)
        found.append(of_job.tally(reservation, MODEL, 0, question, counts(at, calls=calls)))
    assert [answer.again for answer in found] == [False, True, False]
    assert found[0].digest == found[1].digest != found[2].digest
    assert len(calls) == 2
    (run,) = open_ledger(at).summary(of_job.budget).runs
    assert run.booked == 2


def test_an_evaluation_that_the_budget_has_no_room_for_is_refused(tmp_path: Path) -> None:
    at = site(tmp_path, test=6)
    of_job = bookkeeping(at)
    with raises_reason("BUDGET_EXHAUSTED"):
        of_job.reserve_tally(TALLY, 1000, 4)
    reservation = of_job.reserve_tally(Tally(noise_multiplier=0.8), 1, 4)
    of_job.tally(reservation, MODEL, 0, "one", counts(at))
    with raises_reason("BUDGET_EXHAUSTED"):
        of_job.tally(reservation, MODEL, 0, "other", counts(at))


def test_a_jobs_share_is_counted_for_each_patient(tmp_path: Path) -> None:
    """Whom it trains on and whom it asks about are other people: their charges do not add up."""
    at, rules = site(tmp_path, test=6), policy(job_share=0.3)
    plan = DpSgd(budget_share=0.29, sample_rate=0.1, steps=2).settled(ROUNDS, WEIGHTS)
    of_job = bookkeeping(at, plan, rules)
    of_job.reserve()
    tally = like_training(plan, ROUNDS, 1, 4)
    assert tally is not None
    of_job.reserve_tally(tally, 1, 4)
    with raises_reason("JOB_SHARE_EXCEEDED"):  # on the same patients they do
        of_job.reserve_tally(replace(tally, noise_multiplier=3.0), 1, 4)


def test_an_evaluation_over_few_patients_is_refused_before_it_is_booked(tmp_path: Path) -> None:
    at = site(tmp_path, test=2)
    with raises_reason("TOO_FEW_PATIENTS"):
        bookkeeping(at).reserve_tally(TALLY, 1, 4)
    assert is_empty(at)


def test_repeatable_noise_of_an_evaluation_is_the_policys_to_allow(tmp_path: Path) -> None:
    at = site(tmp_path, test=6)
    with raises_reason("PRIVACY_MISMATCH"):
        bookkeeping(at).reserve_tally(replace(TALLY, noise_seed=1), 1, 4)


@pytest.mark.parametrize(
    ("tally", "says"),
    [
        (TALLY, "dp-patient: evaluation"),
        (replace(TALLY, noise_seed=1), "dp-patient: evaluation, repeatable noise: no protection"),
        (
            replace(TALLY, noise="shared", honest=2),
            "dp-patient: evaluation, if the holder of the certificate authority is honest",
        ),
    ],
    ids=["secret", "seeded", "the authority is trusted"],
)
def test_the_ledger_says_what_the_noise_of_an_evaluation_protects_against(
    tmp_path: Path, tally: Tally, says: str
) -> None:
    at, rules = site(tmp_path, test=6), policy(trust_ca=True)
    assert rules.protection is not None
    rules = replace(rules, protection=replace(rules.protection, seeded_noise=True))
    reservation = bookkeeping(at, rules=rules).reserve_tally(tally, 1, 4)
    assert reservation.about == says


def test_an_evaluation_under_a_trusted_server_has_the_same_bytes_again(tmp_path: Path) -> None:
    """The server adds the noise of updates; that of counts is the site's own."""
    at, calls = site(tmp_path, test=6), list[int]()
    plan = UpdateNoise(noise_multiplier=100.0, noise_location="server")
    of_job = bookkeeping(at, plan, policy(mechanism="server-noise"))
    reservation = of_job.reserve_tally(TALLY, 1, 4)
    for again in (False, True):
        assert of_job.tally(reservation, MODEL, 0, "one", counts(at, calls=calls)).again is again
    assert len(calls) == 1


def test_a_sites_own_page_adds_no_evaluation_to_what_others_paid_and_forgets_no_trust(tmp_path: Path) -> None:
    """Whom a run trained on and whom it asked about are other people; the worst of both is said."""
    at = site(tmp_path, test=6)
    plan = UpdateNoise(noise_multiplier=100.0, noise_location="server")
    of_job = bookkeeping(at, plan, policy(mechanism="server-noise"))
    of_job.reserve()
    of_job.reserve_tally(TALLY, 1, 4)
    spent = read_own_run(at, "run", tmp_path, read_notes(at, "run")).spent
    assert spent is not None and spent.trusts_server
    assert spent.epsilon == pytest.approx(epsilon([TALLY.spend()], spent.delta))
    assert (spent.booked, spent.reserved) == (0, 1)


def test_a_site_that_only_evaluates_is_shown_the_noise_that_it_adds_by_itself(tmp_path: Path) -> None:
    """It is in no sum: nobody's share of noise is beside its own."""
    at = site(tmp_path, evaluation_only=True)
    shared = replace(TALLY, noise_multiplier=4.0, noise="shared", honest=2)
    found = preview(at, policy(), shared, 1, 4, make_mem_task(LABELS, "encoder"))
    assert (found.patients, found.if_all_collude) == (8, None)
    reserved = bookkeeping(at).reserve_tally(shared.of_site(only_evaluates=True), 1, 4)
    assert found.share == pytest.approx(found.budget.share_of(found.budget.cost(reserved.spend)))


def test_a_scope_without_a_budget_has_no_evaluation_in_it(tmp_path: Path) -> None:
    at = site(tmp_path, test=6)
    with raises_reason("PRIVACY_MISMATCH"):
        bookkeeping(at, Open(), read_policy(POLICIES / "open.toml")).reserve_tally(TALLY, 1, 4)


def test_figures_without_noise_leave_only_where_the_policy_opens_them(tmp_path: Path) -> None:
    at = site(tmp_path, test=6)
    of_job = bookkeeping(at, rules=policy(evaluations=0))
    with raises_reason("EVALUATION_NOT_ALLOWED"):
        of_job.evaluate(MODEL, "test", "question", lambda: EvaluateAnswer({"auc": 1.0}, 6))
    assert is_empty(at)


LOUD = DpSgd(noise_multiplier=2.0, sample_rate=0.1, steps=2)
"""What is left over where a budget was calibrated to has no room for this."""


def leaving_out(**changes: Any) -> Policy:
    read = policy(**changes)
    assert read.protection is not None
    return replace(read, protection=replace(read.protection, exhausted="leave out"))


def test_who_is_left_out_is_known_to_the_site_alone(tmp_path: Path) -> None:
    """The jobs before used up all of p0 and of the test patient p6."""
    at, rules, budget = site(tmp_path, test=6), leaving_out(), leaving_out().protection
    assert budget is not None
    spend = Spend(budget.budget().calibrate(1.0, 1))
    for name, role in (("p0", "train"), ("p6", "test")):
        open_ledger(at).reserve(
            run=name, about="x", spend=spend, rounds=1, roles={name: role}, budget=budget.budget(), role=role
        )
    refused = bookkeeping(at, LOUD)
    with raises_reason("BUDGET_EXHAUSTED"):
        refused.reserve()
    tally = Tally(noise_multiplier=5.0)
    for _ in range(2):  # the second time after a crash, in a new process
        of_job = bookkeeping(at, LOUD, rules)
        of_job.reserve()
        assert of_job.left_out == {"p0"} and of_job.roles is not None and len(of_job.roles) == 12
        of_job.reserve_tally(tally, 1, 4)
        of_job.reserve_tally(tally, 1, 4)
        assert of_job.left_out == {"p0", "p6"}
    left_out = [event["left_out"] for event in audit_log_of(at).read() if event["what"] == "reserved"]
    assert left_out == [1, 1]
    runs = {(run.run, run.about, run.patients) for run in open_ledger(at).summary(of_job.budget).runs}
    assert len(runs) == 4 and {patients for run, _, patients in runs if run == "run"} == {5}


def test_too_few_patients_are_those_of_the_manifest(tmp_path: Path) -> None:
    """Not those with something left: that would tell of them."""
    at, rules = site(tmp_path, train=6), leaving_out(minimum_patients=6)
    most = bookkeeping(at, DpSgd(budget_share=1.0, sample_rate=0.1, steps=2).settled(ROUNDS, WEIGHTS), rules)
    most.reserve()
    assert most.left_out == frozenset()
    more = bookkeeping(at, LOUD, rules, run="more")
    more.reserve()
    assert more.left_out == {f"p{number}" for number in range(6)}
    assert more.train(MODEL, 0, Training()).answer.patients == 6
    with raises_reason("TOO_FEW_PATIENTS"):
        bookkeeping(at, rules=leaving_out(minimum_patients=7), run="few").reserve()


def test_under_noise_that_can_be_repeated_nobody_is_left_out(tmp_path: Path) -> None:
    at, rules = site(tmp_path), leaving_out()
    assert rules.protection is not None
    rules = replace(rules, protection=replace(rules.protection, seeded_noise=True))
    for reserve in (
        bookkeeping(at, replace(PLAN, noise_seed=1), rules).reserve,
        lambda: bookkeeping(at, rules=rules).reserve_tally(Tally(noise_multiplier=20.0, noise_seed=1), 1, 4),
    ):
        with raises_reason("LEAVE_OUT_UNSOUND"):
            reserve()
    assert is_empty(at)


def test_a_plan_says_how_many_would_be_left_out(tmp_path: Path) -> None:
    at, rules = site(tmp_path), leaving_out()
    assert rules.protection is not None
    budget = rules.protection.budget()
    spend = Spend(budget.calibrate(1.0, 1))
    open_ledger(at).reserve(run="x", about="x", spend=spend, rounds=1, roles={"p0": "train"}, budget=budget)
    task = make_mem_task(LABELS, "encoder")
    found = preview(at, rules, LOUD, ROUNDS, WEIGHTS, task)
    assert (found.patients, found.left_out, found.before) == (6, 1, 0.0)
    refused = preview(at, policy(), LOUD, ROUNDS, WEIGHTS, task)
    assert refused.left_out == 0 and refused.refusal is not None
    assert refused.refusal.reason == "BUDGET_EXHAUSTED"
