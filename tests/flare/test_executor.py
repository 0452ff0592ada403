"""A site answers with an update, metrics or a fixed code, only where it was admitted."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import capabilities
from histoflare.flare import executor as module
from histoflare.flare.executor import SiteExecutor
from histoflare.flare.header_names import ATTEMPT, HELLOS, METRICS, NUMBERS, TOTAL_ROUNDS, WEIGHT
from histoflare.flare.site_keys import SimulatedKeys
from histoflare.privacy.plan import DpSgd, Open
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.tally import Tally
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.transports.masked_sum import MaskedSum
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import open_ledger
from histoflare.site.site_file import SITE_FILE, SITES_VARIABLE, read_site_file
from histoflare.site.trainer import EvaluateAnswer, TrainAnswer, TrainerSetup
from histoflare.slides.splits import DEFAULT_SPLIT
from tests.privacy.ledgers import paths, site_lines

from ..mem import make_mem_task
from .certified import Consortium, hello_of
from .stand_in import StandInEngine, job_of_engine

TASK = make_mem_task(["a", "b"], "encoder")
TENSORS = {"w": np.array([0.5], dtype=np.float32)}


class StandInTrainer:
    """Answers at once, and notes what it was asked."""

    made: list[StandInTrainer]
    error: Exception | None = None
    unreadable: Exception | None = None
    metric_patients = 3
    numbers: ClassVar[dict[str, float]] = {}
    tensors: ClassVar[dict[str, Any]] = TENSORS
    pid: int | None = None

    def __init__(self, setup: TrainerSetup, say: Any) -> None:
        self.setup = setup
        self.asked: list[Any] = []
        self.prepared = 0
        self.closed = False
        StandInTrainer.made.append(self)

    def train(
        self, state: Any, round_index: int, total_rounds: int, *, metrics: Any, left_out: Any, stopped: Any
    ) -> Any:
        self.asked.append((round_index, total_rounds, list(metrics), stopped()))
        if StandInTrainer.error is not None:
            raise StandInTrainer.error
        values = dict.fromkeys(metrics, 0.5)
        return TrainAnswer(
            dict(self.tensors),
            6.0,
            values,
            patients=6,
            metric_patients=self.metric_patients,
            numbers=dict(self.numbers),
        )

    def prepare(self, *, to_train: bool = True, left_out: Any, stopped: Any) -> None:
        self.pid = 1
        self.prepared += 1
        if StandInTrainer.unreadable is not None:
            raise StandInTrainer.unreadable

    def evaluate(self, state: Any, split: str, *, stopped: Any) -> Any:
        self.asked.append((split, stopped()))
        return EvaluateAnswer(metrics={"auc": 0.75}, patients=4)

    def tally(self, state: Any, split: str, *, left_out: Any, stopped: Any) -> Any:
        self.asked.append((split, stopped()))
        return TrainAnswer({"tally": np.zeros(4)}, 1.0, {}, patients=6)

    def close(self) -> None:
        self.closed = True


class Site:
    """``clinic-a`` with its file in the kit's local folder, and an executor."""

    def __init__(self, root: Path, text: str = "", run: str = "job", best: str | None = None) -> None:
        self.kit = root
        self.run = run
        lines = site_lines(root / "site", "clinic-a")
        (root / SITE_FILE).write_text(f'manifest = "m.csv"\nbags = "bags"\n{lines}{text}')
        self.engine = StandInEngine(
            root, task=TASK, strategy=FedAvg(), seed=5, split=DEFAULT_SPLIT, best_metric=best
        )
        self.executor = SiteExecutor()
        self.admitted = True
        self.pins: dict[str, str] = {}

    def ask(
        self,
        name: str = "train",
        index: int = 0,
        fl_ctx: FLContext | None = None,
        signal: Signal | None = None,
        headers: dict[str, Any] | None = None,
    ) -> Shareable:
        task = DXO(DataKind.WEIGHTS, data=dict(TENSORS)).to_shareable()
        task.set_header(AppConstants.CURRENT_ROUND, index)
        task.set_header(TOTAL_ROUNDS, 3)
        for header, value in (headers or {}).items():
            task.set_header(header, value)
        return self.executor.execute(name, task, fl_ctx or self.context(), signal or Signal())

    def context(self) -> FLContext:
        fl_ctx = self.engine.context("clinic-a")
        if self.admitted:
            policy = replace(read_policy(POLICIES / "open.toml"), pins=self.pins)
            try:
                configuration = read_site_file(self.kit / SITE_FILE)
            except JobError:
                ledger, key = paths(self.kit / "site")
                configuration = SiteConfiguration(
                    {"manifest": self.kit / "m.csv", "bags": self.kit / "bags"},
                    ledger=ledger,
                    ledger_key=key,
                )
            bookkeeping = Bookkeeping(
                configuration,
                policy,
                Open(),
                rounds=3,
                weights=0,
                run=self.run,
                labels=["a", "b"],
                data="bags",
            )
            capabilities.issue(capabilities.Admitted(self.engine.job, policy, 3, bookkeeping), fl_ctx)
        return fl_ctx


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    monkeypatch.setattr(module, "Trainer", StandInTrainer)
    StandInTrainer.made, StandInTrainer.error, StandInTrainer.metric_patients = [], None, 3
    yield
    capabilities._released.clear()


