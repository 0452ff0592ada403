"""What the server takes, what it refuses, and what it writes down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants

from histoflare.flare.aggregator import MetricsCollector, SiteOrderAggregator
from histoflare.flare.header_names import ATTEMPT, METRICS, NUMBERS, RELEASE, WEIGHT
from histoflare.flare.record import EVALUATION_FILE
from histoflare.privacy.plan import Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.tally import TALLY, Tally
from histoflare.rounds.round import server_round
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fednova import FedNova
from histoflare.rounds.strategy import Strategy, Update
from histoflare.rounds.transports.masked_sum import MaskedSum
from histoflare.site.messages import digest_of

from ..mem import make_mem_task
from .stand_in import StandInEngine, come_from, job_of_engine

SITES = ("a", "b", "c")
ROUND = 4
SAID = {"scope": "open", "mechanism": "open", "spend": Open().spend().to_json(), "seeded_noise": False}
START = {"w": np.array([1.0, 2.0], dtype=np.float32), "steps": np.array(3)}


class Server:
    """An aggregator in round :data:`ROUND`."""

    def __init__(self, folder: Path, strategy: Strategy | None = None) -> None:
        self.folder = folder
        self.engine = StandInEngine(folder, SITES, strategy=strategy or FedAvg(), plan=Open())
        self.aggregator = SiteOrderAggregator()

    def context(self) -> FLContext:
        fl_ctx = self.engine.context("server")
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, ROUND, private=True, sticky=False)
        fl_ctx.set_prop(
            AppConstants.GLOBAL_MODEL, make_model_learnable(dict(START), {}), private=True, sticky=False
        )
        return fl_ctx

    def accept(self, site: str, reply: Shareable) -> bool:
        return self.aggregator.accept(reply, come_from(site, self.context()))

    def aggregate(self) -> dict[str, Any]:
        return from_shareable(self.aggregator.aggregate(self.context())).data


@pytest.fixture(autouse=True)
def _own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histoflare.flare.aggregator.job_of", job_of_engine)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def reply(
    values: Any = (0.5, -0.5),
    weight: Any = 1.0,
    index: int = ROUND,
    kind: str = DataKind.WEIGHT_DIFF,
    metrics: Any = None,
    numbers: Any = None,
) -> Shareable:
    data = {"w": np.asarray(values, dtype=np.float32)} if not isinstance(values, dict) else values
    return stamped(DXO(kind, data=data, meta={WEIGHT: weight, METRICS: metrics, NUMBERS: numbers}), index)


def stamped(dxo: DXO, index: int = ROUND) -> Shareable:
    """Return the reply as a site's gate makes it."""
    try:
        stamp = {"digest": digest_of(dxo.data), **SAID}
    except (TypeError, ValueError, RuntimeError):
        stamp = {"digest": "none: these are not tensors"}
    dxo.set_meta_prop(RELEASE, stamp)
    shareable = dxo.to_shareable()
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, index)
    return shareable


def unstamped() -> Shareable:
    answer = DXO(DataKind.WEIGHT_DIFF, data={"w": np.zeros(2, np.float32)}, meta={WEIGHT: 1.0}).to_shareable()
    answer.add_cookie(AppConstants.CONTRIBUTION_ROUND, ROUND)
    return answer


def changed_after_the_stamp() -> Shareable:
    answer = reply()
    answer["DXO"]["data"]["w"] = np.zeros(2, np.float32)
    return answer


def trusting(noise_multiplier: float = 4.0) -> Shareable:
    """Return an update that its site let out for a server that adds noise."""
    plan = UpdateNoise(noise_multiplier=noise_multiplier, noise_location="server")
    dxo = DXO(DataKind.WEIGHT_DIFF, data={"w": np.ones(2, np.float32)}, meta={WEIGHT: 1.0})
    answer = stamped(dxo)
    answer["DXO"]["meta"][RELEASE] |= {"mechanism": plan.mechanism, "spend": plan.spend().to_json()}
    return answer


