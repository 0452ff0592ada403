"""A round waits for all sites that it asked and that are there, for a time, and writes down what happened."""

from __future__ import annotations

import json
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.bcast_manager import BcastTaskManager
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from histoflare.flare import workflow as module
from histoflare.flare.aggregator import MetricsCollector
from histoflare.flare.header_names import ASKED, PSEUDONYM, RELEASE
from histoflare.flare.job_variant import write_variant
from histoflare.flare.record import BEST_EVALUATION_FILE, EARLIER_ROUNDS_FILE, ROUNDS_FILE, SITES_FILE
from histoflare.flare.result import read_result
from histoflare.flare.workflow import AskingScatterAndGather
from histoflare.rounds.strategy import OWN
from histoflare.site.messages import digest_of
from tests.refusals import raises_reason

from .stand_in import StandInEngine, come_from

SITES = ("a", "b", "c")


class Communicator:
    """Gives every site asked its task, and takes the replies it was made with."""

    def __init__(self, workflow: AskingScatterAndGather, replies: dict[str, Shareable]) -> None:
        self.workflow = workflow
        self.replies = replies
        self.gone: set[str] = set()
        self.task: Task | None = None
        self.arguments: tuple[Any, ...] = ()

    def get_client_disconnect_time(self, site: str) -> float | None:
        return 1.0 if site in self.gone else None

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, targets: list[str], *arguments: Any) -> None:
        self.arguments = (targets, *arguments)
        assert task.data.get_header(ASKED) is None, "no site is told who the others are"
        self.task = task
        task.targets = targets
        self.manager = BcastTaskManager(task, arguments[0], arguments[1])
        for site in targets:
            client_task = SimpleNamespace(
                client=SimpleNamespace(name=site), task=task, result=self.replies.get(site)
            )
            self.workflow._prepare_train_task_data(client_task, fl_ctx)
            if site in self.replies:
                self.workflow._process_train_result(client_task, fl_ctx)


def workflow(folder: Path, job: str, changes: dict[str, Any]) -> AskingScatterAndGather:
    """Return the workflow of a shipped job with other figures, as FLARE makes it."""
    name = {"fedavg": "mem_fedavg", "cyclic": "mem_cwt", "evaluate": "mem_evaluate"}[job]
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    made = write_variant(jobs / name, folder / f"job-{uuid.uuid4().hex}", changes)
    return AskingScatterAndGather(str(made / "app" / "custom"))


class Server:
    """A workflow in a round, with an aggregator that takes what it is told to."""

    def __init__(
        self,
        folder: Path,
        replies: dict[str, Shareable],
        accepts: bool = True,
        strategy: str = "cyclic",
        **options: Any,
    ) -> None:
        self.workflow = workflow(folder, strategy, {"rounds": 5, **options})
        self.engine = StandInEngine(folder, SITES)
        self.workflow._engine = self.engine
        self.workflow._current_round = 3
        self.workflow.communicator = Communicator(self.workflow, replies)
        self.workflow.aggregator = SimpleNamespace(
            accept=lambda *_: accepts,
            taking_part=sorted(replies) if accepts else [],
            metrics={},
            stamps={},
            notes={},
        )
        self.folder = folder

    def run(self, asked: list[str], abort_signal: Signal | None = None) -> dict[str, Any]:
        data = DXO(DataKind.WEIGHTS, data={"w": np.zeros(10, np.float32)}).to_shareable()
        data.set_header(ASKED, asked)
        fl_ctx = self.engine.context("server")
        self.workflow.broadcast_and_wait(
            Task("train", data, timeout=self.workflow._train_timeout),
            fl_ctx,
            min_responses=self.workflow._min_clients,
            wait_time_after_min_received=self.workflow._wait_time_after_min_received,
            abort_signal=abort_signal,
        )
        if abort_signal is None:
            self.workflow.handle_event(AppEventType.ROUND_DONE, fl_ctx)
        self.workflow.stop_controller(fl_ctx)
        return json.loads((self.folder / ROUNDS_FILE).read_text())[-1]


def update() -> Shareable:
    return DXO(DataKind.WEIGHT_DIFF, data={"w": np.zeros(10, np.float32)}).to_shareable()