def test_numbers_are_let_go_beside_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInTrainer, "numbers", {"steps": 5.0})
    dxo = from_shareable(Site(tmp_path).ask())
    assert dxo.meta == {WEIGHT: 6.0, NUMBERS: {"steps": 5.0}}
    assert capabilities.take_release(dxo.meta[NUMBERS]) is not None


def test_an_update_is_released_and_goes_with_its_weight(tmp_path: Path) -> None:
    reply = Site(tmp_path).ask(index=1)
    dxo = from_shareable(reply)
    assert (dxo.data_kind, dxo.meta) == (DataKind.WEIGHT_DIFF, {WEIGHT: 6.0})
    released = capabilities.take_release(dxo.data)
    assert released is not None and released.patients == 6
    (trainer,) = StandInTrainer.made
    assert trainer.asked == [(1, 3, [], False)]
    assert (trainer.setup.site, trainer.setup.seed, trainer.setup.run) == ("clinic-a", 5, "job")


@pytest.mark.parametrize("reason", [None, "TRAINING_FAILED"])
def test_an_update_and_a_failure_come_at_the_public_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    monkeypatch.setattr(module, "job_of", job_of_engine)
    if reason:
        StandInTrainer.error = HistoflareError("no memory", reason=reason)
    site = Site(tmp_path)
    site.engine.job.answer_seconds, site.engine.job.run = 1, None
    for prepares in (1, 0):  # the first task also has the time in which the data are read
        fl_ctx = site.context()
        capabilities.keep_task(Shareable(), fl_ctx)
        started = time.monotonic()
        reply = site.ask(fl_ctx=fl_ctx)
        assert 1 + prepares <= time.monotonic() - started
        assert reply.get_return_code() == (f"REFUSED_{reason}" if reason else ReturnCode.OK)
    stopped = Signal()
    stopped.trigger(True)
    capabilities.keep_task(Shareable(), fl_ctx := site.context())
    assert site.ask(fl_ctx=fl_ctx, signal=stopped).get_return_code() == "REFUSED_STOPPED"


def test_no_data_are_looked_at_before_a_budget_is_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)

    def nothing_reserved(self: Bookkeeping) -> None:
        raise JobError("nothing is reserved", reason="NOT_ADMITTED")

    monkeypatch.setattr(Bookkeeping, "check_reserved", nothing_reserved)
    reply = site.ask()
    assert reply.get_return_code().endswith("NOT_ADMITTED")
    assert StandInTrainer.made == []


def test_one_trainer_serves_every_round_and_ends_with_the_job(tmp_path: Path) -> None:
    site = Site(tmp_path, run="earlier")
    for index in range(3):
        site.ask(index=index)
    (trainer,) = StandInTrainer.made
    assert trainer.setup.run == "earlier", "a job that goes on keeps the name of its run"
    site.executor.handle_event(EventType.END_RUN, site.context())
    assert trainer.closed


def test_a_metric_is_asked_for_only_if_the_policy_lets_it_out(tmp_path: Path) -> None:
    dxo = from_shareable(Site(tmp_path, best="auc").ask())
    assert dxo.meta[METRICS] == {"validation/auc": 0.5}
    released = capabilities.take_release(dxo.meta[METRICS])
    assert released is not None and released.patients == 3
    assert METRICS not in from_shareable(Site(tmp_path, best="loss").ask()).meta