@pytest.mark.parametrize(
    "plan",
    [
        Open(),
        UpdateNoise(noise_multiplier=0.0, noise_location="server"),
        UpdateNoise(noise_multiplier=3.9, noise_location="server"),
        UpdateNoise(noise_multiplier=4.0),
    ],
)
def test_a_server_that_would_add_less_noise_than_its_sites_count_on_combines_nothing(
    tmp_path: Path, plan: PrivacyPlan
) -> None:
    server = Server(tmp_path, FedAvg(weighting="uniform"))
    server.engine.job.plan = plan
    assert server.accept("a", trusting())
    np.testing.assert_array_equal(server.aggregate()["w"], START["w"])
    assert server.aggregator.taking_part == []
    assert server.engine.events, "and the job ends"


def test_a_trusted_server_adds_the_noise_once(tmp_path: Path) -> None:
    server = Server(tmp_path, FedAvg(weighting="uniform"))
    server.engine.job.plan = UpdateNoise(noise_multiplier=4.0, clip_norm=1e-2, noise_location="server")
    for site in SITES:
        assert server.accept(site, trusting())
    combined = server.aggregate()["w"].astype(float) - START["w"] - 1.0
    assert (combined != 0).all() and (abs(combined) < 0.3).all()


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    changes = {"a": (1e8, 0.1), "b": (1.0, 0.2), "c": (-1e8, 0.3)}
    found = []
    for order in (SITES, SITES[::-1]):
        server = Server(tmp_path)
        assert all(server.accept(site, reply(changes[site], weight=3.0)) for site in order)
        found.append(server.aggregate())
    updates = [Update(site, {"w": torch.tensor(change)}, 3.0) for site, change in changes.items()]
    state = {name: torch.from_numpy(array) for name, array in START.items()}
    expected = server_round(FedAvg(), state, updates, SITES).model
    for combined in found:
        assert {name: array.tobytes() for name, array in combined.items()} == {
            name: tensor.numpy().tobytes() for name, tensor in expected.items()
        }


@pytest.mark.parametrize(
    "bad",
    [
        lambda: make_reply("REFUSED_COHORT_INVALID"),
        unstamped,
        changed_after_the_stamp,
        lambda: reply(index=ROUND - 1),
        lambda: reply(kind=DataKind.WEIGHTS),
        lambda: make_reply(ReturnCode.OK),
        lambda: reply(weight=None),
        lambda: reply(weight=float("nan")),
        lambda: reply(weight=-1.0),
        lambda: reply((1.0, float("nan"))),
        lambda: reply((1.0, float("inf"))),
        lambda: reply((1.0, 2.0, 3.0)),
        lambda: reply({}),
        lambda: reply({"other": np.zeros(2, dtype=np.float32)}),
        lambda: reply({"w": np.zeros(2)}),
        lambda: reply({"w": np.array([object(), object()])}),
        lambda: reply({"w": "text"}),
        lambda: reply(metrics=5),
        lambda: reply(metrics={"validation/auc": "0.5"}),
        lambda: reply(metrics={3: 0.5}),
    ],
    ids=[
        "refused",
        "no stamp",
        "changed after the stamp",
        "late",
        "whole model",
        "empty reply",
        "no weight",
        "NaN weight",
        "negative weight",
        "NaN",
        "infinity",
        "shape",
        "nothing",
        "unknown name",
        "dtype",
        "objects",
        "text",
        "metrics: number",
        "metrics: text",
        "metrics: names",
    ],
)
def test_what_cannot_be_used_costs_its_site_the_round_and_nobody_else(
    server: Server, bad: Callable[[], Shareable]
) -> None:
    assert not server.accept("b", bad())
    assert server.accept("a", reply())
    np.testing.assert_array_equal(server.aggregate()["w"], [1.5, 1.5])
    assert server.aggregator.taking_part == ["a"]
    assert EventType.FATAL_SYSTEM_ERROR not in server.engine.events


def test_what_comes_after_the_sum_was_not_part_of_it(server: Server) -> None:
    """FLARE hands a reply over also while the model is being written."""
    assert server.accept("a", reply())
    server.aggregate()
    assert not server.accept("b", reply())
    assert server.aggregator.taking_part == ["a"]


def test_a_second_reply_of_a_site_is_refused(server: Server) -> None:
    assert server.accept("a", reply())
    assert not server.accept("a", reply((9.0, 9.0)))
    np.testing.assert_array_equal(server.aggregate()["w"], [1.5, 1.5])