@pytest.mark.parametrize("asked", [["b"], ["a", "c"], ["a", "b", "c"]])
def test_only_the_sites_asked_get_the_task_and_all_of_them_are_waited_for(
    tmp_path: Path, asked: list[str]
) -> None:
    server = Server(tmp_path, {site: update() for site in asked})
    row = server.run(asked)
    assert server.workflow.communicator.arguments == (asked, len(asked), 0, None)
    assert (row["asked"], row["taking_part"], row["sites"]) == (asked, asked, list(SITES))


class Asking:
    """A workflow whose rounds are over, with the collector that takes what sites say of its model."""

    def __init__(self, folder: Path, replies: dict[str, Shareable], best: bool = False, **job: Any) -> None:
        self.workflow = workflow(folder, "fedavg", {"rounds": 5, "evaluation_only": ["c"], **job})
        self.engine = StandInEngine(folder, SITES)
        self.collector = MetricsCollector()
        self.engine.get_component = lambda _: self.collector  # type: ignore[attr-defined]
        self.workflow._engine = self.engine
        self.asked: list[tuple[int, Any, list[str]]] = []
        self.workflow.communicator = self
        own = {f"{OWN}momentum": np.full(10, 7, np.float32)}  # what a strategy keeps at the server
        model = make_model_learnable({"w": np.ones(10, np.float32), **own}, {})
        self.workflow._global_weights = model
        best_model = make_model_learnable({"w": np.full(10, 2, np.float32), **own}, {})
        self.workflow.persistor = SimpleNamespace(load_best=lambda _: best_model if best else None)
        self.replies, self.gone = replies, set[str]()
        self.ends = False

    def get_client_disconnect_time(self, site: str) -> float | None:
        return 1.0 if site in self.gone else None

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, targets: list[str], *arguments: Any) -> None:
        assert (task.name, task.data.get_header(ASKED)) == ("evaluate", None)
        index = task.data.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        data = from_shareable(task.data).data
        assert set(data) == {"w"}, "what the server keeps is not sent"
        self.asked.append((index, data["w"].sum(), targets))
        if self.ends:
            arguments[-1].trigger("too few sites")
        for site in set(targets) & set(self.replies):
            result = self.replies[site]
            result.add_cookie(AppConstants.CONTRIBUTION_ROUND, index)
            client_task = SimpleNamespace(client=SimpleNamespace(name=site), task=task, result=result)
            self.workflow._prepare_train_task_data(client_task, fl_ctx)
            task.result_received_cb(client_task, come_from(site, fl_ctx))

    def run(self, monkeypatch: pytest.MonkeyPatch, aborted: bool = False) -> None:
        monkeypatch.setattr(ScatterAndGather, "control_flow", lambda *_: None)
        signal = Signal()
        if aborted:
            signal.trigger(True)
        self.workflow.control_flow(signal, self.engine.context("server"))


def figures(**said: float) -> Shareable:
    spend = {"digest": digest_of(said), "scope": "open", "mechanism": "open", "spend": None}
    return DXO(DataKind.METRICS, data=said, meta={RELEASE: {**spend, "seeded_noise": False}}).to_shareable()


def test_after_the_rounds_every_site_is_asked_about_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that only evaluate, and about the best model too; a refusal is written down, and no more."""
    replies = {"a": figures(auc=0.5), "b": make_reply("REFUSED_TOO_FEW_PATIENTS"), "c": figures(auc=0.75)}
    asking = Asking(tmp_path, replies, best=True, best_metric="auc")
    assert asking.workflow._job.most_evaluations == 2
    asking.run(monkeypatch)
    assert asking.asked == [(5, 10.0, list(SITES)), (6, 20.0, list(SITES))]
    result = read_result(tmp_path)
    assert result.evaluation == {"a": {"auc": 0.5}, "c": {"auc": 0.75}}
    assert json.loads((tmp_path / BEST_EVALUATION_FILE).read_text()) == result.evaluation
    assert result.evaluation_refused == {"b": "TOO_FEW_PATIENTS"}
    assert result.best_evaluation_refused == {"b": "TOO_FEW_PATIENTS"}
    assert result.rounds == [] and result.finished_rounds == 0, "it is no round"
    outcomes = result.outcomes()
    assert [outcomes[site].evaluated for site in SITES] == ["", "TOO_FEW_PATIENTS", ""]


def test_nobody_is_asked_about_the_best_model_where_sites_keep_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have those of the last round only: together they would be a model that never was."""
    asking = Asking(tmp_path, {}, best=True, best_metric="auc", **{"strategy.share": ["attention"]})
    assert asking.workflow._job.strategy.keeps and asking.workflow._job.most_evaluations == 1
    asking.run(monkeypatch)
    assert asking.asked == [(5, 10.0, list(SITES))]


