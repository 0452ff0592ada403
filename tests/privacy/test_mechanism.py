"""Clip and noise on an update: every row of the module's tables, and the sensitivity of the guarantee."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from histoflare.privacy.mechanism import add_noise, clip, l2_norm, noise_at_server, release_update
from histoflare.privacy.noise import CHUNK, SecureNoise, SeededNoise, grid
from tests.refusals import raises_reason

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def update(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (7, 5), "bias": (5,), "scale": (), "none": (0, 3)}
    return {name: (torch.randn(s, generator=generator) * scale).to(dtype) for name, s in shapes.items()}


def exact_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(
        math.fsum(x * x for tensor in tensors.values() for x in tensor.double().flatten().tolist())
    )


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def test_what_is_short_enough_is_not_scaled() -> None:
    tensors = update()
    norm = exact_norm(tensors)
    clipped, found = clip(tensors, norm * 1.0001)
    assert found == pytest.approx(norm, rel=1e-12)
    assert all(torch.equal(clipped[name], tensor) for name, tensor in tensors.items())
    assert all(clipped[name] is not tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_longer_keeps_its_direction(dtype: torch.dtype) -> None:
    tensors = update(dtype=dtype)
    clipped, _ = clip(tensors, 0.25)
    eps = torch.finfo(dtype).eps
    assert 0.25 * (1 - 3 * eps) <= exact_norm(clipped) <= 0.25
    expected = vector(tensors) * 0.25 / exact_norm(tensors)
    torch.testing.assert_close(vector(clipped), expected, rtol=4 * eps, atol=1e-7)
    assert {name: (t.dtype, t.shape) for name, t in clipped.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    clip_norm=st.floats(1e-30, 1e4),
    dtype=st.sampled_from(DTYPES),
)
def test_a_clipped_norm_is_never_above(values: list[float], clip_norm: float, dtype: torch.dtype) -> None:
    clipped, _ = clip({"w": torch.tensor(values).to(dtype)}, clip_norm)
    assert exact_norm(clipped) <= clip_norm


def test_the_norm_is_in_float64_over_all_tensors() -> None:
    # In float32 the ones would be lost beside the 1e4, or their sum stop at 2**24.
    many = {"large": torch.tensor([1e4]), "ones": torch.ones(2**24 + 10)}
    assert l2_norm(many) == pytest.approx(math.sqrt(1e8 + 2**24 + 10), rel=1e-14)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), multiplier=st.floats(0.01, 100))
def test_the_sensitivity_is_the_clip_norm_on_the_grid_too(seed: int, scale: float, multiplier: float) -> None:
    """What is under the noise is on the grid and no longer than C, so that two are 2C apart at most."""
    tensors = update(seed, torch.float64, scale)
    std, step = multiplier * 0.5, grid(multiplier * 0.5)
    released = release_update(tensors, clip_norm=0.5, noise_multiplier=multiplier, noise=SeededNoise(1))
    noise = SeededNoise(1)
    under = {name: released[name] - noise.normal(t.shape, std) for name, t in tensors.items() if t.numel()}
    # Released numbers, noise and what is under it are multiples of the step: nothing of a value's last bits.
    assert bool((vector(under) / step == (vector(under) / step).round()).all())
    assert exact_norm(under) <= 0.5
    expected = vector(tensors) * min(1.0, 0.5 / exact_norm(tensors))
    # Half a step by rounding, and the room that the clip makes for it: (√n)/2 steps of the norm, n = 41.
    assert float((vector(under) - expected).abs().max()) <= 4 * step


def test_the_noise_has_the_standard_deviation_of_the_event() -> None:
    n = CHUNK + 1000
    x = release_update({"w": torch.zeros(n)}, clip_norm=0.5, noise_multiplier=3.0, noise=SeededNoise(0))[
        "w"
    ].numpy()
    assert stats.kstest(x / 1.5, "norm").pvalue > 1e-3
    assert abs(x.std() / 1.5 - 1) < 5 / math.sqrt(2 * n)


def test_noise_is_added_to_the_clipped_update_and_is_the_same_for_one_seed() -> None:
    tensors = update(scale=10.0)
    one, two = (
        release_update(tensors, clip_norm=1.0, noise_multiplier=1e-3, noise=SeededNoise(4)) for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = release_update(tensors, clip_norm=1.0, noise_multiplier=1e-3, noise=SecureNoise())
    assert not torch.equal(vector(one), vector(other))
    clipped, _ = clip(tensors, 1.0)
    assert 0 < float((vector(one) - vector(clipped)).abs().max()) < 6e-3


def test_without_noise_it_is_the_clip() -> None:
    tensors, noise = update(scale=10.0), SeededNoise(0)
    released = release_update(tensors, clip_norm=1.0, noise_multiplier=0.0, noise=noise)
    clipped, _ = clip(tensors, 1.0)
    assert all(torch.equal(released[name], clipped[name]) for name in tensors) and noise.calls == 0


def test_no_tensors_and_empty_ones() -> None:
    for tensors in ({}, {"none": torch.zeros(0)}):
        assert clip(tensors, 1.0)[1] == 0.0
        released = release_update(tensors, clip_norm=1.0, noise_multiplier=1.0, noise=SecureNoise())
        assert {name: t.shape for name, t in released.items()} == {n: t.shape for n, t in tensors.items()}


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.inf, math.nan, 1e-31, 1e31])
def test_a_clip_norm_out_of_range_is_refused(clip_norm: float) -> None:
    for call in (
        lambda: clip(update(), clip_norm),
        lambda: release_update(update(), clip_norm=clip_norm, noise_multiplier=1.0, noise=SecureNoise()),
        lambda: noise_at_server(update(), clip_norm=clip_norm, noise_multiplier=1.0, noise=SecureNoise()),
    ):
        with raises_reason("PRIVACY_INVALID", "clip_norm"):
            call()


@pytest.mark.parametrize("multiplier", [-1.0, math.inf, math.nan, 1e-31, 1e31, 1e9])
def test_a_noise_multiplier_out_of_range_is_refused(multiplier: float) -> None:
    with raises_reason("PRIVACY_INVALID", "noise_multiplier"):
        release_update(update(), clip_norm=1.0, noise_multiplier=multiplier, noise=SecureNoise())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_never_leaves(value: float, dtype: torch.dtype) -> None:
    tensors, noise = update(dtype=dtype), SeededNoise(0)
    tensors["bias"][2] = value
    for multiplier in (0.0, 1.0):
        with raises_reason("NOT_FINITE", "bias", "NaN"):
            release_update(tensors, clip_norm=1.0, noise_multiplier=multiplier, noise=noise)
    with raises_reason("NOT_FINITE", "bias"):
        noise_at_server(tensors, clip_norm=1.0, noise_multiplier=1.0, noise=noise)
    assert noise.calls == 0


def test_a_norm_beyond_float64_is_refused() -> None:
    with raises_reason("NOT_FINITE", "w "):
        clip({"w": torch.tensor([1e200], dtype=torch.float64)}, 1.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_what_is_no_floating_point_number_never_leaves(dtype: torch.dtype) -> None:
    with raises_reason("MODEL_NOT_PRIVATE", "steps", dtype):
        release_update(
            {**update(), "steps": torch.ones(1, dtype=dtype)},
            clip_norm=1.0,
            noise_multiplier=1.0,
            noise=SecureNoise(),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_and_refused_beyond_its_range(dtype: torch.dtype) -> None:
    tensors = update(dtype=dtype)
    half = release_update(tensors, clip_norm=1.0, noise_multiplier=1.0, noise=SeededNoise(3))
    wide = release_update(
        {name: t.double() for name, t in tensors.items()},
        clip_norm=1.0,
        noise_multiplier=1.0,
        noise=SeededNoise(3),
    )
    assert all(torch.equal(half[name], wide[name].to(dtype)) for name in tensors)
    if dtype == torch.float16:
        with raises_reason("NOT_FINITE", torch.float16):
            release_update(tensors, clip_norm=1e5, noise_multiplier=1.0, noise=SeededNoise(3))


def test_the_update_is_left_as_it_is_whatever_its_layout() -> None:
    tensors = {"w": torch.randn(6, 4).T, "p": torch.nn.Parameter(torch.randn(3)), "s": torch.randn(8)[::2]}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    released = release_update(tensors, clip_norm=1e6, noise_multiplier=1e-12, noise=SecureNoise())
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor)
        torch.testing.assert_close(released[name], tensor, atol=1e-4, rtol=0)
        assert not released[name].requires_grad and released[name].is_contiguous()


def test_a_trusted_server_adds_noise_once_to_the_sum() -> None:
    n = 100_000
    total = {"w": torch.full((n,), 40.0, dtype=torch.float64)}
    noised = noise_at_server(total, clip_norm=0.5, noise_multiplier=4.0, noise=SeededNoise(2))["w"]
    assert stats.kstest((noised.numpy() - 40) / 2, "norm").pvalue > 1e-3
    plain = noise_at_server(total, clip_norm=0.5, noise_multiplier=0.0, noise=SeededNoise(2))["w"]
    assert torch.equal(plain, total["w"])


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_noise_of_a_size_out_of_range_is_refused(std: float) -> None:
    with raises_reason("PRIVACY_INVALID", std):
        add_noise(update(), std=std, noise=SecureNoise())
