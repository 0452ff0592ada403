"""The server's side of a secure sum: hello, training, and both again if the sum is void."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from histoflare.flare import aggregator as aggregator_module
from histoflare.flare.aggregator import SiteOrderAggregator
from histoflare.flare.header_names import ASKED, ATTEMPT, HELLOS, RELEASE, TOTAL_ROUNDS, WEIGHT
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.record import EARLIER_ROUNDS_FILE, ROUNDS_FILE
from histoflare.flare.site_keys import SimulatedKeys
from histoflare.flare.site_sum import SiteSum
from histoflare.flare.tensors import as_arrays
from histoflare.flare.workflow import AskingScatterAndGather
from histoflare.rounds.round import server_round
from histoflare.rounds.state import model_state
from histoflare.rounds.strategy import Update
from histoflare.site.messages import TrainAnswer, digest_of

from .stand_in import StandInEngine, come_from

SITES = ("a", "b", "c", "d")
ROUND = 1
Reply = Callable[["Server", str, Shareable], Shareable | None]


class Server:
    """A workflow and its aggregator in one round, with sites that say hello and send padded vectors."""

    def __init__(self, folder: Path, repository: Path, **changes: Any) -> None:
        self.folder = folder
        said = {"transport.name": "masked_sum", "rounds": 3, "least_sites": 3, **changes}
        self.job_folder = write_variant(repository / "jobs" / "mem_fedavg", folder / "job", said)
        self.job = read_job(self.job_folder)
        self.engine = StandInEngine(folder, SITES)
        self.aggregator = SiteOrderAggregator()
        self.workflow = AskingScatterAndGather(str(self.job_folder / "app" / "custom"))
        self.workflow._engine = self.engine
        self.workflow._current_round = ROUND
        self.workflow.communicator = self
        self.workflow.aggregator = self.aggregator
        self.model = model_state(self.job.task.build_model())
        self.sums = {site: SiteSum(site, SimulatedKeys(), self.job, "run") for site in SITES}
        self.asked: list[tuple[str, int, list[str]]] = []
        self.gone: set[str] = set()
        self.ended: list[str] = []
        self.workflow.system_panic = lambda reason, _: self.ended.append(reason)
        self.faults: dict[tuple[str, int, str], Reply] = {}
        """Task, attempt and site → what is answered instead."""

    def get_client_disconnect_time(self, site: str) -> float | None:
        return 1.0 if site in self.gone else None

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, targets: list[str], *_: Any) -> None:
        attempt = task.data.get_header(ATTEMPT)
        self.asked.append((task.name, attempt, list(targets)))
        assert task.data.get_header(AppConstants.CURRENT_ROUND) == ROUND
        assert task.data.get_header(TOTAL_ROUNDS) == 3
        for site in targets:
            answer = {"hello": hello, "train": update}[task.name]
            result = self.faults.get((task.name, attempt, site), answer)(self, site, task.data)
            client_task = SimpleNamespace(client=SimpleNamespace(name=site), task=task, result=result)
            task.before_task_sent_cb(client_task, fl_ctx)
            if result is not None:
                for cookie, value in task.data.get_cookie_jar().items() if task.name == "train" else ():
                    result.add_cookie(cookie, value)
                task.result_received_cb(client_task, come_from(site, fl_ctx))

    def run(self, signal: Signal | None = None) -> dict[str, Any]:
        """Run the round and return its row."""
        self.fl_ctx = fl_ctx = self.engine.context("server")
        weights = as_arrays(self.model)
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, {ModelLearnableKey.WEIGHTS: weights}, private=True)
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, ROUND, private=True)
        data = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
        data.set_header(ASKED, list(SITES))
        data.set_header(TOTAL_ROUNDS, 3)
        data.set_header(AppConstants.CURRENT_ROUND, ROUND)
        data.add_cookie(AppConstants.CONTRIBUTION_ROUND, ROUND)
        task = Task(
            "train",
            data,
            timeout=self.job.round_seconds,
            before_task_sent_cb=self.workflow._prepare_train_task_data,
            result_received_cb=self.workflow._process_train_result,
        )
        self.workflow.broadcast_and_wait(task, fl_ctx, abort_signal=signal or Signal())
        if not self.ended and signal is None:
            self.made = self.aggregator.aggregate(fl_ctx)
            self.workflow.handle_event("_round_done", fl_ctx)
        return json.loads((self.folder / ROUNDS_FILE).read_text())[-1]


def hello(server: Server, site: str, task: Shareable) -> Shareable:
    said = server.sums[site].hello(ROUND, task.get_header(ATTEMPT))
    return DXO(DataKind.APP_DEFINED, data=said).to_shareable()


def update(server: Server, site: str, task: Shareable) -> Shareable:
    """Return an update with the same number everywhere, weighted by another, and padded."""
    vector = server.job.transport.pack(plain(server, site), float(SITES.index(site)), None)
    policy = SimpleNamespace(pins={}, trust_ca=False, protection=None)
    joined = server.sums[site].join(
        task.get_header(HELLOS), ROUND, task.get_header(ATTEMPT), "model", policy, server.job.plan
    )
    tensors = joined.sealed(TrainAnswer(as_arrays(vector), 1.0, {}, patients=5)).tensors
    stamp = {"digest": digest_of(tensors), "scope": "open", "mechanism": "open", "spend": None}
    meta = {WEIGHT: 1.0, RELEASE: {**stamp, "seeded_noise": False}}
    return DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta).to_shareable()


def plain(server: Server, site: str) -> Any:
    like = server.job.strategy.sent(server.model)
    return {name: tensor * 0 + 1.0 + SITES.index(site) for name, tensor in like.items()}


def silent(*_: Any) -> None:
    return None


def refusing(code: str) -> Reply:
    return lambda *_: make_reply(f"REFUSED_{code}")


@pytest.fixture
def server(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    def make(**changes: Any) -> Server:
        made = Server(tmp_path, repository, **changes)
        monkeypatch.setattr(aggregator_module, "job_of", lambda _: made.job)
        return made

    return make


BOTH = [("hello", 0, list(SITES)), ("train", 0, list(SITES))]


def test_a_round_is_a_hello_and_then_one_training(server: Callable[..., Server]) -> None:
    made = server()
    row = made.run()
    assert made.asked == BOTH
    assert row["taking_part"] == list(SITES) and "voids" not in row
    weighted = [Update(site, plain(made, site), float(SITES.index(site))) for site in SITES]
    expected = server_round(made.job.strategy, made.model, weighted, SITES).model
    combined = made.made["DXO"]["data"]
    for name, tensor in expected.items():
        assert combined[name] == pytest.approx(tensor.numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "noted"),
    [
        (silent, {"no_answer": ["b"], "refused": {}}),
        (refusing("TRAINER_DIED"), {"no_answer": [], "refused": {"b": "TRAINER_DIED"}}),
    ],
)
def test_a_site_without_an_update_voids_the_sum_and_all_are_asked_anew(
    server: Callable[..., Server], fault: Reply, noted: dict[str, Any]
) -> None:
    made = server(spare_rounds=1)
    made.faults["train", 0, "b"] = fault
    row = made.run()
    assert made.asked == [*BOTH, ("hello", 1, list(SITES)), ("train", 1, list(SITES))]
    assert row["voids"] == [{"sites": list(SITES), **noted}]
    assert row["taking_part"] == list(SITES) and row["refused"] == {} and row["no_answer"] == []
    assert made.ended == []


def test_a_vector_of_another_list_voids_the_sum(server: Callable[..., Server]) -> None:
    def other_list(server: Server, site: str, task: Shareable) -> Shareable:
        hellos = task.get_header(HELLOS)
        task.set_header(HELLOS, hellos[::-1])
        sent = update(server, site, task)
        task.set_header(HELLOS, hellos)
        return sent

    made = server(spare_rounds=1)
    made.faults["train", 0, "b"] = other_list
    row = made.run()
    assert row["voids"] == [{"sites": list(SITES), "no_answer": [], "refused": {}}]
    assert row["taking_part"] == list(SITES)


def test_an_update_of_an_earlier_attempt_is_too_late(server: Callable[..., Server]) -> None:
    kept: list[Shareable] = []

    def late(server: Server, site: str, task: Shareable) -> None:
        kept.append(update(server, site, task))
        kept[0].add_cookie(AppConstants.CONTRIBUTION_ROUND, ROUND)
        kept[0].add_cookie(ATTEMPT, 0)

    def comes_now(server: Server, site: str, task: Shareable) -> None:
        fl_ctx = come_from("b", server.fl_ctx)
        assert not server.aggregator.accept(kept[0], fl_ctx)
        kept[0].add_cookie(ATTEMPT, 1)
        assert server.aggregator.accept(kept[0], fl_ctx), "it is taken for what it says"

    made = server(spare_rounds=1)
    made.faults = {("train", 0, "b"): late, ("train", 1, "b"): comes_now}
    row = made.run()
    assert len(row["voids"]) == 2 and made.ended


@pytest.mark.parametrize(("spare", "earlier", "attempts"), [(0, 0, 1), (2, 0, 3), (2, 1, 2)])
def test_spare_rounds_are_of_the_whole_run(
    server: Callable[..., Server], spare: int, earlier: int, attempts: int
) -> None:
    made = server(spare_rounds=spare)
    (made.folder / EARLIER_ROUNDS_FILE).write_text(json.dumps([{"round": 0, "voids": [{}] * earlier}]))
    made.faults = {("train", attempt, "b"): silent for attempt in range(9)}
    row = made.run()
    assert [asked[1] for asked in made.asked if asked[0] == "train"] == list(range(attempts))
    assert len(row["voids"]) == attempts
    assert row["finished"] is False and "no update of b" in row["given_up"]
    assert f"{spare} spare" in row["given_up"] and len(made.ended) == 1


def test_who_does_not_say_hello_is_not_on_the_list(server: Callable[..., Server]) -> None:
    made = server()
    made.faults["hello", 0, "b"] = refusing("BUDGET_EXHAUSTED")
    row = made.run()
    assert made.asked == [("hello", 0, list(SITES)), ("train", 0, ["a", "c", "d"])]
    assert row["refused"] == {"b": "BUDGET_EXHAUSTED"} and row["taking_part"] == ["a", "c", "d"]


@pytest.mark.parametrize("odd", [refusing("KIT_CHANGED"), silent, lambda *_: make_reply("OK")])
def test_too_few_hellos_end_the_job_before_anybody_has_paid(
    server: Callable[..., Server], odd: Reply
) -> None:
    made = server(spare_rounds=9, least_sites=4)
    made.faults["hello", 0, "b"] = odd
    row = made.run()
    assert [asked[0] for asked in made.asked] == ["hello"]
    assert row["given_up"] and row["finished"] is False and len(made.ended) == 1


def test_a_hello_in_the_name_of_another_is_no_hello(server: Callable[..., Server]) -> None:
    def as_c(server: Server, site: str, task: Shareable) -> Shareable:
        said = SiteSum("c", SimulatedKeys(), server.job, "run").hello(ROUND, task.get_header(ATTEMPT))
        return DXO(DataKind.APP_DEFINED, data=said).to_shareable()

    made = server()
    made.faults["hello", 0, "b"] = as_c
    assert made.run()["refused"] == {"b": "UPDATES_INVALID"}


def test_a_site_that_is_gone_after_its_hello_costs_nobody_a_training(server: Callable[..., Server]) -> None:
    def goes(server: Server, site: str, task: Shareable) -> Shareable:
        server.gone.add(site)
        return hello(server, site, task)

    made = server()
    made.faults["hello", 0, "b"] = goes
    row = made.run()
    others = ["a", "c", "d"]
    assert made.asked == [("hello", 0, list(SITES)), ("hello", 1, others), ("train", 1, others)]
    assert row["taking_part"] == others and "voids" not in row and row["no_answer"] == ["b"]


def test_an_abort_ends_it_without_a_word(server: Callable[..., Server]) -> None:
    made, signal = server(spare_rounds=5), Signal()

    def abort(*_: Any) -> None:
        signal.trigger("the lead")

    made.faults["hello", 0, "c"] = abort
    made.run(signal)
    assert [asked[0] for asked in made.asked] == ["hello"] and made.ended == []
