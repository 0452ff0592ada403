from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from histoflare.errors import JobError
from histoflare.privacy.noise import NoiseSource
from histoflare.privacy.plan import Open, UpdateNoise
from histoflare.rounds.fedavg import FedAvg
from histoflare.rounds.local import Correction, predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, add_weighted_mean, digest
from histoflare.rounds.strategy import (
    EXTRA,
    SiteOutcome,
    SiteRound,
    Strategy,
    Update,
    make_strategy,
    site_round,
)

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


@dataclass(frozen=True)
class Scaffold(Strategy):
    """SCAFFOLD (Karimireddy et al. 2020), option II: control variates at both ends."""

    name: ClassVar[str] = "scaffold"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("control variates",)
    equal_weights: ClassVar[bool] = True
    learning_rate: float = 0.1

    def begin(self, state: State) -> State:
        return {**state, **{EXTRA + name: torch.zeros_like(tensor) for name, tensor in state.items()}}

    def participants(self, round_index: int, sites: Sequence[str], seed: int) -> tuple[str, ...]:
        return tuple(sites)

    def correction(self, ctx: SiteRound) -> Correction:
        return lambda name, parameter: ctx.global_state[EXTRA + name] - ctx.site_state.get(name, 0.0)

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        outcome = super().local_round(ctx)
        scale = outcome.training.n_steps * self.learning_rate
        control = {
            name: ctx.site_state.get(name, 0.0) - ctx.global_state[EXTRA + name] - change / scale
            for name, change in outcome.update.tensors.items()
        }
        change = {EXTRA + name: control[name] - ctx.site_state.get(name, 0.0) for name in control}
        update = replace(outcome.update, tensors={**outcome.update.tensors, **change})
        return replace(outcome, update=update, site_state=control)

    def combine(self, global_state: State, updates: Sequence[Update]) -> State:
        return add_weighted_mean(global_state, [u.tensors for u in updates], [1.0] * len(updates))


def test_control_variates_fit_the_interface() -> None:
    """Site state, a correction of the gradients and tensors beside the model's: what SCAFFOLD needs."""
    sites = toy_sites(3)
    result = run_in_process(ToyTask(), sites, Scaffold(), rounds=5, seed=0)
    names = [name for name in result.state if not name.startswith(EXTRA)]
    for name in names:
        # The server's control variate stays the mean of the sites' (all take part in every round).
        mean = torch.stack([result.site_states[site][name] for site in sites]).mean(dim=0)
        torch.testing.assert_close(result.state[EXTRA + name], mean, rtol=1e-4, atol=1e-6)
        assert bool((mean != 0).any())
    assert list(Scaffold().personalize(result.state, {})) == names
    # With one site the corrections cancel: it is plain training.
    alone = {"only": toy_table(3)}
    ours = run_in_process(ToyTask(), alone, Scaffold(), rounds=3, seed=0).state
    plain = run_in_process(ToyTask(), alone, FedAvg(), rounds=3, seed=0).state
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


class Halving(Open):
    """A privacy plan that can be seen: it halves what leaves."""

    asked: ClassVar[list[tuple[str | int, ...]]] = []

    def noise(self, *parts: str | int) -> NoiseSource:
        self.asked.append(parts)
        return super().noise(*parts)

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
        run_in_process(task, toy_sites(2), FedAvg("uniform"), 1, 0)
    assert caught.value.reason == "TRAINING_FAILED"
    plan = UpdateNoise(noise_multiplier=2.0, clip_norm=1.0, noise_seed=3)
    run = run_in_process(task, toy_sites(2), FedAvg("uniform"), 1, 0, plan)
    moved = {name: run.state[name] - start for name, start in run.initial.items()}
    assert all(bool(tensor.isfinite().all()) and bool((tensor != 0).any()) for tensor in moved.values())
    assert all(math.isnan(loss) for loss in run.losses[0].values())


def test_what_a_plan_adds_does_not_leave() -> None:
    with pytest.raises(JobError, match="patients is not part"):
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
        digest(tensors(*key)) for key in [("s", 0, 0), ("s", 0, 0), ("t", 0, 0), ("s", 1, 0), ("s", 0, 1)]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4  # site, round and job seed each change the batches


def test_strategies_are_made_by_name() -> None:
    assert make_strategy("fedavg", weighting="uniform") == FedAvg("uniform")
    with pytest.raises(JobError, match=r"no strategy 'fedsgd'; there are: cyclic, fedavg"):
        make_strategy("fedsgd")
    with pytest.raises(JobError, match=r"takes no momentum; it takes: .*weighting"):
        make_strategy("fedavg", momentum=0.9)