@pytest.mark.parametrize(
    ("job", "aborted"), [({"evaluate": False, "evaluation_only": None}, False), ({}, True)]
)
def test_a_job_that_does_not_say_so_or_was_aborted_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], aborted: bool
) -> None:
    asking = Asking(tmp_path, {}, **job)
    asking.run(monkeypatch, aborted)
    assert asking.asked == [] and read_result(tmp_path).evaluation_round is None


def test_a_job_that_ends_during_the_question_says_that_its_rounds_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Asking(tmp_path, {}, best=True, best_metric="auc")
    asking.ends = True
    asking.run(monkeypatch)
    asked = read_result(tmp_path).evaluation_round
    assert len(asking.asked) == 1 and asked is not None and asked["given_up"]


def test_what_is_no_answer_and_who_is_gone_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstamped = DXO(DataKind.METRICS, data={"auc": 1.0}).to_shareable()
    asking = Asking(tmp_path, {"a": unstamped, "b": update()})
    asking.gone = {"c"}
    asking.run(monkeypatch)
    assert [targets for _, _, targets in asking.asked] == [["a", "b"]]
    result = read_result(tmp_path)
    assert result.evaluation == {} and result.evaluation_refused == dict.fromkeys("ab", "UPDATES_INVALID")
    assert result.evaluation_round is not None and result.evaluation_round["absent"] == ["c"]


def test_a_site_that_only_evaluates_is_asked_in_no_round(tmp_path: Path) -> None:
    server = Server(tmp_path, {"a": update()}, strategy="fedavg", evaluation_only=["c"], least_sites=1)
    assert server.run(["a", "b"])["sites"] == ["a", "b"]


def test_the_record_says_who_refused_why_and_who_was_silent(tmp_path: Path) -> None:
    refusal = make_reply("REFUSED_TOO_FEW_PATIENTS", headers={PSEUDONYM: "river"})
    server = Server(tmp_path, {"a": update(), "b": refusal})
    server.workflow.aggregator.taking_part = ["a"]
    row = server.run(list(SITES))
    assert (row["round"], row["taking_part"], row["no_answer"]) == (3, ["a"], ["c"])
    assert row["absent"] == [], "the task reached c"
    assert row["refused"] == {"b": "TOO_FEW_PATIENTS"}
    assert (row["bytes_up"], row["bytes_down"]) == (40, 120)
    assert set(row["seconds"]) == set(SITES)
    assert json.loads((tmp_path / SITES_FILE).read_text()) == {"b": "river"}


def test_text_that_is_no_reason_code_is_not_written_down(tmp_path: Path) -> None:
    row = Server(tmp_path, {"b": make_reply("REFUSED_patient Doe")}).run(["b"])
    assert row["refused"] == {"b": "REPLY_NOT_ALLOWED"}


@pytest.mark.parametrize(("answered", "closes"), [(1, False), (2, False), (3, True)])
def test_fast_sites_do_not_close_a_round_without_the_slow_one(
    tmp_path: Path, answered: int, closes: bool
) -> None:
    """Two updates suffice in the end; while there is time all three are waited for."""
    server = Server(tmp_path, {"a": update(), "b": make_reply("REFUSED_JOB_INVALID")}, strategy="fedavg")
    server.workflow.aggregator.taking_part = ["a", "c"]
    server.run(list(SITES))
    task = server.workflow.communicator.task
    times = [1.0] * answered + [None] * (3 - answered)
    task.client_tasks = [SimpleNamespace(result_received_time=time) for time in times]
    done, _ = server.workflow.communicator.manager.check_task_exit(task)
    assert done == closes


