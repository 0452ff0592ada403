"""A trial tells what a run's models say, round by round, and what was sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from histoflare.errors import JobError
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import n_bytes
from histoflare.rounds.strategies.cyclic import CyclicWeightTransfer
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.trial import Trial, try_strategy
from tests.refusals import raises_reason

from .toy import ToyTask, toy_table

TASK = ToyTask(hidden=4)
SITES = {"one": toy_table(1), "two": toy_table(2, n=24, shift=0.5), "three": toy_table(3)}
OUTSIDE = toy_table(4)


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvg(share=["body"]), CyclicWeightTransfer()])
def test_every_round_is_tested_with_the_model_that_a_run_so_long_hands_out(strategy) -> None:
    trial = try_strategy(TASK, SITES, strategy, 3, 7, "auc", external=OUTSIDE)
    assert len(trial.rounds) == len(trial.seconds) == 3
    for rounds, served in enumerate(trial.rounds, start=1):
        run = run_in_process(TASK, SITES, strategy, rounds, 7)
        for site, data in SITES.items():
            own = strategy.personalize(run.handed_out, run.site_states[site])
            assert served[site] == evaluate(predict(TASK, own, data, "test"), bootstraps=0)["auc"].value
    shared = strategy.personalize(run.handed_out, {})
    assert trial.external == evaluate(predict(TASK, shared, OUTSIDE, "all"), bootstraps=0)["auc"].value
    assert (3 * trial.bytes_up, 3 * trial.bytes_down) == (run.bytes_up, run.bytes_down)


def test_what_is_sent_is_counted_of_all_sites_in_a_round() -> None:
    weights = n_bytes(TASK.build_model().state_dict())
    star, circle = (
        try_strategy(TASK, SITES, strategy, 3, 0, "accuracy")
        for strategy in (FedAvg(), CyclicWeightTransfer())
    )
    assert (star.bytes_up, star.bytes_down) == (3 * weights, 3 * weights)
    assert (circle.bytes_up, circle.bytes_down) == (weights, weights)


def test_tests_change_nothing() -> None:
    """A model that is asked between two rounds trains as one that is not."""
    task = replace(TASK, dropout=0.5)
    asked: list[dict[str, torch.Tensor]] = []
    plain = run_in_process(task, SITES, FedAvg(), 3, 7)
    run_in_process(task, SITES, FedAvg(), 3, 7, on_model=lambda index, model, kept: asked.append(dict(model)))
    try_strategy(task, SITES, FedAvg(), 3, 7, "auc", on_round=lambda: torch.manual_seed(0) and None)
    assert all(torch.equal(plain.handed_out[name], tensor) for name, tensor in asked[-1].items())


def test_reached_is_the_first_round_of_a_mean_so_good() -> None:
    rounds = tuple({"a": mean - 0.1, "b": mean + 0.1} for mean in (0.5, 0.8, 0.6, 0.9))
    trial = Trial(rounds, None, (1.0, 2.0, 4.0, 8.0), 0.0, 0.0)
    assert [trial.reached(figure) for figure in (0.4, 0.79, 0.85, 0.95)] == [1, 2, 4, None]
    assert [trial.reached(figure, lower_is_better=True) for figure in (0.79, 0.55, 0.3)] == [1, 1, None]
    assert [trial.seconds_until(rounds) for rounds in (1, 3)] == [1.0, 7.0]


def test_a_site_of_one_class_has_no_figure_and_is_left_out() -> None:
    one_class = replace(SITES["two"], y_test=torch.zeros_like(SITES["two"].y_test))
    trial = try_strategy(TASK, {**SITES, "two": one_class}, FedAvg(), 1, 0, "auc")
    assert set(trial.last) == {"one", "three"}
    with raises_reason("NOTHING_TO_EVALUATE"):
        try_strategy(TASK, {"two": one_class}, FedAvg(), 1, 0, "auc")


def test_a_figure_that_there_is_not() -> None:
    with pytest.raises(JobError, match="balanced_accuracy"):
        try_strategy(TASK, SITES, FedAvg(), 1, 0, "brightness")
