"""The sources of randomness: right in distribution, never twice, and on a grid."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from histoflare.privacy import noise as module
from histoflare.privacy import sampler
from histoflare.privacy.noise import CHUNK, NoiseSource, SecureNoise, SeededNoise, grid, poisson_sample
from tests.refusals import raises_reason

N = 2_000_000
SOURCES: list[Callable[[], NoiseSource]] = [SecureNoise, lambda: SeededNoise(0)]


def test_moments_and_distribution_are_those_of_a_gaussian() -> None:
    x = SeededNoise(1).normal((N,), 1.0).numpy()
    # Each within five standard errors: of the mean 1, variance √2, skewness √6, excess kurtosis √24, by √N.
    for value, error in (
        (x.mean(), 1.0),
        (x.var() - 1, math.sqrt(2)),
        (stats.skew(x), math.sqrt(6)),
        (stats.kurtosis(x), math.sqrt(24)),
    ):
        assert abs(value) < 5 * error / math.sqrt(N)
    assert stats.kstest(x, "norm").pvalue > 1e-4


@pytest.mark.parametrize("bound", [3.0, 4.0, 4.8])
def test_both_tails_have_their_mass(bound: float) -> None:
    x = SeededNoise(2).normal((N,), 1.0).numpy()
    expected = N * stats.norm.sf(bound)
    for count in ((x > bound).sum(), (x < -bound).sum()):
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_neighbours_and_the_two_of_a_pair_are_independent() -> None:
    x = SeededNoise(3).normal((CHUNK,), 1.0).numpy()
    for shift in (1, CHUNK // 2):
        for one in (x, x**2):
            r = np.corrcoef(one[:-shift], one[shift:])[0, 1]
            assert abs(r) < 5 / math.sqrt(CHUNK - shift)


def test_the_extreme_words_give_finite_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(value: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        return lambda stream, words: words.fill_(value)

    monkeypatch.setattr(module, "_fill", filled(1))  # a tail of 9.3 standard deviations, to either side
    x = SeededNoise(0).normal((2,), 1.0)
    assert x[0].item() == pytest.approx(math.sqrt(2 * 63 * math.log(2)), abs=1e-6) and x[1].item() == 0
    monkeypatch.setattr(module, "_fill", filled(-1))  # U and V as good as 1
    assert SeededNoise(0).normal((3,), 1.0).tolist() == [0.0, 0.0, 0.0]
    assert SeededNoise(0).uniform(1).tolist() == [1.0]
    monkeypatch.setattr(module, "_fill", filled(0))  # U = 0 for ever: no random words
    with pytest.raises(RuntimeError, match="not random"):
        SeededNoise(0).normal((2,), 1.0)
    assert SeededNoise(0).uniform(1).tolist() == [2.0**-53]


def real_pair(u: int, v: int, bits: int, scale: float) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return, for both samples, bounds in steps over all real U and V with these first digits."""
    with mpmath.workdps(90):
        one = mpmath.mpf(1)
        radii = [scale * mpmath.sqrt(-2 * mpmath.log((u + end) * one / 2**bits)) for end in (0, 1)]
        angles = [2 * mpmath.pi * (v + end) / 2**bits for end in (0, 1)]
        # Quarter turns are ends of the angle's interval: in it cosine and sine are monotone.
        found = []
        for turn in (mpmath.cos, mpmath.sin):
            values = [radius * turn(angle) for radius in radii for angle in angles]
            found.append((min(values), max(values)))
    return found[0], found[1]


def words_like(kind: str, n: int) -> torch.Tensor:
    """Return n words for U: of all sizes, so near 1 that the radius is tiny, or so small that it is long."""
    generator = np.random.default_rng(7)
    bits = generator.integers(1, 63, n) if kind != "any" else np.full(n, 63)
    words = np.array([int(generator.integers(1, 2**63, dtype=np.uint64)) >> (63 - b) for b in bits.tolist()])
    words = np.maximum(words, 1)
    return torch.from_numpy(2**63 - 1 - words if kind == "small radii" else words)


@pytest.mark.parametrize("kind", ["any", "small radii", "tail"])
@pytest.mark.parametrize("std", [1.0, 1.9])
def test_a_sample_is_the_real_number_rounded(monkeypatch: pytest.MonkeyPatch, kind: str, std: float) -> None:
    n = 800
    us = words_like(kind, n)
    vs = words_like("any", n)
    given = iter([torch.cat([us, vs])])

    def fill(stream: Any, words: torch.Tensor) -> None:
        words.copy_(next(given, torch.full_like(words, 2**62)))  # further digits: the middle

    monkeypatch.setattr(module, "_fill", fill)
    x = (SeededNoise(0).normal((2 * n,), std) / grid(std)).view(2, n)
    decided = 0
    for index, (u, v) in enumerate(zip(us.tolist(), vs.tolist(), strict=True)):
        for got, (low, high) in zip(x[:, index].tolist(), real_pair(u, v, 63, std / grid(std)), strict=True):
            assert mpmath.floor(low + 0.5) <= got <= mpmath.floor(high + 0.5)
            decided += bool(mpmath.floor(low + 0.5) == mpmath.floor(high + 0.5))
    assert decided > (0.9 if kind != "tail" else 0.5) * 2 * n


