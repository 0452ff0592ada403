"""One step's gradient: noise of the stated size whatever was drawn, and a divisor that is public."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.dpsgd import PrivateGradient, private_gradient
from histoflare.privacy.noise import SecureNoise, SeededNoise
from histoflare.privacy.requirements import ENGINES
from histoflare.rounds.local import one_thread

from .models import FEATURES, mem_task, only, patients, row_losses, rows

RAGGED = [[5, 1, 3], [2], [9, 9], [1], [4, 4], [6]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def step(batches: list[Any], model: nn.Module | None = None, **changes: Any) -> PrivateGradient:
    task = mem_task()
    numbers = {"clip_norm": 0.5, "noise_multiplier": 1.0, "batch_size": 4.0, "noise": SeededNoise(0)}
    return private_gradient(
        model or task.build_model(), task.record_losses, batches, **{**numbers, **changes}
    )


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def test_an_empty_sample_is_a_step_of_noise() -> None:
    model = nn.Linear(300, 200)
    got = private_gradient(
        model, row_losses, [], clip_norm=0.5, noise_multiplier=3.0, batch_size=10.0, noise=SeededNoise(1)
    )
    assert [(name, t.shape) for name, t in got.tensors.items()] == [
        ("weight", (200, 300)),
        ("bias", (200,)),
    ]
    assert stats.kstest(vector(got.tensors).numpy() / (3.0 * 0.5 / 10), "norm").pvalue > 1e-3
    assert len(got.norms) == len(got.losses) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_the_noise_is_the_same_in_size_whatever_was_drawn(engine: str) -> None:
    model = nn.Linear(FEATURES, 2)
    exact = private_gradient(
        model,
        row_losses,
        [rows()],
        clip_norm=0.5,
        noise_multiplier=0.0,
        batch_size=10.0,
        noise=SecureNoise(),
        engine=engine,
    )
    noise, found = SeededNoise(2), []
    for _ in range(400):
        noised = private_gradient(
            model,
            row_losses,
            [rows()],
            clip_norm=0.5,
            noise_multiplier=2.0,
            batch_size=10.0,
            noise=noise,
            engine=engine,
        )
        found.append((vector(noised.tensors) - vector(exact.tensors)) / 0.1)
    assert stats.kstest(torch.cat(found).numpy(), "norm").pvalue > 1e-3


def test_the_divisor_is_the_public_one_and_not_the_number_drawn() -> None:
    few, many = patients(RAGGED[:1]), patients(RAGGED)
    for batch in (few, many):
        one, other = (step([batch], batch_size=size, noise=SeededNoise(3)) for size in (1.0, 8.0))
        torch.testing.assert_close(vector(one.tensors), 8 * vector(other.tensors), rtol=1e-6, atol=0)


def test_without_noise_and_clip_it_is_the_plain_gradient() -> None:
    batch = patients(RAGGED)
    model = mem_task(reconstruction=0.2).build_model()  # with decoders, which the step's loss does not use
    got = step([batch], model, noise_multiplier=0.0, clip_norm=1e30, batch_size=len(RAGGED))
    mem_task().record_losses(model, batch).mean().backward()
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    torch.testing.assert_close(got.tensors, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_physical_batches_change_rounding_only(engine: str) -> None:
    batch = patients(RAGGED)
    whole = step([batch], engine=engine)
    parts = step([only(batch, [0, 1]), only(batch, [2]), only(batch, [3, 4, 5])], engine=engine)
    torch.testing.assert_close(parts.tensors, whole.tensors, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(parts.losses, whole.losses)


def test_batches_are_asked_for_one_at_a_time() -> None:
    task, batch = mem_task(), patients(RAGGED)
    events: list[str] = []

    def one_by_one() -> Iterator[Any]:
        for p in range(3):
            events.append("made")
            yield only(batch, [p])

    def losses(model: nn.Module, one: Any) -> Tensor:
        events.append("used")
        return task.record_losses(model, one)

    private_gradient(
        task.build_model(),
        losses,
        one_by_one(),
        clip_norm=1.0,
        noise_multiplier=1.0,
        batch_size=3.0,
        noise=SecureNoise(),
    )
    assert events == ["made", "used"] * 3


def test_the_same_source_gives_the_same_bytes() -> None:
    batch = patients(RAGGED)
    one, again, other = (step([batch], noise=SeededNoise(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(one.tensors[name], again.tensors[name]) for name in one.tensors)
    assert not torch.equal(vector(one.tensors), vector(other.tensors))
    secret = [step([batch], noise=SecureNoise()) for _ in range(2)]
    assert not torch.equal(vector(secret[0].tensors), vector(secret[1].tensors))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch_size", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("clip_norm", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("noise_multiplier", value) for value in (-1.0, math.nan, math.inf)),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    noise = SeededNoise(0)
    for batches in ([], [patients(RAGGED)]):
        with pytest.raises(JobError, match=name) as caught:
            step(batches, **{name: value, "noise": noise})
        assert caught.value.reason == "PRIVACY_INVALID"
    assert noise.calls == 0


def test_a_model_that_will_not_do_is_refused_though_nothing_was_drawn() -> None:
    with pytest.raises(JobError, match="BatchNorm1d"):
        step([], nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(JobError, match="no engine"):
        step([], engine="fast")