class SumSite(Site):
    """A site with a kit, in a job whose server sees only the sum; it knows two others."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        consortium = Consortium(folder)
        root = consortium.kit("clinic-a") / "local"
        root.mkdir()
        super().__init__(root)
        about = {"transport": MaskedSum(), "plan": Open(), "protocol": {}}
        self.engine.job.__dict__.update(about)
        self.others = {site: consortium.keys(site) for site in ("clinic-b", "clinic-c")}
        self.pins = {site: keys.fingerprint for site, keys in self.others.items()}
        monkeypatch.setattr(StandInTrainer, "tensors", {"w": np.array([5, 7])})

    def list(self, mine: Shareable, attempt: int = 0) -> list[dict[str, str]]:
        """Return the hellos of all sites for an attempt at round 0."""
        others = [hello_of(site, keys, "job", 0, attempt) for site, keys in self.others.items()]
        return [from_shareable(mine).data, *others]

    def books(self) -> list[Any]:
        return open_ledger(read_site_file(self.kit / SITE_FILE)).disclosures()


def test_a_site_says_hello_and_then_sends_what_only_all_together_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SumSite(tmp_path, monkeypatch)
    for attempt in range(2):
        mine = site.ask("hello", headers={ATTEMPT: attempt})
        assert capabilities.take_hello(from_shareable(mine).data)
        (trainer,) = StandInTrainer.made
        assert len(trainer.asked) == attempt, "a hello trains nothing"
        dxo = from_shareable(site.ask(headers={ATTEMPT: attempt, HELLOS: site.list(mine, attempt)}))
        assert (dxo.data_kind, dxo.meta) == (DataKind.WEIGHT_DIFF, {WEIGHT: 1.0})
        assert dxo.data["w"].dtype == np.int64 and abs(dxo.data["w"]).min() > 2**32
        assert capabilities.take_release(dxo.data) is not None
    assert site.books()


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda hellos: hellos[1:], "SUM_LIST_INVALID"),
        (lambda hellos: hellos[:2], "SUM_TOO_FEW_KNOWN"),
        (
            lambda hellos: [*hellos[:2], hello_of("clinic-c", SimulatedKeys())],
            "SUM_LIST_INVALID",
        ),
        (lambda hellos: None, "SUM_LIST_INVALID"),
    ],
    ids=["without this site", "a site is missing", "an invented key", "no list"],
)
def test_a_server_that_lies_about_the_list_gets_nothing_trained_or_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Any, reason: str
) -> None:
    site = SumSite(tmp_path, monkeypatch)
    mine = site.ask("hello", headers={ATTEMPT: 0})
    hellos = site.list(mine)
    reply = site.ask(headers={ATTEMPT: 0, HELLOS: lie(hellos)})
    assert reply.get_return_code() == f"REFUSED_{reason}"
    assert StandInTrainer.made[0].asked == [] and not site.books()
    reply = site.ask(headers={ATTEMPT: 0, HELLOS: hellos})
    assert reply.get_return_code() == "REFUSED_SUM_LIST_INVALID", "these keys are gone"


def test_a_site_with_too_few_pins_for_any_list_says_no_hello(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse the list, when the others have trained and paid."""
    site = SumSite(tmp_path, monkeypatch)
    site.pins = {"clinic-a": "0" * 64, "clinic-b": site.pins["clinic-b"]}
    reply = site.ask("hello", headers={ATTEMPT: 0})
    assert reply.get_return_code() == "REFUSED_SUM_TOO_FEW_KNOWN"


def test_without_a_hello_there_is_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = SumSite(tmp_path, monkeypatch)
    assert site.ask(headers={ATTEMPT: 0, HELLOS: []}).get_return_code() == "REFUSED_SUM_LIST_INVALID"
    assert Site(tmp_path / "clinic-a" / "local").ask("hello").get_return_code() == "REFUSED_TASK_UNEXPECTED"
    assert site.ask("hello", index=3, headers={ATTEMPT: 0}).get_return_code() == "REFUSED_ROUND_INVALID"
    assert site.ask("hello").get_return_code() == "REFUSED_ROUND_INVALID"


