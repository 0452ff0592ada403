from __future__ import annotations

from typing import Any

import pytest
import torch

from histoflare.rounds.local import train_locally
from histoflare.rounds.round import server_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import model_state
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategy import Update
from histoflare.seeds import derive_seed
from tests.refusals import raises_reason

from .toy import ToyTask, toy_sites

SITES = ["a", "b", "c"]


def test_it_visits_one_site_a_round_in_site_order() -> None:
    visits = [CyclicWeightTransfer().topology.plan(index, SITES, seed=0).trainers for index in range(7)]
    assert visits == [("a",), ("b",), ("c",), ("a",), ("b",), ("c",), ("a",)]


def test_seeded_order_is_a_new_permutation_each_cycle() -> None:
    strategy = CyclicWeightTransfer(order="seeded")
    visits = [strategy.topology.plan(index, SITES, seed=4).trainers[0] for index in range(90)]
    cycles = [tuple(visits[start : start + 3]) for start in range(0, 90, 3)]
    assert all(sorted(cycle) == SITES for cycle in cycles)
    assert len(set(cycles)) == 6  # all orders of three sites turn up in thirty cycles
    assert visits == [strategy.topology.plan(index, SITES, seed=4).trainers[0] for index in range(90)]


def test_a_cycle_is_training_at_one_site_after_the_other() -> None:
    sites, task = toy_sites(3), ToyTask()
    result = run_in_process(task, sites, CyclicWeightTransfer(), rounds=3, seed=9)
    state = model_state(task.build_model())
    for index, (site, data) in enumerate(sites.items()):
        state = train_locally(task, state, data, seed=derive_seed(9, "train", site, index)).state
    for name, tensor in state.items():
        torch.testing.assert_close(result.state[name], tensor, rtol=1e-5, atol=1e-6)


def test_two_models_in_a_round_are_refused() -> None:
    updates = [Update(site, {"w": torch.zeros(1)}, 1.0) for site in "ab"]
    with raises_reason("UPDATES_INVALID", "a, b"):
        server_round(CyclicWeightTransfer(), {"w": torch.zeros(1)}, updates, SITES)


def test_an_unknown_order_is_refused() -> None:
    with raises_reason("JOB_INVALID", "order", "site, seeded", "'random'"):
        CyclicWeightTransfer(order="random")


def test_by_size_the_largest_is_visited_last_and_equal_ones_in_site_order() -> None:
    for sizes, expected in (({"a": 9, "b": 2, "c": 5}, "bcabca"), ({"a": 2, "b": 1.0, "c": 1.0}, "bcabca")):
        topology = CyclicWeightTransfer(order="size", sizes=sizes).topology
        assert "".join(topology.plan(index, SITES, seed=0).trainers[0] for index in range(6)) == expected


def test_single_weight_transfer_in_a_given_order_is_that_many_trainings() -> None:
    sites, task, visits = toy_sites(3), ToyTask(), ["site_2", "site_0", "site_1"]
    strategy = CyclicWeightTransfer(order="named", visits=visits)
    result = run_in_process(task, sites, strategy, rounds=3, seed=9)
    assert result.participation == tuple((site,) for site in visits)
    state = model_state(task.build_model())
    for index, site in enumerate(visits):
        state = train_locally(task, state, sites[site], seed=derive_seed(9, "train", site, index)).state
    for name, tensor in state.items():
        torch.testing.assert_close(result.state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"order": "size"},
        {"order": "named"},
        {"sizes": {"a": 1.0}},
        {"visits": ["a"]},
        {"order": "size", "sizes": {"a": 0.0}},
        {"order": "size", "sizes": {"a": float("nan")}},
        {"order": "named", "visits": ["a", "a"]},
        {"order": "named", "visits": "abc"},
    ],
)
def test_an_order_that_cannot_be_followed_is_refused(fields: dict[str, Any]) -> None:
    with raises_reason("JOB_INVALID"):
        CyclicWeightTransfer(**fields)


@pytest.mark.parametrize("named", [["a", "b"], ["a", "b", "c", "d"]])
def test_an_order_names_the_sites_that_train_and_no_other(named: list[str]) -> None:
    for fields in ({"order": "named", "visits": named}, {"order": "size", "sizes": dict.fromkeys(named, 1)}):
        strategy = CyclicWeightTransfer(**fields)  # type: ignore[arg-type]
        with raises_reason("JOB_INVALID"):
            strategy.check_sites(SITES)
        strategy.check_sites(named)