def test_what_float64_decides_is_what_bounds_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = SeededNoise(3).normal((20_000,), 1.3)
    monkeypatch.setattr(module, "MARGIN", 2.0**-28)  # half a step or more: nothing is left to float64
    calls = []
    exact = module._exact_pair
    monkeypatch.setattr(module, "_exact_pair", lambda *given: calls.append(given) or exact(*given))
    assert torch.equal(SeededNoise(3).normal((20_000,), 1.3), fast) and len(calls) == 10_000


def test_pairs_have_the_probabilities_of_rounded_gaussians() -> None:
    """Over all first digits of U and V, on a grid of one standard deviation.

    What is decided goes to each point with no more than its own probability. So the distance from the ideal
    is at most what is left undecided, and that shrinks with every further digit.
    """
    edges = {k: stats.norm.cdf(k + 0.5) - stats.norm.cdf(k - 0.5) for k in range(-6, 7)}
    left = [1.0]
    for bits in (4, 5, 6, 7):
        mass: dict[tuple[int, int], float] = {}
        for u in range(1, 2**bits):
            for v in range(2**bits):
                pair = module._pair_in(u, v, bits, 1.0)
                if pair is not None:
                    mass[pair] = mass.get(pair, 0.0) + 4.0**-bits
        assert all(found <= edges[i] * edges[j] * (1 + 1e-9) for (i, j), found in mass.items())
        left.append(1 - sum(mass.values()))
        assert left[-1] < 0.85 * left[-2] or bits == 4
    assert left[-1] < 0.6 and len(mass) > 15


def test_a_key_serves_so_few_blocks_that_they_hardly_ever_would_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Exactly, for blocks of b bits: distinct ones are apart from uniform ones by the chance of a repetition.
    for b, blocks in ((4, 5), (8, 20), (16, 300)):
        repeated = 1 - math.prod(1 - i / 2**b for i in range(blocks))
        assert repeated <= blocks**2 / 2 / 2**b
    served: dict[int, int] = {}
    fill = module._fill

    def counting(stream: Any, words: torch.Tensor) -> None:
        served[id(stream)] = served.get(id(stream), 0) + len(words)
        kept.append(stream)
        fill(stream, words)

    kept: list[Any] = []
    monkeypatch.setattr(module, "_fill", counting)
    SecureNoise().normal((3 * CHUNK + 5,), 1.0)
    SecureNoise().uniform(2 * CHUNK + 5)
    assert len(served) == 7
    blocks = max(served.values()) * 8 / 16
    assert blocks <= 2**15.1
    assert blocks**2 / 2 * 2.0**-128 <= sampler.DISTANCE * CHUNK


@pytest.mark.parametrize(("epsilon", "numbers"), [(0.0, 1), (8.0, 96_000_000), (40.0, 10**12), (1.0, 2**80)])
def test_the_samplers_part_of_delta(epsilon: float, numbers: int) -> None:
    with mpmath.workdps(50):
        expected = (1 + mpmath.exp(epsilon)) * mpmath.mpf(2) ** -113 * numbers
    assert sampler.sampler_delta(epsilon, numbers) == pytest.approx(float(expected), rel=1e-9)


def test_the_samplers_part_of_delta_at_its_ends() -> None:
    assert sampler.sampler_delta(math.inf, 1) == sampler.sampler_delta(1e5, 1) == 1.0
    assert sampler.sampler_delta(0.0, 2**200) == 1.0
    assert sampler.sampler_delta(math.inf, 0) == 0.0


def test_uniforms_are_uniform_in_0_to_1_on_53_bits() -> None:
    u = SeededNoise(4).uniform(200_001)
    assert u.dtype == np.float64 and u.shape == (200_001,)
    assert (u > 0).all() and (u <= 1).all() and (u * 2**53 % 1 == 0).all()
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert SecureNoise().uniform(0).shape == (0,)


@pytest.mark.parametrize("std", [1e-30, 0.7, 1.0, 3e5, 1e30])
def test_samples_are_on_the_grid_whose_step_is_a_power_of_two(std: float) -> None:
    step = grid(std)
    assert math.log2(step).is_integer() and std * 2.0**-29 < step <= std * 2.0**-28
    x = SecureNoise().normal((1000,), std)
    assert bool((x / step == (x / step).round()).all()) and len(x.unique()) > 990
    assert 0.8 < float(x.std()) / std < 1.2


