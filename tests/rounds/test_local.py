from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from histoflare.errors import JobError
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.state import hash_state, model_state
from tests.refusals import raises_reason

from .throwaway import Pushing
from .toy import ToyTask, toy_table

TASK = ToyTask(hidden=6, dropout=0.5, batch_norm=True)


def test_same_seed_same_bytes_and_another_seed_differs() -> None:
    state = model_state(TASK.build_model())
    data = toy_table(1)
    first, again, other = (train_locally(TASK, state, data, seed=seed) for seed in (3, 3, 4))
    assert hash_state(first.state) == hash_state(again.state)
    assert first == replace(again, state=first.state)
    assert hash_state(first.state) != hash_state(other.state)


def test_nothing_global_is_disturbed() -> None:
    state = model_state(TASK.build_model())
    before, threads = hash_state(state), torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        train_locally(TASK, state, toy_table(1), seed=0)
        predict(TASK, state, toy_table(1), "test")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.rand(3), expected)
    assert hash_state(state) == before


def test_threads_are_put_back_when_training_fails() -> None:
    state, bad = model_state(ToyTask().build_model()), toy_table(1)
    bad.x.fill_(float("nan"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(JobError):
            train_locally(ToyTask(), state, bad, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_one_full_batch_step_is_gradient_descent() -> None:
    # Softmax regression from zero weights: dL/dW = Σ (p - onehot) xᵀ / n with p = 1/2, by hand.
    data = toy_table(2, n=10)
    task = ToyTask(batch_size=10, learning_rate=0.3)
    state = {name: torch.zeros_like(tensor) for name, tensor in model_state(task.build_model()).items()}
    result = train_locally(task, state, data, seed=0)
    residual = 0.5 - np.eye(2)[data.y.numpy()]
    gradient = residual.T @ data.x.numpy().astype(np.float64) / 10
    np.testing.assert_allclose(result.state["head.weight"].numpy(), -0.3 * gradient, rtol=1e-5, atol=1e-7)
    assert (result.n_samples, result.n_steps) == (10, 1)
    assert result.mean_loss == pytest.approx(np.log(2))


def test_a_hook_adds_to_the_gradient() -> None:
    # With the term c the step is lr·(g + c): the difference of two one-step runs is -lr·c.
    data, task = toy_table(2, n=10), ToyTask(batch_size=10, learning_rate=0.5)
    state = model_state(task.build_model())
    plain = train_locally(task, state, data, seed=0).state
    pushed = train_locally(task, state, data, seed=0, hook=Pushing(2.0)).state
    for name in plain:
        torch.testing.assert_close(pushed[name] - plain[name], torch.full_like(plain[name], -1.0))


def test_steps_follow_the_local_epochs() -> None:
    task = ToyTask(batch_size=8, local_epochs=3)
    result = train_locally(task, model_state(task.build_model()), toy_table(0, n=20), seed=0)
    assert result.n_steps == 3 * 3  # ⌈20 / 8⌉ batches an epoch


def test_no_training_data_and_divergence_are_errors() -> None:
    state = model_state(ToyTask().build_model())
    with raises_reason("SITE_HAS_NO_TRAINING_DATA", "'train'"):
        train_locally(ToyTask(), state, toy_table(0, n=0), seed=0)
    bad = toy_table(0)
    bad.x[0, 0] = float("nan")
    with raises_reason("TRAINING_FAILED", "nan"):
        train_locally(ToyTask(), state, bad, seed=0)


def test_predict_is_in_evaluation_mode() -> None:
    task = ToyTask(hidden=6, dropout=0.9)
    state = model_state(task.build_model())
    first, again = (predict(task, state, toy_table(0), "test").probabilities for _ in range(2))
    np.testing.assert_array_equal(first, again)
    # Dropout off: the same numbers as the model without dropout.
    plain = predict(ToyTask(hidden=6), state, toy_table(0), "test").probabilities
    np.testing.assert_array_equal(first, plain)
