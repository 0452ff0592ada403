"""One step's gradient: noise of the stated size whatever was drawn, and a divisor that is public."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.dpsgd import PrivateGradient, private_gradient
from histoflare.privacy.noise import SecureNoise, SeededNoise, grid
from histoflare.rounds.local import one_thread
from tests.refusals import raises_reason

from .models import FEATURES, mem_task, one_by_one, only, patients, row_losses, rows, single_rows

RAGGED = [[5, 1, 3], [2], [9, 9], [1], [4, 4], [6]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def step(records: list[Any], model: nn.Module | None = None, **changes: Any) -> PrivateGradient:
    task = mem_task()
    numbers = {"clip_norm": 0.5, "noise_multiplier": 1.0, "batch_size": 4.0, "noise": SeededNoise(0)}
    return private_gradient(
        model or task.build_model(), task.record_losses, records, **{**numbers, **changes}
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


def test_the_noise_is_the_same_in_size_whatever_was_drawn() -> None:
    model = nn.Linear(FEATURES, 2)
    exact = private_gradient(
        model,
        row_losses,
        single_rows(rows()),
        clip_norm=0.5,
        noise_multiplier=0.0,
        batch_size=10.0,
        noise=SecureNoise(),
    )
    noise, found = SeededNoise(2), []
    for _ in range(400):
        noised = private_gradient(
            model,
            row_losses,
            single_rows(rows()),
            clip_norm=0.5,
            noise_multiplier=2.0,
            batch_size=10.0,
            noise=noise,
        )
        found.append((vector(noised.tensors) - vector(exact.tensors)) / 0.1)
    assert stats.kstest(torch.cat(found).numpy(), "norm").pvalue > 1e-3


def test_the_divisor_is_the_public_one_and_not_the_number_drawn() -> None:
    few, many = patients(RAGGED[:1]), patients(RAGGED)
    for batch in (few, many):
        one, other = (step(one_by_one(batch), batch_size=size, noise=SeededNoise(3)) for size in (1.0, 8.0))
        torch.testing.assert_close(vector(one.tensors), 8 * vector(other.tensors), rtol=1e-6, atol=0)


def test_without_noise_and_clip_it_is_the_plain_gradient() -> None:
    batch = patients(RAGGED)
    model = mem_task(reconstruction=0.2).build_model()  # with decoders, which the step's loss does not use
    got = step(one_by_one(batch), model, noise_multiplier=0.0, clip_norm=1e30, batch_size=len(RAGGED))
    mem_task().record_losses(model, batch).mean().backward()
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    torch.testing.assert_close(got.tensors, expected, rtol=1e-4, atol=1e-7)


def test_more_than_one_record_at_a_time_is_refused() -> None:
    noise = SeededNoise(0)
    with raises_reason("MODEL_NOT_PRIVATE", f" {len(RAGGED)} records") as caught:
        step([patients(RAGGED)], noise=noise)
    assert caught.value.reason == "MODEL_NOT_PRIVATE" and noise.calls == 0


def test_records_are_asked_for_one_at_a_time() -> None:
    task, batch = mem_task(), patients(RAGGED)
    events: list[str] = []

    def made() -> Iterator[Any]:
        for p in range(3):
            events.append("made")
            yield only(batch, [p])

    def losses(model: nn.Module, one: Any) -> Tensor:
        events.append("used")
        return task.record_losses(model, one)

    private_gradient(
        task.build_model(),
        losses,
        made(),
        clip_norm=1.0,
        noise_multiplier=1.0,
        batch_size=3.0,
        noise=SecureNoise(),
    )
    assert events == ["made", "used"] * 3


def test_the_same_source_gives_the_same_bytes() -> None:
    batch = patients(RAGGED)
    one, again, other = (step(one_by_one(batch), noise=SeededNoise(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(one.tensors[name], again.tensors[name]) for name in one.tensors)
    assert not torch.equal(vector(one.tensors), vector(other.tensors))
    secret = [step(one_by_one(batch), noise=SecureNoise()) for _ in range(2)]
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
    for records in ([], one_by_one(patients(RAGGED))):
        with raises_reason("PRIVACY_INVALID", name, value):
            step(records, **{name: value, "noise": noise})
    assert noise.calls == 0


def test_a_model_that_will_not_do_is_refused_though_nothing_was_drawn() -> None:
    with raises_reason("MODEL_NOT_PRIVATE", "BatchNorm1d"):
        step([], nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_a_record_that_is_not_finite_is_as_if_it_was_not_there() -> None:
    model, singles = nn.Linear(FEATURES, 2), single_rows(rows())
    for bad in (math.nan, math.inf, -math.inf):
        broken = (torch.full((1, FEATURES), bad), torch.tensor([0]))
        without, got = (
            private_gradient(
                model,
                row_losses,
                drawn,
                clip_norm=0.5,
                noise_multiplier=1.0,
                batch_size=4.0,
                noise=SeededNoise(0),
            )
            for drawn in (singles, [*singles[:2], broken, *singles[2:]])
        )
        assert all(torch.equal(got.tensors[name], without.tensors[name]) for name in without.tensors)
        assert got.norms.isfinite().tolist() == [True, True, False, True, True, True]


class Nothing:
    """A source whose noise is 0, which leaves the sum on the noise's grid."""

    secure = False

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def uniform(self, n: int) -> NDArray[np.float64]:
        return np.ones(n)


def row_sums(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum(dim=1)  # type: ignore[no-any-return]


def test_rounding_to_the_grid_of_large_noise_is_within_the_clip_norm() -> None:
    # 2**16 numbers, a grid of 2**-12, and a clip norm of 23.2 steps in each number. One record leaves the sum
    # just below half a step; clipped to the clip norm, a second would go on top to 24 steps: 1.03 C.
    clip_norm, noise_multiplier, n = 1.45, 2.0**16, 2**16
    step_of_grid = grid(noise_multiplier * clip_norm)
    assert step_of_grid == 2.0**-12
    small, large = torch.full((1, n), 0.49 * step_of_grid), torch.ones((1, n))
    sums = [
        private_gradient(
            nn.Linear(n, 1, bias=False),
            row_sums,
            drawn,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            batch_size=1.0,
            noise=Nothing(),
        ).tensors["weight"]
        for drawn in ([small], [small, large])
    ]
    moved = float((sums[1].double() - sums[0].double()).norm())
    assert 0.9 * clip_norm < moved <= clip_norm


def test_noise_so_large_that_rounding_leaves_nothing_is_refused() -> None:
    noise = SeededNoise(0)
    for multiplier, refused in ((2.0**20, True), (2.0**19, False)):  # 2**-28 · z · √(2**16) is 1 and 1/2
        try:
            private_gradient(
                nn.Linear(2**16, 1, bias=False),
                row_sums,
                [],
                clip_norm=1.0,
                noise_multiplier=multiplier,
                batch_size=1.0,
                noise=noise,
            )
        except JobError as error:
            assert refused and error.reason == "PRIVACY_INVALID" and "nothing of 65536" in str(error)
        else:
            assert not refused


def test_a_result_that_float32_cannot_hold_is_infinite_and_no_error() -> None:
    got = private_gradient(
        nn.Linear(3, 2),
        row_losses,
        [],
        clip_norm=1e30,
        noise_multiplier=1.0,
        batch_size=1e-20,
        noise=SeededNoise(0),
    )
    assert {t.dtype for t in got.tensors.values()} == {torch.float32}
    assert not bool(vector(got.tensors).isfinite().all())
