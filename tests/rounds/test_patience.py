"""A run ends when a released figure has not risen for long, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.patience import Patience, validate
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state
from histoflare.rounds.strategies.fedavg import FedAvg
from tests.refusals import raises_reason

from .toy import ToyTask, toy_sites


def test_it_waits_for_a_new_best_and_counts_rounds_that_all_spoke_in() -> None:
    patience = Patience("auc", rounds=2)
    heard = [[0.5, 0.7], [0.9, None], [], [0.6, 0.6], [0.7, 0.7], [0.7, 0.7], [0.6, 0.6]]
    found = []
    for index, values in enumerate(heard):
        is_best = patience.hear(index, values)
        found.append((is_best, patience.waited, patience.is_over))
    assert found == [
        (True, 0, False),
        (False, 0, False),  # one site did not say
        (False, 0, False),
        (False, 1, False),  # as good is not better
        (True, 0, False),
        (False, 1, False),
        (False, 2, True),
    ]
    said = {"metric": "validation/auc", "patience": 2, "best": 0.7, "best_round": 4}
    assert patience.to_json() == said


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.randoms())
def test_the_order_of_arrival_does_not_matter(values: list[float], order: Any) -> None:
    one, other = Patience("auc", 1), Patience("auc", 1)
    one.hear(0, values)
    order.shuffle(values)
    assert not other.hear(0, values) or not one.hear(1, values)
    assert one.best == other.best


def test_without_a_limit_it_never_ends() -> None:
    patience = Patience("auc")
    for index in range(100):
        patience.hear(index, [0.5])
    assert not patience.is_over and patience.best_round == 0


def test_a_run_ends_with_the_round_in_which_it_is_over() -> None:
    """The same rounds as one of so many, to the last bit: what ended it changed nothing before."""
    task, sites = ToyTask(learning_rate=1e-6), toy_sites(3)
    run = run_in_process(task, sites, FedAvg(), 20, 0, patience=Patience("auc", 3))
    assert run.patience is not None and run.patience.best_round == 0 and len(run.patience.means) == 4
    assert len(run.participation) == len(run.losses) == 4
    assert hash_state(run.state) == hash_state(run_in_process(task, sites, FedAvg(), 4, 0).state)
    whole = run_in_process(task, sites, FedAvg(), 4, 0, patience=Patience("auc", 3))
    assert len(whole.participation) == 4
    never = run_in_process(ToyTask(), sites, FedAvg(), 4, 0, patience=Patience("auc", 50))
    assert never.patience is not None and not never.patience.is_over and len(never.participation) == 4


def test_the_figure_is_of_the_model_as_it_came() -> None:
    task, sites = ToyTask(), toy_sites(1)
    run = run_in_process(task, sites, FedAvg(), 1, 0)
    (data,) = sites.values()
    value = validate(task, FedAvg(), run.state, {}, data, "auc")
    assert value == evaluate(predict(task, run.state, data, "validation"), bootstraps=0)["auc"].value
    nobody = replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])
    assert validate(task, FedAvg(), run.state, {}, nobody, "auc") is None
    with raises_reason("JOB_INVALID", "'auroc'", "accuracy, balanced_accuracy, auc"):
        run_in_process(task, toy_sites(2), FedAvg(), 1, 0, patience=Patience("auroc", 3))


@pytest.mark.parametrize("rounds", [1, 2])
def test_patience_is_rounds_without_a_new_best(rounds: int) -> None:
    patience = Patience("auc", rounds)
    ended = next(index for index in range(9) if patience.hear(index, [0.5]) is None or patience.is_over)
    assert ended == rounds