@pytest.mark.parametrize("strategy", ["fedavg", "cyclic", "evaluate"])
def test_no_round_waits_without_limit(tmp_path: Path, strategy: str) -> None:
    assert workflow(tmp_path, strategy, {})._train_timeout == 3600
    server = Server(tmp_path, {site: update() for site in SITES}, strategy=strategy, round_seconds=7)
    server.run(list(SITES))
    assert server.workflow.communicator.task.timeout == 7


def test_a_site_that_flare_deems_gone_is_not_waited_for_until_it_is_back(tmp_path: Path) -> None:
    server = Server(tmp_path, {site: update() for site in ("a", "b")}, strategy="fedavg")
    server.workflow.communicator.gone = {"c"}
    row = server.run(list(SITES))
    assert server.workflow.communicator.arguments[:2] == (["a", "b"], 2)
    assert (row["asked"], row["no_answer"], row["taking_part"]) == (list(SITES), ["c"], ["a", "b"])
    assert row["absent"] == ["c"]
    server.workflow.communicator.gone = set()
    server.run(list(SITES))
    assert server.workflow.communicator.arguments[:2] == (list(SITES), 3)


def test_a_site_that_is_gone_loses_its_turn_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path, {}, strategy="cyclic")
    server.workflow.communicator.gone = {"b"}
    row = server.run(["b"])
    assert server.workflow.communicator.task is None, "nobody is there to be waited for"
    assert (row["asked"], row["no_answer"], row["taking_part"]) == (["b"], ["b"], [])


@pytest.mark.parametrize(("strategy", "ends"), [("fedavg", True), ("cyclic", False)])
@pytest.mark.parametrize(
    ("gone", "why"),
    [(set(), "1 of at least 2 updates came"), ({"b", "c"}, "1 of at least 2 updates came")],
    ids=["late", "gone"],
)
def test_a_round_with_too_few_updates_ends_the_job_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, ends: bool, gone: set[str], why: str
) -> None:
    """Two are needed, one came, and the time is over or the others are gone."""
    server = Server(tmp_path, {"a": update()}, strategy=strategy)
    server.workflow.communicator.gone = gone
    said: list[str] = []

    def panic(reason: str, fl_ctx: FLContext) -> None:
        said.append(reason)
        server.workflow._current = None  # FLARE ends the job; no round is done

    monkeypatch.setattr(server.workflow, "system_panic", panic)
    row = server.run(list(SITES))
    assert said == ([f"round 4: {why}"] if ends else [])
    assert row.get("given_up") == (why if ends else None)
    assert row.get("finished", True) != ends


def test_a_job_that_flare_ends_for_want_of_sites_says_so(tmp_path: Path) -> None:
    server = Server(tmp_path, {"a": update()}, strategy="fedavg")
    server.workflow.communicator.gone = {"b", "c"}
    aborted = Signal()
    aborted.trigger("policy")
    row = server.run(list(SITES), aborted)
    assert (row["given_up"], row["finished"]) == ("1 of at least 2 sites are left", False)


def test_a_job_that_flare_ends_for_its_refusals_says_so(tmp_path: Path) -> None:
    replies = {"a": update()} | {site: make_reply("REFUSED_BUDGET_EXHAUSTED") for site in ("b", "c")}
    server = Server(tmp_path, replies, strategy="fedavg")
    server.workflow.aggregator.taking_part = ["a"]
    aborted = Signal()
    aborted.trigger("panic")
    row = server.run(list(SITES), aborted)
    assert row["given_up"] == "2 of 3 sites refused, and at least 2 must take part"


