"""A bound takes the steps of what it bounds, in batches of the same size, under the same protection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from histoflare.privacy.accountant import epsilon
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.privacy.spend import Spend
from histoflare.rounds.bounds import POOLED, Course, plan_bounds, train_alone, train_bounds, without_noise
from histoflare.rounds.patience import Patience
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.strategy import Strategy
from histoflare.seeds import derive_seed

from .toy import RowTask, Table, ToyTask, toy_sites


def pooled_of(sites: dict[str, Table]) -> Table:
    return Table(
        *(torch.cat([getattr(d, f) for d in sites.values()]) for f in ("x", "y", "x_test", "y_test"))
    )


def alone(task: ToyTask, sites: dict[str, Table], rounds: int, seed: int) -> dict[str, State]:
    courses = plan_bounds(task, sites, FedAvg(), rounds, seed)
    return train_bounds(task, sites, pooled_of(sites), courses, FedAvg(), seed).local


BATCHES: list[int] = []
"""Sizes of the batches that were trained on."""


@dataclass(frozen=True)
class Counting(ToyTask):
    """Counts what it is trained on: a pass, or so many steps."""

    local_steps: int | None = None

    def n_steps(self, data: Table) -> int:
        return self.local_steps or super().n_steps(data)

    def train_batches(self, data: Table, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.n_steps(data)
        for again in range(left):
            for batch in super().train_batches(data, derive_seed(seed, "pass", again)):
                if left:
                    left -= 1
                    yield batch

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        BATCHES.append(len(batch[1]))
        return super().loss(model, batch)


STRATEGIES = [FedAvg(), FedAvg(clients_per_round=2), CyclicWeightTransfer()]


def count_by_model(
    task: ToyTask, sites: dict[str, Table], strategy: Strategy, rounds: int, plan: PrivacyPlan
) -> tuple[list[int], dict[str, list[int]]]:
    """Return the batches of the federation, and those of each bound."""
    BATCHES.clear()
    run_in_process(task, sites, strategy, rounds, 0, plan)
    federation, found = list(BATCHES), {}
    courses = plan_bounds(task, sites, strategy, rounds, 0, plan)
    data = {**sites, POOLED: pooled_of(sites)}
    for name, course in {**courses.local, POOLED: courses.pooled}.items():
        BATCHES.clear()
        train_alone(task, data[name], course, strategy, 0, name=name)
        found[name] = list(BATCHES)
    return federation, found


@pytest.mark.parametrize(
    "strategy", STRATEGIES, ids=lambda s: f"{s.name}-{getattr(s, 'clients_per_round', 1)}"
)
@pytest.mark.parametrize(
    "plan", [Open(), UpdateNoise(noise_multiplier=1.0, clip_norm=0.1)], ids=["open", "update"]
)
@pytest.mark.parametrize("steps", [None, 5])
def test_the_pool_takes_the_steps_of_all_sites(
    strategy: Strategy, plan: PrivacyPlan, steps: int | None
) -> None:
    """Sites of 24, 32 and 40 samples, batches of 8: no batch is smaller, so the samples are as many, too."""
    sites, task = toy_sites(3), Counting(local_steps=steps, local_epochs=2)
    federation, found = count_by_model(task, sites, strategy, 3, plan)
    assert Counter(found[POOLED]) == Counter(federation)
    own = [size for site in sites for size in found[site]]
    assert Counter(own) == Counter(federation), "each site alone takes the steps it takes in the federation"


def test_an_uneven_pass_still_has_as_many_steps() -> None:
    """Sites of 24, 32 and 40 in batches of 7: 4 + 5 + 6 steps, while a pass over all 96 would have 14."""
    task = Counting(batch_size=7)
    federation, found = count_by_model(task, toy_sites(3), FedAvg(), 2, Open())
    assert len(federation) == len(found[POOLED]) == 2 * (4 + 5 + 6)
    assert max(found[POOLED]) == 7


def test_a_site_without_training_data_has_no_bound() -> None:
    sites = toy_sites(2)
    empty = replace(sites["site_0"], x=sites["site_0"].x[:0], y=sites["site_0"].y[:0])
    courses = plan_bounds(ToyTask(), {**sites, "none": empty}, FedAvg(), 2, 0)
    assert set(courses.local) == set(sites)
    assert courses.pooled.total_steps == sum(course.total_steps for course in courses.local.values())


@pytest.mark.parametrize(
    "plan",
    [
        Open(),
        UpdateNoise(noise_multiplier=0.3, clip_norm=0.1, noise_seed=3),
        UpdateNoise(noise_multiplier=0.3, clip_norm=0.1, noise_seed=3, noise_location="server"),
        DpSgd(noise_multiplier=0.3, sample_rate=0.3, batch_size=8, steps=2, noise_seed=3),
    ],
    ids=lambda plan: plan.mechanism,
)
def test_a_federation_of_one_is_its_own_bound(plan: PrivacyPlan) -> None:
    """Local and pooled alike: the same mechanism, to the last bit."""
    sites, task = toy_sites(1), RowTask()
    courses = plan_bounds(task, sites, FedAvg(weighting="uniform"), 4, 7, plan)
    federated = run_in_process(task, sites, FedAvg(weighting="uniform"), 4, 7, plan).state
    for course in (courses.local["site_0"], courses.pooled):
        found = train_alone(task, sites["site_0"], course, FedAvg(weighting="uniform"), 7, name="site_0")
        assert hash_state(found) == hash_state(federated)


def test_a_site_alone_does_not_depend_on_the_others() -> None:
    sites, task = toy_sites(3), ToyTask()
    assert hash_state(alone(task, sites, 2, 0)["site_1"]) == hash_state(
        alone(task, {"site_1": sites["site_1"]}, 2, 0)["site_1"]
    )


def test_under_dp_sgd_the_pool_draws_as_many_records_a_step_as_a_site() -> None:
    plan = DpSgd(noise_multiplier=1.0, sample_rate=0.4, batch_size=8, clip_norm=0.7, steps=2)
    sites = toy_sites(4)
    courses = plan_bounds(RowTask(), sites, FedAvg(), 5, 0, plan)
    assert all(course == Course((2,) * 5, plan) for course in courses.local.values())
    pooled = courses.pooled.plan
    assert isinstance(pooled, DpSgd)
    assert (pooled.sample_rate, pooled.noise_multiplier) == (0.1, 1.0)
    assert (pooled.clip_norm, pooled.batch_size, pooled.record) == (0.7, 8, "patient")
    assert courses.pooled.steps == (8,) * 5
    sizes = [len(data.y) for data in sites.values()]
    assert pooled.sample_rate * sum(sizes) == pytest.approx(0.4 * sum(sizes) / len(sizes))


def test_the_pool_of_adnan_s_hospitals_has_the_paper_s_epsilon() -> None:
    """Adnan 2022: q = 32/705, noise 4, 3,966 steps of all four hospitals, δ = 1e-4: ε = 2.90.

    Four sites of 705/4 patients, 3,966/4 steps each (rounded up). In a hospital of that size it is 6.5.
    """
    plan = DpSgd(noise_multiplier=4.0, sample_rate=4 * 32 / 705, batch_size=32, steps=992, delta=1e-4)
    courses = plan_bounds(RowTask(), toy_sites(4), FedAvg(), 1, 0, plan)
    (spent,) = courses.pooled.spends
    assert spent == Spend(4.0, 32 / 705, 4 * 992)
    assert epsilon(courses.pooled.spends, 1e-4, "rdp") == pytest.approx(2.90, abs=0.005)
    assert epsilon(courses.local["site_0"].spends, 1e-4, "rdp") == pytest.approx(6.5, abs=0.2)


def test_a_share_of_a_budget_holds_in_the_pool_too() -> None:
    asked = DpSgd(budget_epsilon=3.0, budget_share=1.0, sample_rate=0.4, batch_size=8, steps=2)
    plan = asked.settled(5, 12)
    courses = plan_bounds(RowTask(), toy_sites(4), FedAvg(), 5, 0, plan, asked)
    pooled = courses.pooled.plan
    assert isinstance(pooled, DpSgd)
    assert pooled.noise_multiplier != plan.noise_multiplier
    for course in (*courses.local.values(), courses.pooled):
        assert epsilon(course.spends, asked.delta, "rdp") == pytest.approx(3.0, rel=0.1)
        assert epsilon(course.spends, asked.delta, "rdp") <= 3.0


def test_under_noise_on_updates_every_bound_spends_what_a_site_does() -> None:
    plan = UpdateNoise(noise_multiplier=20.0)
    courses = plan_bounds(ToyTask(), toy_sites(4), FedAvg(), 5, 0, plan)
    for course in (*courses.local.values(), courses.pooled):
        assert course.spends == [Spend(10.0)] * 5, "the sensitivity of a patient is two clips"


def test_a_site_that_is_asked_less_often_spends_less() -> None:
    plan = UpdateNoise(noise_multiplier=20.0)
    strategy = FedAvg(weighting="uniform", clients_per_round=1)
    courses = plan_bounds(ToyTask(), toy_sites(3), strategy, 6, 0, plan)
    assert sum(len(course.spends) for course in courses.local.values()) == 6
    assert len(courses.pooled.spends) == 6


def test_without_noise_only_the_noise_is_gone() -> None:
    """As the limit of ever less noise: the same samples, clip and steps; and the same again."""
    plan = DpSgd(noise_multiplier=1.0, sample_rate=0.3, batch_size=8, clip_norm=0.01, steps=3)
    sites, task = toy_sites(3), RowTask()
    protected = plan_bounds(task, sites, FedAvg(weighting="uniform"), 4, 0, plan)
    free = without_noise(protected, seed=5)
    assert [course.steps for course in free.local.values()] == [(3,) * 4] * 3
    assert free.pooled.steps == protected.pooled.steps
    assert epsilon(free.pooled.spends, 1e-5, "rdp") == float("inf")
    pooled = free.pooled.plan
    assert pooled == replace(protected.pooled.plan, noise_multiplier=0.0, noise_seed=5)
    data = pooled_of(sites)
    found = [
        train_alone(task, data, free.pooled, FedAvg(weighting="uniform"), 0, name=POOLED) for _ in range(2)
    ]
    assert hash_state(found[0]) == hash_state(found[1])
    moved = torch.cat([(found[0][n] - t).flatten() for n, t in task.build_model().state_dict().items()])
    # 36 steps of at most (number drawn, some 8) · 0.01 / 8 · learning rate 0.1
    assert 0 < float(moved.norm()) < 3 * 36 * 0.01 * 0.1


@dataclass(frozen=True)
class Falling(ToyTask):
    """Its learning rate falls over the whole run."""

    def decay(self, fraction: float) -> float:
        return 1.0 - fraction


def test_a_bound_that_ends_early_has_the_schedule_of_all_rounds() -> None:
    """A federation of one site, ended by patience after 4 of 20 rounds, is its own bound."""
    sites, task = toy_sites(1), Falling(learning_rate=1e-6)
    run = run_in_process(task, sites, FedAvg(), 20, 7, patience=Patience("auc", 3))
    assert len(run.participation) == 4
    courses = plan_bounds(task, sites, FedAvg(), 20, 7).until(4)
    for course in (courses.local["site_0"], courses.pooled):
        assert course is not None and len(course.spends) == 4
        assert hash_state(
            train_alone(task, sites["site_0"], course, FedAvg(), 7, name="site_0")
        ) == hash_state(run.state)


def test_without_noise_an_open_plan_is_what_it_was() -> None:
    courses = plan_bounds(ToyTask(), toy_sites(2), FedAvg(), 2, 0)
    assert without_noise(courses, 1) == courses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_bounds_gradients_takes_a_step_a_round_with_the_same_rate_and_momentum(momentum: float) -> None:
    sites, task = toy_sites(3), ToyTask(local_epochs=4)
    strategy = FedSgd(learning_rate=0.3, momentum=momentum, clients_per_round=2)
    courses = plan_bounds(task, sites, strategy, 6, 1)
    assert courses.pooled is not None and courses.pooled.steps == (1,) * 6
    assert sum(course.total_steps for course in courses.local.values()) == 2 * 6
    together = pooled_of(sites)
    bounds = train_bounds(task, sites, together, courses, strategy, 1)
    alone = FedSgd(learning_rate=0.3, momentum=momentum)
    assert bounds.pooled is not None
    assert hash_state(bounds.pooled) == hash_state(
        run_in_process(task, {"pooled": together}, alone, 6, 1).state
    )


@pytest.mark.parametrize(
    ("plan", "strategy"),
    [
        (
            DpSgd(noise_multiplier=4.0, sample_rate=0.3, batch_size=30, delta=1e-4, noise="shared", honest=2),
            FedSgd(weighting="uniform"),
        ),
        (UpdateNoise(noise_multiplier=4.0, noise="shared", honest=2), FedAvg(weighting="uniform")),
    ],
    ids=["steps", "updates"],
)
def test_a_bound_shares_its_noise_with_nobody(plan: Any, strategy: FedAvg) -> None:
    sites, task = toy_sites(3), RowTask()
    courses = plan_bounds(task, sites, strategy, 4, 1, plan)
    assert courses.pooled is not None
    for course in (*courses.local.values(), courses.pooled):
        (spend, *_) = course.spends
        assert (spend.noise_multiplier, spend.honest) == (plan.spend().noise_multiplier, 1)
    for made in (courses, without_noise(courses, 1)):
        bounds = train_bounds(task, sites, pooled_of(sites), made, strategy, 1)
        assert not bounds.failed and bounds.pooled is not None and len(bounds.local) == 3