def test_the_first_hello_comes_at_the_public_time_and_the_next_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first the data are read; with the next nothing of them is looked at."""
    monkeypatch.setattr(module, "job_of", job_of_engine)
    site = SumSite(tmp_path, monkeypatch)
    site.engine.job.answer_seconds, site.engine.job.run = 1, None
    taken = []
    for attempt in range(2):
        fl_ctx = site.context()
        capabilities.keep_task(Shareable(), fl_ctx)
        started = time.monotonic()
        assert site.ask("hello", fl_ctx=fl_ctx, headers={ATTEMPT: attempt}).get_return_code() == ReturnCode.OK
        taken.append(time.monotonic() - started)
    assert taken[0] >= 1 > taken[1]
    (trainer,) = StandInTrainer.made
    assert trainer.prepared == 1, "to look at the notes again takes longer the more patients there are"


def test_a_hello_is_said_only_by_a_trainer_that_has_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that could not read them must not let the others pay for a sum without it."""
    site = SumSite(tmp_path, monkeypatch)
    monkeypatch.setattr(StandInTrainer, "unreadable", JobError("a bag is gone", reason="BAG_MISSING"))
    for _ in range(2):
        reply = site.ask("hello", headers={ATTEMPT: 0})
        assert reply.get_return_code() == "REFUSED_BAG_MISSING"
    monkeypatch.setattr(StandInTrainer, "unreadable", None)
    assert site.ask("hello", headers={ATTEMPT: 0}).get_return_code() == ReturnCode.OK
    (trainer,) = StandInTrainer.made
    trainer.pid = 2  # another process, as the first one died
    site.ask("hello", headers={ATTEMPT: 0})
    assert trainer.prepared == 4


class BudgetSite(SumSite):
    """A site under a budget, admitted once; its job's evaluation is answered with counts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
        super().__init__(folder, monkeypatch)
        rows = [f"{n}.tif,p{n},{'ab'[n % 2]},{'test' if n > 5 else 'train'}" for n in range(12)]
        (self.kit / "m.csv").write_text("\n".join(["slide,patient,label,split", *rows]) + "\n")
        self.engine.job.tally = tally
        policy = replace(read_policy(POLICIES / "dp-patient.toml"), pins=self.pins)
        bookkeeping = Bookkeeping(
            read_site_file(self.kit / SITE_FILE),
            policy,
            DpSgd(noise_multiplier=20.0),
            rounds=3,
            weights=4,
            run=self.run,
            labels=["a", "b"],
            data="bags",
        )
        self.admission = capabilities.Admitted(self.engine.job, policy, 3, bookkeeping)

    def context(self) -> FLContext:
        fl_ctx = self.engine.context("clinic-a")
        capabilities.issue(self.admission, fl_ctx)
        return fl_ctx


def test_nobody_is_counted_who_is_not_booked_though_the_sites_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runs for days; its counts are booked on the patients for testing as it was admitted."""
    site = BudgetSite(tmp_path, monkeypatch, Tally(noise_multiplier=2.0))
    file = site.kit / SITE_FILE
    file.write_text(file.read_text() + "evaluation_only = true\n")
    reply = site.ask("evaluate")
    assert from_shareable(reply).data_kind == DataKind.WEIGHT_DIFF
    assert [asked for asked, _ in StandInTrainer.made[0].asked] == ["test"]


def test_a_hello_for_an_evaluation_comes_at_the_public_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest and the ledger are looked at with each: that takes longer the more patients there are."""
    monkeypatch.setattr(module, "job_of", job_of_engine)
    site = BudgetSite(tmp_path, monkeypatch, Tally(noise_multiplier=4.0, noise="shared", honest=2))
    site.engine.job.answer_seconds, site.engine.job.run = 1, None
    for attempt in range(2):
        fl_ctx = site.context()
        capabilities.keep_task(Shareable(), fl_ctx)
        started = time.monotonic()
        reply = site.ask("hello", index=3, fl_ctx=fl_ctx, headers={ATTEMPT: attempt})
        assert reply.get_return_code() == ReturnCode.OK
        assert time.monotonic() - started >= 1


@pytest.mark.parametrize(("text", "split"), [("", "test"), ("evaluation_only = true\n", "all")])
def test_an_evaluation_asks_test_patients_or_all_of_a_site_that_never_trains(
    tmp_path: Path, text: str, split: str
) -> None:
    dxo = from_shareable(Site(tmp_path, text).ask("evaluate"))
    assert (dxo.data_kind, dxo.data) == (DataKind.METRICS, {"auc": 0.75})
    assert StandInTrainer.made[0].asked == [(split, False)]
    assert capabilities.take_release(dxo.data) is not None


def test_an_evaluation_is_answered_once(tmp_path: Path) -> None:
    """A server that could ask again and again could find out single patients' labels."""
    site = Site(tmp_path)
    assert site.ask("evaluate").get_return_code() == ReturnCode.OK
    assert site.ask("evaluate").get_return_code() == "REFUSED_EVALUATED_ALREADY"