@pytest.mark.parametrize(
    "numbers",
    [None, 5, {}, {"steps": float("nan")}, {"steps": "4.0"}, {"steps": 4.0, "patients": 17.0}],
)
def test_numbers_that_are_not_the_strategy_s_cost_the_round(tmp_path: Path, numbers: Any) -> None:
    server = Server(tmp_path, FedNova())
    assert not server.accept("b", reply(numbers=numbers))
    assert server.accept("a", reply(numbers={"steps": 2.0}))
    np.testing.assert_array_equal(server.aggregate()["w"], [2.0, 1.0])
    assert server.aggregator.notes == {"numbers": {"a": {"steps": 2.0}}}


def test_numbers_that_nobody_asked_for_cost_the_round(server: Server) -> None:
    assert not server.accept("b", reply(numbers={"steps": 2.0}))


def test_a_round_without_updates_leaves_the_model_as_it_was(server: Server) -> None:
    assert server.aggregate() == START
    assert server.aggregator.taking_part == []


def test_the_next_round_starts_empty(server: Server) -> None:
    server.accept("a", reply())
    server.aggregate()
    server.aggregator.reset(server.context())
    assert server.accept("a", reply((0.0, 1.0)))
    np.testing.assert_array_equal(server.aggregate()["w"], [1.0, 3.0])
    assert server.aggregator.taking_part == ["a"]


def test_a_round_that_cannot_be_combined_ends_the_job_and_nobody_took_part(tmp_path: Path) -> None:
    server = Server(tmp_path, FedAvg(weighting="fixed", weights={"a": 0.0, "b": 1.0, "c": 1.0}))
    assert server.accept("a", reply())
    server.aggregate()
    assert EventType.FATAL_SYSTEM_ERROR in server.engine.events
    assert server.aggregator.taking_part == []


def test_metrics_let_out_beside_an_update_are_kept_by_site(server: Server) -> None:
    dxo = DXO(DataKind.WEIGHT_DIFF, data={"w": np.zeros(2, np.float32)}, meta={WEIGHT: 1.0})
    dxo.set_meta_prop(METRICS, {"validation/auc": 0.75})
    assert server.accept("a", stamped(dxo)) and server.accept("b", reply())
    assert server.aggregator.metrics == {"a": {"validation/auc": 0.75}, "b": {}}


def test_an_evaluation_is_written_by_site_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.aggregator = MetricsCollector()
    assert server.accept("b", stamped(DXO(DataKind.METRICS, data={"auc": 0.5, "accuracy": None})))
    assert server.accept("a", stamped(DXO(DataKind.METRICS, data={"auc": 1.0})))
    assert not server.accept("c", reply())
    assert server.aggregate() == START
    written = json.loads((tmp_path / EVALUATION_FILE).read_text())
    assert written == {"a": {"auc": 1.0}, "b": {"accuracy": None, "auc": 0.5}}


def test_after_a_sum_that_stayed_void_sites_in_no_sum_are_still_heard(tmp_path: Path) -> None:
    """They have paid for what they send, and have nothing to do with who was lost."""
    server = Server(tmp_path)
    server.engine.job.tally = Tally(noise_multiplier=4.0, noise="shared", honest=2)
    server.engine.job.task = make_mem_task(["a", "b"], "encoder")
    server.engine.job.transport = MaskedSum()
    server.aggregator = MetricsCollector()
    server.aggregator.reset(server.context())
    for attempt in range(2):
        server.aggregator.expect(["a", "b"], attempt, server.context())
        assert server.aggregator.open_sum(server.context())
        server.aggregator.expect((), attempt, server.context())
    length = server.engine.job.task.tally_form.length
    counts = DXO(DataKind.WEIGHT_DIFF, data={TALLY: np.ones(length)}, meta={WEIGHT: 1.0})
    late = stamped(counts)
    late.add_cookie(ATTEMPT, 1)
    assert not server.accept("a", late)
    assert server.accept("c", stamped(counts))
    server.aggregate()
    assert list(json.loads((tmp_path / EVALUATION_FILE).read_text())) == ["c"]