def test_float32_is_float64_rounded_once() -> None:
    wide, narrow = (SeededNoise(5).normal((5000,), 2.0, dtype) for dtype in (torch.float64, torch.float32))
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide.float())


@pytest.mark.parametrize("n", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("source", SOURCES)
def test_every_length_is_filled_without_repeating(source: Callable[[], NoiseSource], n: int) -> None:
    x = source().normal((n,), 1.0)
    # Of k samples on 2**30 points some agree by chance: about k²/2**31, that is 8 of the longest.
    assert len(x) == n and len(x.unique()) > n - 60
    assert len(np.unique(source().uniform(n))) == n


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_shapes(source: Callable[[], NoiseSource], shape: tuple[int, ...]) -> None:
    assert source().normal(shape, 1.0).shape == shape
    assert torch.equal(source().normal(shape, 0.0), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("std", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_a_standard_deviation_out_of_range_is_refused(source: Callable[[], NoiseSource], std: float) -> None:
    with raises_reason("PRIVACY_INVALID", std):
        source().normal((0,), std)


def test_another_dtype_is_refused() -> None:
    with raises_reason("PRIVACY_INVALID", "float16"):
        SecureNoise().normal((1,), 1.0, torch.float16)


def fingerprint(source: NoiseSource) -> bytes:
    return source.normal((8,), 1.0).numpy().tobytes() + source.uniform(8).tobytes()


def test_a_secure_source_never_repeats() -> None:
    source = SecureNoise()
    copies = [source, copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(fingerprint, [source] * 20))
    seen = [fingerprint(one) for one in [*copies, *copies, SecureNoise(), SecureNoise()]] + threads
    assert len(set(seen)) == len(seen)
    assert source.secure and not SeededNoise(0).secure


def test_a_forked_child_does_not_repeat_its_parent() -> None:
    source = SecureNoise()
    fingerprint(source)
    children = []
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, fingerprint(source))
            os._exit(0)
        os.close(writing)
        children.append(os.read(reading, 4096))
        os.close(reading)
        os.waitpid(child, 0)
    mine = fingerprint(source)
    assert {len(one) for one in [mine, *children]} == {len(mine)} and len({mine, *children}) == 3


def test_a_seeded_source_repeats_its_calls_and_nothing_else() -> None:
    first, again, other = SeededNoise(7), SeededNoise(7), SeededNoise(8)
    one, two = fingerprint(first), fingerprint(first)
    assert (one, two) == (fingerprint(again), fingerprint(again)) and one != two
    assert fingerprint(other) != one
    assert torch.equal(SeededNoise(7).normal((4, 2), 1.0).view(-1), SeededNoise(7).normal((8,), 1.0))


def test_a_poisson_sample_has_its_rate_and_a_random_size() -> None:
    noise = SeededNoise(9)
    sizes, hits = [], np.zeros(50)
    for _ in range(4000):
        sample = poisson_sample(50, 0.1, noise)
        assert sample.dtype == np.int64 and (np.diff(sample) > 0).all()
        sizes.append(len(sample))
        hits[sample] += 1
    # Sizes are binomial(50, 0.1): mean 5, variance 4.5, and empty with probability 0.9**50.
    assert abs(np.mean(sizes) - 5) < 5 * math.sqrt(4.5 / 4000)
    assert abs(np.var(sizes) - 4.5) < 0.6
    assert abs(sizes.count(0) - 4000 * 0.9**50) < 5 * math.sqrt(4000 * 0.9**50)
    assert abs(hits / 4000 - 0.1).max() < 5 * math.sqrt(0.09 / 4000)


class Extreme(SecureNoise):
    """Draws the largest uniform there is."""

    def uniform(self, n: int) -> NDArray[np.float64]:
        return np.ones(n)


def test_a_poisson_sample_of_all_or_of_none() -> None:
    assert poisson_sample(3, 1.0, Extreme()).tolist() == [0, 1, 2]
    assert poisson_sample(3, math.nextafter(1.0, 0.0), Extreme()).tolist() == []
    assert poisson_sample(100, 1.0, SecureNoise()).tolist() == list(range(100))
    assert poisson_sample(0, 0.5, SecureNoise()).tolist() == []
    assert poisson_sample(1000, 1e-9, SeededNoise(0)).tolist() == []
    for rate in (0.0, -0.1, 1.1, math.nan, math.inf):
        with raises_reason("PRIVACY_INVALID", "sample_rate"):
            poisson_sample(10, rate, SecureNoise())
