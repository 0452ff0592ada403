from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from histoflare.errors import JobError
from histoflare.privacy.noise import NoiseSource
from histoflare.privacy.plan import Open, UpdateNoise
from histoflare.rounds.local import predict
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies import make_strategy
from histoflare.rounds.strategies.ensemble import Ensemble
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fednova import FedNova
from histoflare.rounds.strategies.geometric_median import GeometricMedian
from histoflare.rounds.strategies.krum import Krum
from histoflare.rounds.strategies.median import Median
from histoflare.rounds.strategies.trimmed_mean import TrimmedMean
from histoflare.rounds.strategy import Strategy, Update
from histoflare.rounds.transport import check_readable
from histoflare.rounds.transports.float16 import Float16
from histoflare.rounds.transports.float32 import PLAIN, Float32
from tests.refusals import raises_reason

from .toy import Table, ToyTask, toy_sites, toy_table


def test_personal_heads_learn_what_no_single_model_can() -> None:
    """Two sites with opposite labels: no common model fits both, common layers with own heads do."""
    mine = toy_table(1, n=80)
    theirs = Table(mine.x, 1 - mine.y, mine.x_test, 1 - mine.y_test)
    sites = {"mine": mine, "theirs": theirs}
    task = ToyTask(hidden=8, local_epochs=2)

    def accuracies(strategy: Strategy) -> list[float]:
        result = run_in_process(task, sites, strategy, rounds=25, seed=0)
        tables = [
            predict(task, strategy.personalize(result.state, result.site_states[site]), data, "test")
            for site, data in sites.items()
        ]
        return [float((table.probabilities.argmax(axis=1) == table.labels).mean()) for table in tables]

    assert min(accuracies(FedAvg(share=["body"]))) > 0.8
    assert sum(accuracies(FedAvg())) == pytest.approx(1.0)  # what is right here is wrong there


def test_what_a_strategy_keeps_at_the_server_is_no_variance() -> None:
    """How far a running variance has moved may well be below zero; a model's is kept at zero or above."""
    task, strategy = ToyTask(hidden=4, batch_norm=True), Ensemble(sites=["a"])
    begun = run_in_process(task, {"a": toy_sites(1)["site_0"]}, strategy, 0, 0)
    down = {name: torch.zeros_like(tensor) for name, tensor in strategy.sent(begun.state).items()}
    down["norm.running_var"] = torch.full((4,), -5.0)
    made = server_round(strategy, begun.state, [Update("a", down, 1.0)], ["a"], own=begun.own)
    assert bool((made.own["a/norm.running_var"] == -5).all())
    assert bool((strategy.models(made.model, made.own)["a"]["norm.running_var"] == 0).all())
    plain = server_round(FedAvg(weighting="uniform"), begun.state, [Update("a", down, 1.0)], ["a"])
    assert bool((plain.model["norm.running_var"] == 0).all())


def test_a_strategy_says_what_it_made_of_each_update() -> None:
    run = run_in_process(ToyTask(), toy_sites(3), GeometricMedian(), 2, 0)
    assert [set(notes["contribution"]) for notes in run.notes] == [set(toy_sites(3))] * 2
    run = run_in_process(ToyTask(), toy_sites(3), Krum(faulty=0), 2, 0)
    assert [len(notes["rejected"]) for notes in run.notes] == [2, 2]
    assert run_in_process(ToyTask(), toy_sites(3), FedAvg(), 1, 0).notes == ({},)


