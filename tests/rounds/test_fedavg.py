from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.rounds.round import server_round
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import Update
from tests.refusals import raises_reason

SITES = ["a", "b", "c", "d"]
SIZES = st.integers(min_value=0, max_value=1000)


def random_state(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": scale * torch.randn((7, 3), generator=generator),
        "b": scale * torch.randn(3, generator=generator),
    }


def updates_of(weights: Mapping[str, float], scale: float = 0.1) -> list[Update]:
    return [
        Update(site, random_state(10 + i, scale), weight) for i, (site, weight) in enumerate(weights.items())
    ]


def combined_of(strategy: FedAvg, start: State, updates: list[Update], sites: list[str] = SITES) -> State:
    return server_round(strategy, start, updates, sites).model


def oracle(start: State, updates: list[Update], weights: list[float]) -> dict[str, np.ndarray]:
    """Rieke et al. 2020, Algorithm 1, line 8, in numpy float64."""
    result = {}
    for name, tensor in start.items():
        total = np.zeros(tensor.shape)
        for update, weight in zip(updates, weights, strict=True):
            total = total + update.tensors[name].numpy().astype(np.float64) * weight
        result[name] = (tensor.numpy().astype(np.float64) + total / sum(weights)).astype(np.float32)
    return result


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0), shuffle=st.randoms()
)
def test_it_is_algorithm_1_to_the_last_bit_in_any_order_of_arrival(sizes: list[int], shuffle: Any) -> None:
    start = random_state(0)
    updates = updates_of(dict(zip(SITES, map(float, sizes), strict=False)))
    expected = oracle(start, updates, [float(size) for size in sizes])
    shuffle.shuffle(updates)
    combined = combined_of(FedAvg(), start, updates, SITES)
    for name, tensor in combined.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 1000), min_size=2, max_size=4))
def test_the_mean_lies_between_the_sites_models(sizes: list[int]) -> None:
    start = random_state(0)
    updates = updates_of(dict(zip(SITES, map(float, sizes), strict=False)))
    combined = combined_of(FedAvg(), start, updates, SITES)
    for name, tensor in combined.items():
        models = torch.stack([start[name] + update.tensors[name] for update in updates])
        assert bool((tensor >= models.amin(dim=0) - 1e-6).all())
        assert bool((tensor <= models.amax(dim=0) + 1e-6).all())


def test_a_site_with_all_the_weight_gives_its_model() -> None:
    start, local = random_state(0), random_state(1)
    update = {name: local[name] - start[name] for name in start}
    others = updates_of({"b": 0.0, "c": 0.0})
    combined = combined_of(FedAvg(), start, [Update("a", update, 5.0), *others], SITES)
    for name in start:
        torch.testing.assert_close(combined[name], local[name], rtol=2**-23, atol=2**-24)


def test_opposite_updates_cancel_and_weights_scale_together() -> None:
    start, change = random_state(0), random_state(1)
    back = {name: -tensor for name, tensor in change.items()}
    same = combined_of(FedAvg(), start, [Update("a", change, 3.0), Update("b", back, 3.0)], SITES)
    assert hash_state(same) == hash_state(start)
    once = combined_of(FedAvg(), start, updates_of({"a": 1.0, "b": 3.0}), SITES)
    twice = combined_of(FedAvg(), start, updates_of({"a": 2.0, "b": 6.0}), SITES)
    assert hash_state(once) == hash_state(twice)


def test_weightings() -> None:
    start, updates = random_state(0), updates_of({"a": 1.0, "b": 9.0})
    fixed = FedAvg(weighting="fixed", weights={"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0})
    for strategy, weights in (
        (FedAvg(), [1.0, 9.0]),
        (FedAvg(weighting="uniform"), [1.0, 1.0]),
        (fixed, [3.0, 1.0]),
    ):
        combined = combined_of(strategy, start, updates, SITES)
        for name, expected in oracle(start, updates, weights).items():
            np.testing.assert_array_equal(combined[name].numpy(), expected)


def test_uniform_is_the_plain_mean_of_the_sites_models_of_feddp() -> None:
    """Pan et al. 2024, eq. 15: theta = 1/C sum theta_c, whatever the sites' sizes."""
    start = random_state(0)
    updates = updates_of({"north": 900.0, "south": 1.0, "west": 30.0})
    models = [{name: start[name] + update.tensors[name] for name in start} for update in updates]
    combined = combined_of(FedAvg(weighting="uniform"), start, updates, ["north", "south", "west"])
    for name, tensor in combined.items():
        expected = sum(model[name].double() for model in models) / 3
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0)


def test_only_sample_weighting_tells_a_sites_size() -> None:
    assert FedAvg().weight("a", 17) == 17.0
    assert FedAvg(weighting="uniform").weight("a", 17) == 1.0
    assert FedAvg(weighting="fixed", weights={"a": 0.5}).weight("a", 17) == 0.5


def test_participants_are_a_seeded_subset_in_site_order() -> None:
    strategy = FedAvg(clients_per_round=2)
    drawn = [strategy.topology.plan(index, SITES, seed=1).trainers for index in range(200)]
    assert drawn == [strategy.topology.plan(index, SITES, seed=1).trainers for index in range(200)]
    assert all(len(chosen) == 2 and list(chosen) == [s for s in SITES if s in chosen] for chosen in drawn)
    # Each site is drawn in half the rounds: 100 of 200, standard deviation 7.
    counts = [sum(site in chosen for chosen in drawn) for site in SITES]
    assert all(65 < count < 135 for count in counts)
    assert drawn != [strategy.topology.plan(index, SITES, seed=2).trainers for index in range(200)]
    # Who is drawn does not depend on the order in which a process lists the sites.
    assert all(set(strategy.topology.plan(i, SITES[::-1], 1).trainers) == set(drawn[i]) for i in range(200))
    assert FedAvg().topology.plan(0, SITES, 1).trainers == tuple(SITES)


def test_where_fewer_sites_are_there_than_a_round_asks_all_are_asked() -> None:
    strategy = FedAvg(clients_per_round=3)
    strategy.check_sites(["a", "b"])
    assert strategy.topology.plan(0, ["a", "b"], seed=1).trainers == ("a", "b")


@pytest.mark.parametrize(
    "arguments",
    [
        {"weighting": "size"},
        {"weighting": "fixed"},
        {"weighting": "uniform", "weights": {"a": 1.0}},
        {"weighting": "fixed", "weights": {"a": 0.0}},
        {"weighting": "fixed", "weights": {"a": -1.0, "b": 2.0}},
        {"weighting": "fixed", "weights": {"a": float("nan")}},
        {"clients_per_round": 0},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with raises_reason("JOB_INVALID", list(arguments)[-1]):
        FedAvg(**arguments)


def test_sites_that_do_not_fit_are_refused() -> None:
    with raises_reason("JOB_INVALID", "weights", " b"):
        FedAvg(weighting="fixed", weights={"a": 1.0}).check_sites(["a", "b"])
    for sites in ([], ["a", "a"]):
        with raises_reason("JOB_INVALID", sites):
            FedAvg().check_sites(sites)