def test_a_question_that_fails_is_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures or a refusal is one bit of a patient for each model that a server could make."""

    def fail(*_: Any, **__: Any) -> None:
        raise HistoflareError("no memory", reason="TRAINING_FAILED")

    site = Site(tmp_path)
    with monkeypatch.context() as failing:
        failing.setattr(StandInTrainer, "evaluate", fail)
        assert site.ask("evaluate").get_return_code() != ReturnCode.OK
    assert site.ask("evaluate").get_return_code() == "REFUSED_EVALUATED_ALREADY"


def test_after_the_question_about_the_model_nothing_is_trained(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.ask("evaluate").get_return_code() == ReturnCode.OK
    assert site.ask().get_return_code() == "REFUSED_TASK_UNEXPECTED"


def test_a_training_that_keeps_a_best_model_is_told_of_both(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.engine.job.most_evaluations = 2
    codes = [site.ask("evaluate").get_return_code() for _ in range(3)]
    assert codes == [ReturnCode.OK, ReturnCode.OK, "REFUSED_EVALUATED_ALREADY"]


@pytest.mark.parametrize("index", [-1, 3, 1.0, None])
def test_only_rounds_of_the_protocol_are_trained(tmp_path: Path, index: Any) -> None:
    assert Site(tmp_path).ask(index=index).get_return_code() == "REFUSED_ROUND_INVALID"
    assert not StandInTrainer.made


def test_metrics_of_too_few_patients_do_not_cost_the_update(tmp_path: Path) -> None:
    StandInTrainer.metric_patients = 1
    dxo = from_shareable(Site(tmp_path, best="auc").ask())
    assert dxo.data_kind == DataKind.WEIGHT_DIFF and METRICS not in dxo.meta


def test_without_a_token_nothing_is_even_read(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.admitted = False
    (tmp_path / SITE_FILE).unlink()
    assert site.ask().get_return_code() == "REFUSED_NOT_ADMITTED"
    assert not StandInTrainer.made


def test_a_token_serves_one_task(tmp_path: Path) -> None:
    site = Site(tmp_path)
    fl_ctx = site.context()
    site.executor.execute("other", Shareable(), fl_ctx, Signal())
    assert site.executor.execute("train", Shareable(), fl_ctx, Signal()).get_return_code() == (
        "REFUSED_NOT_ADMITTED"
    )


@pytest.mark.parametrize(
    ("text", "name", "error", "code"),
    [
        ("evaluation_only = true\n", "train", None, "EVALUATION_ONLY"),
        ("", "submit_model", None, "TASK_UNEXPECTED"),
        ("unknown = 1\n", "train", None, "SITE_NOT_CONFIGURED"),
        ("", "train", JobError("patient Doe", reason="COHORT_INVALID"), "COHORT_INVALID"),
        ("", "train", RuntimeError("patient Doe"), "TRAINING_FAILED"),
    ],
)
def test_a_refusal_is_a_code_and_its_text_stays_here(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
    name: str,
    error: Exception | None,
    code: str,
) -> None:
    StandInTrainer.error = error
    caplog.set_level(logging.INFO)
    site = Site(tmp_path, text)
    reply = site.ask(name)
    assert reply.get_return_code() == f"REFUSED_{code}"
    assert "Doe" not in repr(dict(reply)) and str(tmp_path) not in repr(dict(reply))
    assert error is None or "Doe" in caplog.text, "the person at the site reads why"
    # Error logs would be streamed to the server, and fired log events can be carried there.
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not site.engine.events
    assert reply.get_return_code() != ReturnCode.OK