def test_the_numbers_that_sites_send_stand_in_the_run_s_record() -> None:
    sites = toy_sites(3)
    run = run_in_process(ToyTask(batch_size=8), sites, FedNova(), 1, 0)
    sent = run.notes[0]["numbers"]
    assert {site: numbers["steps"] for site, numbers in sent.items()} == {
        site: -(-len(data.y) // 8) for site, data in sites.items()
    }


def test_fewer_updates_than_a_strategy_needs_end_the_round() -> None:
    state = run_in_process(ToyTask(), toy_sites(2), FedAvg(), 0, 0).state
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    updates = [Update(site, zeros, 1.0) for site in ("a", "b")]
    with pytest.raises(JobError) as caught:
        server_round(TrimmedMean(), state, updates, ["a", "b", "c"])
    assert caught.value.reason == "UPDATES_INVALID"


def test_a_transport_that_hides_updates_takes_a_linear_strategy() -> None:
    hiding = SimpleNamespace(name="hidden", readable=False)
    check_readable(FedAvg(), hiding)
    check_readable(Median(), PLAIN)
    with pytest.raises(JobError) as caught:
        check_readable(Median(), hiding)
    assert caught.value.reason == "TRANSPORT_UNFIT"


class Halving(Open):
    """A privacy plan that can be seen: it halves what leaves."""

    asked: ClassVar[list[tuple[str | int, ...]]] = []

    def noise_source(self, *parts: str | int) -> NoiseSource:
        self.asked.append(parts)
        return super().noise_source(*parts)

    def release(self, tensors: Mapping[str, Tensor], noise: NoiseSource) -> dict[str, Tensor]:
        return {name: tensor / 2 for name, tensor in tensors.items()}


class Leaking(Halving):
    """A privacy plan that lets a tensor too many out."""

    def release(self, tensors: Mapping[str, Tensor], noise: NoiseSource) -> dict[str, Tensor]:
        return {**tensors, "patients": torch.ones(3)}


def test_every_update_passes_the_privacy_plan() -> None:
    sites, task, plan = toy_sites(2), ToyTask(), Halving()
    halved = run_in_process(task, sites, FedAvg(), 1, 0, plan=plan)
    full = run_in_process(task, sites, FedAvg(), 1, 0, plan=Open())
    assert plan.asked == [("site_0", 0, "update"), ("site_1", 0, "update")]
    for name, start in full.initial.items():
        torch.testing.assert_close(halved.state[name] - start, (full.state[name] - start) / 2)


def test_training_that_diverges_is_an_update_of_noise_under_protection() -> None:
    """That it diverged depends on the data; said without noise, it would leave without protection."""
    task = replace(ToyTask(), learning_rate=3e38, local_epochs=5)
    with pytest.raises(JobError) as caught:
        run_in_process(task, toy_sites(2), FedAvg(weighting="uniform"), 1, 0)
    assert caught.value.reason == "TRAINING_FAILED"
    plan = UpdateNoise(noise_multiplier=2.0, clip_norm=1.0, noise_seed=3)
    run = run_in_process(task, toy_sites(2), FedAvg(weighting="uniform"), 1, 0, plan)
    moved = {name: run.state[name] - start for name, start in run.initial.items()}
    assert all(bool(tensor.isfinite().all()) and bool((tensor != 0).any()) for tensor in moved.values())
    assert all(math.isnan(loss) for loss in run.losses[0].values())


def test_what_a_plan_adds_does_not_leave() -> None:
    with raises_reason("STATE_INVALID", "site_0", "patients"):
        run_in_process(ToyTask(), toy_sites(2), FedAvg(), 1, 0, plan=Leaking())


def test_a_site_does_not_depend_on_the_other_sites() -> None:
    sites, task = toy_sites(3), ToyTask()
    state = run_in_process(task, sites, FedAvg(), 0, 0).state

    def tensors(site: str, round_index: int, seed: int) -> State:
        return site_round(
            task,
            FedAvg(),
            state,
            sites["site_1"],
            site=site,
            site_state={},
            round_index=round_index,
            total_rounds=9,
            seed=seed,
            plan=Open(),
        ).update.tensors

    digests = [
        hash_state(tensors(*key)) for key in [("s", 0, 0), ("s", 0, 0), ("t", 0, 0), ("s", 1, 0), ("s", 0, 1)]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4  # site, round and job seed each change the batches


def test_strategies_are_made_by_name() -> None:
    assert make_strategy("fedavg", weighting="uniform") == FedAvg(weighting="uniform")
    with raises_reason("JOB_INVALID", "'fedsum'", "cyclic, ditto", "fedavg, fedavgm"):
        make_strategy("fedsum")
    with raises_reason("JOB_INVALID", "fedavg", "momentum", "weighting"):
        make_strategy("fedavg", momentum=0.9)


def test_an_update_that_diverged_is_refused_whatever_carries_it() -> None:
    """Half precision would make 65504 of infinity, and nobody would see it."""

    class Exploding(FedAvg):
        def local_round(self, ctx: Any) -> Any:
            outcome = super().local_round(ctx)
            tensors = {name: tensor * float("inf") for name, tensor in outcome.update.tensors.items()}
            return replace(outcome, update=replace(outcome.update, tensors=tensors))

    for transport in (Float32(), Float16()):
        with pytest.raises(JobError) as caught:
            run_in_process(ToyTask(), toy_sites(2), Exploding(), 1, 0, transport=transport)
        assert caught.value.reason == "STATE_INVALID"
