"""The paired difference of two models' figures, beside what independent code says of it."""

from __future__ import annotations

import numpy as np
import pytest

from histoflare.bags.targets.classes import Predictions
from histoflare.errors import JobError
from histoflare.rounds.evaluation import evaluate, evaluate_difference


def table(predicted: np.ndarray, labels: np.ndarray) -> Predictions:
    chances = np.stack([1.0 - predicted, predicted], axis=1).astype(float)
    return Predictions(
        chances,
        labels,
        [f"p{index}" for index in range(len(labels))],
        {},
        slides=[f"s{index}" for index in range(len(labels))],
    )


def test_what_two_models_share_does_not_widen_the_interval() -> None:
    """Accuracy differs on 10 of 200 patients: SD of the mean of (0, 1) with share 0.05 (a closed form)."""
    labels = np.arange(200) % 2
    one = labels.copy()
    one[:60] = 1 - one[:60]
    other = one.copy()
    other[60:70] = 1 - other[60:70]
    found = evaluate_difference(table(one, labels), [table(other, labels)], "accuracy")
    assert found.value == pytest.approx(10 / 200)
    sd = (0.05 * 0.95 / 200) ** 0.5
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.15)
    alone = evaluate(table(one, labels))["accuracy"]
    assert alone.low is not None and alone.high is not None
    assert found.high - found.low < 0.6 * (alone.high - alone.low)


def test_the_same_model_twice_differs_by_nothing() -> None:
    labels = np.arange(40) % 2
    same = table(labels, labels)
    found = evaluate_difference(same, [same], "balanced_accuracy")
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_other_patients_are_refused() -> None:
    labels = np.arange(4) % 2
    with pytest.raises(JobError):
        evaluate_difference(table(labels, labels), [table(labels[:2], labels[:2])], "accuracy")
    with pytest.raises(JobError):
        evaluate_difference(table(labels, labels), [], "accuracy")


def test_the_mean_of_several_models_is_what_is_taken_off() -> None:
    """Right on all, and others right on 0.8 and 0.6: 1 - 0.7; the interval is that of the mean's terms."""
    labels = np.arange(200) % 2
    off = []
    for wrong in (slice(0, 40), slice(40, 120)):
        predicted = labels.copy()
        predicted[wrong] = 1 - predicted[wrong]
        off.append(table(predicted, labels))
    found = evaluate_difference(table(labels, labels), off, "accuracy")
    assert found.value == pytest.approx(0.3)
    # each patient's term is 1/2 with share 0.6, else 0
    sd = (0.25 * 0.6 * 0.4 / 200) ** 0.5
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.15)
