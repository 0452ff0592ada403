"""Tests of the mechanism on an evaluation's counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from histoflare.privacy.budget import Budget
from histoflare.privacy.noise import SecureNoise, SeededNoise, grid
from histoflare.privacy.plan import DpSgd, Open, UpdateNoise
from histoflare.privacy.spend import Spend
from histoflare.privacy.tally import TALLY, Tally, like_training, on_grid
from tests.refusals import raises_reason

ROWS = arrays(
    np.float64,
    st.tuples(st.integers(0, 6), st.integers(1, 30)),
    elements=st.floats(allow_nan=True, allow_infinity=True),
)


@given(ROWS, st.floats(2**-4, 1e6))
def test_no_row_moves_the_sum_by_more_than_one(rows: np.ndarray, std: float) -> None:
    step = grid(std)
    placed = on_grid(rows, step)
    assert placed.shape == rows.shape
    assert np.array_equal(
        placed, np.round(placed / step) * step
    )  # every value makes the same outcomes possible
    for row in placed:
        assert math.fsum(number * number for number in row.tolist()) <= 1


@given(st.integers(1, 40), st.floats(2**-4, 1e4))
def test_a_row_of_norm_one_is_all_but_kept(length: int, std: float) -> None:
    row = np.full((1, length), 1 / math.sqrt(length))
    assert np.abs(on_grid(row, grid(std)) - row).max() <= 2 * math.sqrt(length) * grid(std)


def test_a_row_that_is_not_finite_counts_as_zeros_and_changes_no_other() -> None:
    rows = np.array([[0.6, 0.8], [np.nan, 0.1], [np.inf, 0.0], [3.0, 4.0]])
    placed = on_grid(rows, grid(1.0))
    assert np.array_equal(placed[1:3], np.zeros((2, 2)))
    assert np.allclose(placed[[0, 3]], [[0.6, 0.8], [0.6, 0.8]], atol=1e-7)


def test_what_leaves_is_the_sum_with_noise_of_the_stated_size() -> None:
    rows = np.zeros((50, 2000))
    rows[:, 0] = 1
    tally = Tally(noise_multiplier=1.5)
    values = tally.release_rows(rows, SecureNoise())[TALLY]
    assert values.dtype == torch.float64
    assert abs(values[0].item() - 50) < 8 * 1.5
    assert 1.5 * 0.9 < values[1:].std().item() < 1.5 * 1.1  # 2000 samples: 6 standard errors


def test_the_same_source_gives_the_same_counts_in_any_order_of_patients() -> None:
    rows = np.random.default_rng(0).random((300, 7)) / 3
    tally = Tally(noise_multiplier=0.7)
    one = tally.release_rows(rows, SeededNoise(3))[TALLY]
    other = tally.release_rows(rows[::-1], SeededNoise(3))[TALLY]
    assert torch.equal(one, other)  # sums on a grid are exact


def test_an_evaluation_costs_a_test_patient_what_the_training_costs_a_trained_one() -> None:
    plan = DpSgd(budget_share=0.25, sample_rate=0.2, batch_size=8).settled(rounds=20, weights=100)
    tally = like_training(plan, 20, 1, 24)
    assert tally is not None
    budget = Budget(8.0, 1e-5)
    share = budget.share_of(budget.cost(tally.spend()))
    assert share <= budget.share_of(budget.cost(plan.spend().times(20))) <= 0.25 * (1 + 1e-9)
    assert share > 0.249
    several = like_training(plan, 20, 4, 24)
    assert several is not None
    assert several.noise_multiplier == pytest.approx(2 * tally.noise_multiplier, rel=1e-3)


def test_an_evaluation_takes_no_more_than_a_whole_budget() -> None:
    tally = like_training(UpdateNoise(noise_multiplier=0.1), 10, 1, 24)  # far more than any budget
    assert tally is not None
    assert Budget(8.0, 1e-5).admits(Budget(8.0, 1e-5).cost(tally.spend()))


def test_nothing_protects_the_evaluation_of_an_unprotected_job() -> None:
    assert like_training(Open(), 10, 1, 24) is None


def test_repeatable_noise_stays_repeatable_and_says_so() -> None:
    plan = UpdateNoise(budget_share=0.5, noise_seed=7).settled(5, 100)
    tally = like_training(plan, 5, 1, 24)
    assert tally is not None and tally.noise_seed == 7


def test_its_event_is_a_gaussian_mechanism_on_all_patients() -> None:
    assert Tally(noise_multiplier=1.5).spend() == Spend(1.5)


@pytest.mark.parametrize("wrong", [{"clip_norm": 2.0}, {"noise_multiplier": 0.0}, {"noise_multiplier": 0.01}])
def test_settings_without_a_guarantee_are_refused(wrong: dict[str, float]) -> None:
    with raises_reason("PRIVACY_INVALID"):
        Tally(**{"noise_multiplier": 1.0, **wrong})


def test_noise_that_leaves_nothing_is_refused() -> None:
    with raises_reason("PRIVACY_INVALID"):
        on_grid(np.zeros((1, 4)), 2.0)


def test_it_trains_nothing() -> None:
    with raises_reason("PRIVACY_INVALID"):
        Tally(noise_multiplier=1.0).train(None)
