from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histoflare.errors import JobError
from histoflare.rounds.bounds import plan_bounds, train_bounds
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategies.fedavg import FedAvg
from tests.refusals import raises_reason

from .toy import Table, ToyTask, toy_sites


def test_a_run_is_its_arguments() -> None:
    task, sites = ToyTask(hidden=4), toy_sites(3)
    runs = [run_in_process(task, sites, FedAvg(), 3, seed) for seed in (0, 0, 1)]
    assert hash_state(runs[0].state) == hash_state(runs[1].state) != hash_state(runs[2].state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert hash_state(runs[0].initial) == hash_state(
        runs[2].initial
    )  # the task's seed makes the model, not the job's


@pytest.mark.parametrize("share", [None, ["body"]])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(share: list[str] | None) -> None:
    task, sites, strategy = ToyTask(hidden=4), toy_sites(3), FedAvg(clients_per_round=2, share=share)
    whole = run_in_process(task, sites, strategy, 6, 0)
    half = run_in_process(task, sites, strategy, 3, 0)
    rest = run_in_process(
        task, sites, strategy, 6, 0, start_round=3, initial_state=half.state, site_states=half.site_states
    )
    assert hash_state(rest.state) == hash_state(whole.state)
    assert rest.participation == whole.participation[3:]
    for site in sites:
        assert hash_state(rest.site_states[site]) == hash_state(whole.site_states[site])


def test_what_a_run_reports() -> None:
    task, sites = ToyTask(), toy_sites(4)
    heard: list[tuple[int, int, float, dict[str, float]]] = []
    result = run_in_process(
        task,
        sites,
        FedAvg(clients_per_round=3),
        5,
        0,
        on_round=lambda index, total, seconds, losses: heard.append((index, total, seconds, dict(losses))),
    )
    assert [(index, total) for index, total, _, _ in heard] == [(i, 5) for i in range(5)]
    assert [losses for *_, losses in heard] == list(result.losses)
    assert [tuple(losses) for losses in result.losses] == list(result.participation)
    assert all(seconds > 0 for seconds in result.seconds)
    # 5 rounds × 3 sites × (2 × 5 weights + 2 biases) × 4 bytes, each way.
    assert result.bytes_up == result.bytes_down == 5 * 3 * 12 * 4


def test_partial_sharing_sends_fewer_bytes() -> None:
    task, sites = ToyTask(hidden=4), toy_sites(2)
    result = run_in_process(task, sites, FedAvg(share=["head"]), 1, 0)
    assert result.bytes_up == 2 * (2 * 4 + 2) * 4


def test_bad_rounds_and_sites_are_refused() -> None:
    with raises_reason("JOB_INVALID", "Round 4 of 3", "start_round"):
        run_in_process(ToyTask(), toy_sites(2), FedAvg(), 3, 0, start_round=4)
    with raises_reason("JOB_INVALID", "[]"):
        run_in_process(ToyTask(), {}, FedAvg(), 3, 0)


def crc_sites(folder: Path, seed: int) -> tuple[dict[str, Table], Table]:
    """Four hospitals of 60 real tiles each, seeing mostly two of eight tissues; one common test set."""
    packed = np.load(folder / "feat_crc5000" / "crc5000_best2.npz")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(packed["y"]))
    x, y = packed["x"][order].astype(np.float64), packed["y"][order].astype(np.int64)
    public = x[1000:1500]  # scaled by tiles that are of no site and of no test
    x = (x - public.mean(axis=0)) / public.std(axis=0)
    test_x, test_y = torch.tensor(x[:1000], dtype=torch.float32), torch.tensor(y[:1000])
    rest_x, rest_y = x[1500:], y[1500:]
    sites = {}
    for site in range(4):
        weight = np.where(rest_y // 2 == site, 1.0, 0.1)
        rows = rng.choice(len(rest_y), size=60, replace=False, p=weight / weight.sum())
        own = torch.tensor(rest_x[rows], dtype=torch.float32), torch.tensor(rest_y[rows])
        sites[f"site_{site}"] = Table(*own, test_x, test_y)
    pooled = Table(
        torch.cat([data.x for data in sites.values()]),
        torch.cat([data.y for data in sites.values()]),
        test_x,
        test_y,
    )
    return sites, pooled


def test_federated_beats_the_mean_of_local_on_real_tiles(test_data: Path) -> None:
    labels = [str(label) for label in range(8)]
    task = ToyTask(features=43, classes=8, learning_rate=0.05, local_epochs=2, labels=labels)
    federated, local, pooled_accuracies = [], [], []
    for seed in range(3):
        sites, pooled = crc_sites(test_data, seed)

        def accuracy(state: State, data: Table = pooled) -> float:
            table = predict(task, state, data, "test")
            return float((table.probabilities.argmax(axis=1) == table.labels).mean())

        federated.append(accuracy(run_in_process(task, sites, FedAvg(), 15, seed).state))
        courses = plan_bounds(task, sites, FedAvg(), 15, seed)
        bounds = train_bounds(task, sites, pooled, courses, FedAvg(), seed)
        assert bounds.pooled is not None
        local.append(np.mean([accuracy(state) for state in bounds.local.values()]))
        pooled_accuracies.append(accuracy(bounds.pooled))
    assert min(np.array(federated) - np.array(local)) > 0.1
    assert np.mean(pooled_accuracies) > np.mean(federated) > 0.5  # chance is 0.125


def test_a_site_that_fails_costs_its_own_updates_only() -> None:
    sites = toy_sites(2)
    full = next(iter(sites.values()))
    empty = {"empty": replace(full, x=full.x[:0], y=full.y[:0])}
    with_it = run_in_process(ToyTask(), {**sites, **empty}, FedAvg(), 2, 1)
    without = run_in_process(ToyTask(), sites, FedAvg(), 2, 1)
    assert hash_state(with_it.state) == hash_state(without.state)
    assert with_it.participation == (tuple(sites),) * 2
    codes = [{site: error.reason for site, error in row.items()} for row in with_it.refused]
    assert codes == [{"empty": "SITE_HAS_NO_TRAINING_DATA"}] * 2
    with pytest.raises(JobError) as caught:
        run_in_process(ToyTask(), empty, FedAvg(), 2, 1)
    assert caught.value.reason == "SITE_HAS_NO_TRAINING_DATA"
    assert run_in_process(ToyTask(), {**sites, **empty}, FedAvg(), 2, 1, least=2).participation
    with raises_reason("JOB_FAILED", "round 1: 2 of at least 3", "\n  empty: "):
        run_in_process(ToyTask(), {**sites, **empty}, FedAvg(), 2, 1, least=3)


def test_in_a_cycle_a_site_that_fails_loses_its_turn() -> None:
    sites = toy_sites(2)
    full = next(iter(sites.values()))
    sites["z"] = replace(full, x=full.x[:0], y=full.y[:0])
    run = run_in_process(ToyTask(), sites, CyclicWeightTransfer(), 3, 1)
    assert [len(row) for row in run.participation] == [1, 1, 0]
    assert hash_state(run.state) == hash_state(
        run_in_process(ToyTask(), sites, CyclicWeightTransfer(), 2, 1).state
    )