def test_a_job_ends_soon_after_too_many_have_refused_and_not_before_the_others_were_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lead reads at once what each site has against the job."""
    said: list[str] = []
    for heard in ("BUDGET_EXHAUSTED", None):
        server = Server(
            tmp_path, dict.fromkeys(("a", "b"), make_reply("REFUSED_KIT_CHANGED")), strategy="fedavg"
        )
        if heard:
            server.workflow.communicator.replies["c"] = make_reply(f"REFUSED_{heard}")
        server.workflow.aggregator.taking_part = []
        monkeypatch.setattr(server.workflow, "system_panic", lambda reason, _: said.append(reason))
        server.engine.new_context = lambda server=server: nullcontext(server.engine.context("server"))  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "HEARING_SECONDS", 60.0 if heard else 0.05)
        if heard is None:  # the last site does not answer: the round would last until its time is over
            wait = server.workflow.communicator.broadcast_and_wait
            monkeypatch.setattr(
                server.workflow.communicator,
                "broadcast_and_wait",
                lambda *arguments, wait=wait: (wait(*arguments), time.sleep(0.3)),
            )
        row = server.run(list(SITES))
        answered = {"a": "KIT_CHANGED", "b": "KIT_CHANGED"} | ({"c": heard} if heard else {})
        assert row["refused"] == answered
        assert row["given_up"].startswith(f"{len(answered)} of 3 sites refused")
    assert said[0].startswith("round 4: 3 of 3 sites refused"), "all have answered: it ends with the round"
    assert said[1] == "2 sites refused", "else after some seconds"


def test_a_job_that_somebody_aborts_was_not_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path, {"a": update()}, strategy="fedavg")
    aborted = Signal()
    aborted.trigger("the lead")
    row = server.run(list(SITES), aborted)
    assert "given_up" not in row and row["finished"] is False


def test_a_job_that_goes_on_keeps_the_earlier_rounds(tmp_path: Path) -> None:
    (tmp_path / EARLIER_ROUNDS_FILE).write_text('[{"round": 0}, {"round": 1}, {"round": 2}]')
    Server(tmp_path, {"a": update()}).run(["a"])
    rows = json.loads((tmp_path / ROUNDS_FILE).read_text())
    assert [row["round"] for row in rows] == [0, 1, 2, 3]


def test_the_best_model_is_the_one_that_all_who_took_part_found_best(tmp_path: Path) -> None:
    kept: list[tuple[float, str]] = []
    replies = {site: update() for site in ("a", "b")}
    for metrics in (
        {"a": {"validation/auc": 0.5}, "b": {"validation/auc": 0.7}},
        {"a": {"validation/auc": 0.9}, "b": {"validation/auc": None}},  # b does not say
        {"a": {"validation/auc": 0.4}, "b": {"validation/auc": 0.7}},  # worse
        {"a": {"validation/auc": 0.8}, "b": {"validation/auc": 0.7}},
    ):
        if not kept:
            server = Server(tmp_path, replies, best_metric="auc")
            server.workflow.persistor = SimpleNamespace(
                save_best=lambda model, value, metric, fl_ctx: kept.append((round(value, 6), metric))
            )
        server.workflow.aggregator.metrics = metrics
        server.run(["a", "b"])
    assert kept == [(0.6, "validation/auc"), (0.75, "validation/auc")]


def test_a_run_ends_when_its_patience_is_over(tmp_path: Path) -> None:
    replies = {site: update() for site in ("a", "b")}
    stop = {"protocol.stop.patience": 2, "protocol.metric": "auc"}
    server = Server(tmp_path, replies, strategy="fedavg", rounds=9, **stop)
    rows = []
    for index, value in enumerate((0.6, 0.6, None, 0.5)):
        server.workflow._current_round = index
        server.workflow.aggregator.metrics = {s: {"validation/auc": value} for s in replies}
        rows.append(server.run(["a", "b"]))
    assert [row.get("validation") for row in rows] == [0.6, 0.6, None, 0.5]
    said = {"metric": "validation/auc", "patience": 2, "best": 0.6, "best_round": 0}
    assert [row.get("stopped") for row in rows] == [None, None, None, said]
    assert server.workflow._num_rounds == 4, "FLARE's loop ends after the round with the index 3"
    assert read_result(tmp_path).stopped


@pytest.mark.parametrize("start", [-1, 5, 6])
def test_a_start_outside_the_job_is_refused(tmp_path: Path, start: int) -> None:
    with raises_reason("JOB_INVALID", "start_round: "):
        workflow(tmp_path, "fedavg", {"rounds": 5, "start_round": start})


def test_a_job_that_goes_on_runs_the_rest(tmp_path: Path) -> None:
    made = workflow(tmp_path, "fedavg", {"rounds": 5, "start_round": 2})
    assert (made._start_round, made._num_rounds, made.aggregator_id) == (2, 3, "aggregator")


def test_an_evaluation_asks_once_and_collects(tmp_path: Path) -> None:
    made = workflow(tmp_path, "evaluate", {})
    assert (made._num_rounds, made.train_task_name, made.aggregator_id) == (1, "evaluate", "collector")
