"""Fixed point modulo 2**64: sums are exact, and rounded shares of noise protect as well as one Gaussian."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from histoflare.privacy.mechanism import add_noise
from histoflare.privacy.noise import SeededNoise, grid
from histoflare.privacy.secure_sum.hello import MOST_SITES
from histoflare.privacy.secure_sum.ring import LIMIT, PLAIN_STEP, _wrap, add_up, decode, encode, has_room

from ...refusals import raises_reason

STEPS = st.integers(-40, 40).map(lambda bits: 2.0**bits)
INFINITY = math.inf


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(step=STEPS, steps=st.lists(st.integers(-(2**53), 2**53), min_size=1))
def test_multiples_of_the_step_are_exact(step: float, steps: list[int]) -> None:
    values = tensor(*(step * each for each in steps))
    assert encode(values, step).tolist() == steps
    assert torch.equal(decode(encode(values, step), step), values)


@settings(deadline=None)
@given(st.lists(st.floats(-1e5, 1e5), min_size=1), st.floats(0.0, 1.0))
def test_others_are_off_by_half_a_step_at_most(values: list[float], weight: float) -> None:
    found = decode(encode(tensor(*values), PLAIN_STEP, weight=weight, most=LIMIT), PLAIN_STEP)
    assert (found - tensor(*values) * weight).abs().max() <= PLAIN_STEP / 2


@settings(deadline=None)
@given(st.integers(-(2**1000), 2**1000))
def test_what_is_too_large_wraps_around_exactly(number: int) -> None:
    value = float(number)
    expected = (int(value) + 2**63) % 2**64 - 2**63
    assert encode(tensor(value), 1.0).item() == expected


@pytest.mark.parametrize("bits", range(52, 130))
def test_every_power_of_two_and_its_neighbours_wrap_exactly(bits: int) -> None:
    for sign in (1, -1):
        for value in (2.0**bits, math.nextafter(2.0**bits, 0), math.nextafter(2.0**bits, INFINITY)):
            expected = (sign * round(value) + 2**63) % 2**64 - 2**63
            assert encode(tensor(sign * value), 1.0).item() == expected


def test_what_wraps_is_within_the_range_of_int64_before_it_is_one() -> None:
    """Beyond it, what a float becomes depends on the processor."""
    steps = tensor(2.0**63, -(2.0**63), 3 * 2.0**63, 2.0**64, 2.0**63 - 1024)
    _wrap(steps)
    assert steps.tolist() == [-(2.0**63), -(2.0**63), -(2.0**63), 0.0, 2.0**63 - 1024]


@pytest.mark.parametrize("value", [math.nan, INFINITY, -INFINITY])
def test_what_is_no_number_counts_as_zero_where_a_refusal_would_tell(value: float) -> None:
    assert encode(tensor(1.0, value), 0.5).tolist() == [2, 0]


@pytest.mark.parametrize("value", [math.nan, INFINITY, -INFINITY, 2 * LIMIT * PLAIN_STEP, -1e300])
def test_without_protection_it_is_refused(value: float) -> None:
    encode(tensor(LIMIT * PLAIN_STEP, -LIMIT * PLAIN_STEP), PLAIN_STEP, most=LIMIT)
    with raises_reason("UPDATE_OUT_OF_RANGE"):
        encode(tensor(1.0, value), PLAIN_STEP, most=LIMIT)


def test_a_sum_of_as_many_sites_as_there_may_be_does_not_wrap() -> None:
    most = encode(tensor(LIMIT * PLAIN_STEP), PLAIN_STEP, most=LIMIT)
    total = add_up([{"w": -most}] * MOST_SITES)
    assert decode(total["w"], PLAIN_STEP).item() == -MOST_SITES * LIMIT * PLAIN_STEP


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9), st.randoms())
def test_a_sum_is_that_of_whole_numbers_in_any_order(numbers: list[int], shuffle: Any) -> None:
    expected = (sum(numbers) + 2**63) % 2**64 - 2**63
    shuffle.shuffle(numbers)
    vectors = [{"w": torch.tensor([number])} for number in numbers]
    assert add_up(vectors)["w"].item() == expected
    assert vectors[0]["w"].item() == numbers[0], "what was added is left as it is"


def test_shapes_stay_and_any_floating_point_is_taken() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = encode(torch.ones((2, 0, 3), dtype=dtype), 1.0), encode(torch.ones((), dtype=dtype), 0.25)
        assert found[0].shape == (2, 0, 3) and found[1].shape == () and found[1].item() == 4
    many = torch.arange(200_000, dtype=torch.float64)
    assert torch.equal(encode(many.reshape(400, 500), 0.5), (2 * torch.arange(200_000)).reshape(400, 500))


# ---- noise in shares


def rounded_gaussian(deviation: float, reach: int) -> np.ndarray:
    """Return the chance of each k in [-reach, reach] that N(0, deviation²) is rounded to k."""
    edges = np.arange(-reach, reach + 2) - 0.5
    below = norm.cdf(edges[edges <= 0], scale=deviation)
    return np.diff(np.concatenate([below, (1 - below[::-1])]))


def convolved(pmf: np.ndarray, times: int) -> np.ndarray:
    total = pmf
    for _ in range(times - 1):
        total = np.convolve(total, pmf)
    return total


@pytest.mark.parametrize(("deviation", "times"), [(0.7, 2), (0.7, 4), (1.0, 3), (1.0, 15), (1.5, 4)])
def test_the_sum_of_rounded_gaussians_is_a_gaussian_to_which_uniforms_were_added(
    deviation: float, times: int
) -> None:
    """The step of the proof in ``ring``: the density of N' + U_1 + … + U_m at k, by Fourier's integral."""
    reach = math.ceil(9 * deviation)
    pmf = convolved(rounded_gaussian(deviation, reach), times)
    k = np.arange(-(len(pmf) // 2), len(pmf) // 2 + 1)
    t = np.linspace(-40, 40, 400_001)
    transformed = np.exp(-times * (deviation * t) ** 2 / 2) * np.sinc(t / (2 * np.pi)) ** times
    near = np.abs(k) <= 4 * deviation * math.sqrt(times)
    density = [np.trapezoid(transformed * np.cos(t * each), t) / (2 * np.pi) for each in k[near]]
    part = math.exp(-((math.pi * deviation) ** 2))
    assert np.abs(pmf[near] - density).max() < times**2 * part * max(density) + 1e-12


def divergence_from_itself(deviation: float, times: int, order: int) -> float:
    """Return the Rényi divergence of a sum of rounded Gaussians from itself moved by a step.

    As a part of the Gaussian's, which is order / (2 m σ²).
    """
    pmf = convolved(rounded_gaussian(deviation, math.ceil(9 * deviation + order)), times)
    log = np.log(pmf[pmf > 1e-290])  # the rest, far out, adds nothing
    exponent = order * log[1:] + (1 - order) * log[:-1]
    divergence = (exponent.max() + math.log(np.exp(exponent - exponent.max()).sum())) / (order - 1)
    return float(divergence / (order / (2 * times * deviation**2)))


@pytest.mark.parametrize("order", [2, 8, 32])
@pytest.mark.parametrize("deviation", [0.7, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("times", [2, 4, 15])
def test_rounded_shares_protect_no_less_than_one_gaussian(order: int, deviation: float, times: int) -> None:
    assert 0.5 < divergence_from_itself(deviation, times, order) <= 1.0


def test_that_test_sees_shares_that_are_too_coarse() -> None:
    """At 0.4 steps the sum of rounded shares does protect less; the grid's 2**28 are far from it."""
    assert divergence_from_itself(0.4, 4, 32) > 1.0


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    clip=st.floats(1e-3, 1e3),
    multiplier=st.floats(0.1, 1e5),
    sites=st.integers(2, 6),
)
def test_one_record_moves_the_sum_by_the_clip_norm_at_most_whatever_the_number_of_sites(
    seed: int, clip: float, multiplier: float, sites: int
) -> None:
    """One reserve of a step·√d: the record is at one site, and all others' numbers stay as they are."""
    generator = np.random.default_rng(seed)
    size, std = 64, clip * multiplier
    step = grid(std)
    record = generator.normal(size=size)
    record *= (clip - step * math.sqrt(size)) / np.linalg.norm(record)
    sums = [generator.normal(size=size) * clip for _ in range(sites)]

    def opened(first: np.ndarray) -> torch.Tensor:
        vectors = []
        for index, content in enumerate([first, *sums[1:]]):
            noised = add_noise({"w": torch.from_numpy(content)}, std=std, noise=SeededNoise(index))["w"]
            vectors.append({"w": encode(noised, step)})
        return decode(add_up(vectors)["w"], step)

    moved = opened(sums[0] + record) - opened(sums[0])
    assert torch.linalg.vector_norm(moved).item() <= clip * (1 + 1e-12)


@settings(deadline=None)
@given(clip=st.floats(1e-3, 1e3), multiplier=st.floats(1e-2, 1e3), seed=st.integers(0, 2**32))
def test_what_is_noised_on_the_grid_is_encoded_without_another_rounding(
    clip: float, multiplier: float, seed: int
) -> None:
    std = multiplier * clip
    noised = add_noise({"w": torch.full((50,), clip / 3).double()}, std=std, noise=SeededNoise(seed))["w"]
    assert torch.equal(decode(encode(noised, grid(std)), grid(std)), noised)


def test_whether_a_sum_has_room_follows_from_public_numbers() -> None:
    step = grid(4.0)
    assert has_room(step, 1.0, 4.0, sites=64, records=2**20)
    assert not has_room(step, 1.0, 4.0, sites=2, records=2**32), "no float64 holds one site's sum on the grid"
    assert not has_room(grid(1e-6), 1.0, 1e-6, sites=2, records=2**20)
    assert not has_room(2.0**-20, 1.0, 4.0, sites=2**30, records=2**20)
