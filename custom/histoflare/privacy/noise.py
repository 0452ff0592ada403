"""Where the randomness of a mechanism comes from: Gaussian noise and the uniforms of a Poisson sample.

Both must be secret: whoever can predict the noise subtracts it, and whoever can predict the sample knows
which steps a patient was in. :class:`SecureNoise` is therefore the source of every mechanism;
:class:`SeededNoise` runs the same algorithm under a key that anybody can derive, for research and tests.

Floating point. A float is not a real number, so a float sample is not a Gaussian one, and a guarantee that
was proved for real numbers can be lost in the last bits: of all floats only some can come out of a sampler,
and which ones are left after the value was added tells the value (Mironov, CCS 2012; for Box–Muller:
Holohan & Braghin, ESORICS 2021). What is done about it:

- A mechanism rounds its value to :func:`grid`, a power of two near 2**-28 standard deviations, and adds noise
  on the same grid in float64, where the sum is exact. So every value makes the same outcomes possible. Only
  then is the sum rounded to the tensor's dtype: once, and after the mechanism, where nothing can be lost.
- The noise is a Gaussian of real numbers, rounded to the grid: no approximation of one. Value + rounded
  Gaussian = rounded (value + Gaussian), since the value is on the grid: what leaves is the ideal mechanism's
  outcome, rounded, and has its guarantee.

How a sample is exact. Box-Muller turns two real uniforms into x = K √(-2 ln U) cos(2πV), in steps of the
grid, with K = std/step in [2**28, 2**29). Of U and V the first 63 binary digits are drawn; x is computed in
float64, and its error bounded. Only where a whole number + ½ is nearer to x than the error may the rounding
go either way: there x is computed anew, with bounds, and further digits of U and V are drawn until both
bounds round to one number (with probability 1 they do). So every sample is the rounding of the real x,
whatever digits were not looked at. That takes some 10 to 20 pairs of a million.

The bound on float64's error, with u = 2**-53, r the radius, and log, cos and sin right to 2 units in the last
place (SLEEF, which torch uses, states 1): U, taken in the middle of its digits not drawn, is off by a
relative 2u + 2**-64/U; its log by 2u + 2**-64/U + 4u |ln U|; r by (2u + 2**-64/U)/r + 4u r; K r by a relative
2u more; the angle by 3u · 2π and so the cosine by 23u. Together less than K (2u/r + 30u r + 2**-64/(U r)),
which is below K · 2**-48 (r + (1 + 2**-16/U)/r). The margin is twice that. Small radii, where ln U loses its
digits, are found by it (all below 2**-18), and so is the farthest tail, where U has few.

What is left is the keystream. Taking AES-256 under a random key for a random permutation, as everybody does,
its blocks never repeat, and those of uniform bits might: the two are apart (total variation) by less than
B²/2 · 2**-128 for B blocks. A key serves one call and at most :data:`CHUNK` numbers, for which B < 2**15.1:
2**-98.8, or less than ``sampler.DISTANCE`` for each number drawn. It enters δ as (1 + e^ε) · DISTANCE ·
numbers (:mod:`histoflare.privacy.sampler`), and every plan counts it.

A Poisson sample's rate is the given one rounded down to a multiple of 2**-53: never above, and costs nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from mpmath.ctx_mp import MPContext
from numpy.typing import NDArray
from torch import Tensor

from histoflare.errors import JobError

GRID_BITS = 28
"""A grid's step is the power of two at or just below std · 2**-28."""

CHUNK = 2**16
"""Samples drawn at once, with all that goes with them some 2 MiB: they stay in a core's cache."""

MARGIN = 2.0**-47
"""Samples nearer to a rounding boundary than K · MARGIN · (r + (1 + 2**-16/U)/r) are computed anew."""

_ZEROS = bytes(8 * CHUNK)
_WORD_BITS = 63
_MOST_WORDS = 16  # of a uniform: of 2**900 samples, not one needs them all
_SMALLEST = 1e-60  # of a squared radius: the reciprocal stays finite, and the margin far above a step


class NoiseSource(Protocol):
    """Gives independent samples; none of them is ever given twice."""

    @property
    def secure(self) -> bool:
        """Whether nobody can predict it. A guarantee holds only if it is true."""

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return samples of N(0, std²) on ``grid(std)``, rounded to ``dtype`` at the end.

        Args:
            shape: Of the result; may be empty or hold a 0.
            std: Standard deviation, finite and at least 0; 0 gives zeros.
            dtype: float64 or float32.

        Raises:
            JobError: ``std`` is negative, infinite or NaN, or another dtype (PRIVACY_INVALID).
        """

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return ``n`` samples in (0, 1], each of them a multiple of 2**-53."""


class SecureNoise:
    """Noise from a cipher's keystream (AES-256 in counter mode), under new keys of the system for each call.

    A key serves at most CHUNK numbers of one call and is then forgotten. So there is no state that a copy, a
    fork, a second thread or a restored machine could repeat, and what is read from memory later tells nothing
    of earlier noise.
    """

    secure = True

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        return _normal(lambda: os.urandom(32), shape, std, dtype)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """See :meth:`NoiseSource.uniform`."""
        return _uniform(lambda: os.urandom(32), n)


class SeededNoise:
    """The same algorithm with keys derived from a seed and how many came before: no protection at all.

    The same calls in the same order give the same bytes in every process; a copy and a forked process repeat
    them.
    """

    secure = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls = 0

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        return _normal(self._key, shape, std, dtype)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """See :meth:`NoiseSource.uniform`."""
        return _uniform(self._key, n)

    def _key(self) -> bytes:
        self.calls += 1
        return hashlib.sha256(f"histoflare noise {self.seed} {self.calls}".encode()).digest()


def grid(std: float) -> float:
    """Return the step of the grid for noise of ``std`` > 0, the power of two in (std·2**-29, std·2**-28]."""
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)


def poisson_sample(n: int, sample_rate: float, noise: NoiseSource) -> NDArray[np.int64]:
    """Return the indices in [0, n), ascending, of a Poisson sample: each is in it with ``sample_rate``.

    The sample is as secret as the noise, and its size is random: it may be empty, and it may be all. At a
    ``sample_rate`` of 1 it is always all. A rate is met to within 2**-53.

    Raises:
        JobError: ``sample_rate`` is not in (0, 1] (PRIVACY_INVALID).
    """
    if not 0 < sample_rate <= 1:
        raise JobError(
            f"sample_rate must be above 0 and at most 1, not {sample_rate!r}.", reason="PRIVACY_INVALID"
        )
    return np.flatnonzero(noise.uniform(n) <= sample_rate).astype(np.int64)


def _normal(new_key: Callable[[], bytes], shape: Sequence[int], std: float, dtype: torch.dtype) -> Tensor:
    if not (math.isfinite(std) and std >= 0):
        raise JobError(
            f"The noise's standard deviation must be a finite number of at least 0, not {std!r}.",
            reason="PRIVACY_INVALID",
        )
    if dtype not in (torch.float32, torch.float64):
        raise JobError(f"Noise is float32 or float64, not {dtype}.", reason="PRIVACY_INVALID")
    if std == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    out = torch.empty(tuple(shape), dtype=dtype)
    for piece in torch.split(out.view(-1), CHUNK):
        piece.copy_(_box_muller(_cipher(new_key()), len(piece), std))
    return out


class _Workspace(threading.local):
    """Memory of each thread to draw in: to ask the system for it each time takes as long as to draw."""

    def __init__(self) -> None:
        self.words = torch.empty(CHUNK, dtype=torch.int64)
        self.numbers = torch.empty(CHUNK, dtype=torch.float64)
        self.samples = torch.empty(CHUNK, dtype=torch.float64)
        self.rounded = torch.empty(CHUNK, dtype=torch.float64)
        self.real = MPContext()  # mpmath's own has one precision for all threads


_workspace = _Workspace()


def _box_muller(stream: CipherContext, n: int, std: float) -> Tensor:
    """Return ``n`` <= CHUNK float64 samples on ``grid(std)`` from the next words of ``stream``.

    They are in the thread's workspace: copy them before the next call.
    """
    half = (n + 1) // 2
    words = _workspace.words[: 2 * half]
    _fill(stream, words)
    numbers = _workspace.numbers[: 2 * half].copy_(words.bitwise_and_(2**_WORD_BITS - 1))  # in [0, 2**63)
    uniform, angle = numbers.view(2, half)
    uniform.add_(0.5).mul_(2.0**-_WORD_BITS)  # U, in (0, 1]
    angle.mul_(2 * math.pi * 2.0**-_WORD_BITS)
    step = grid(std)
    scale = std / step  # exact: a step is a power of two
    margin = uniform.reciprocal().mul_(2.0**-16).add_(1.0)  # (half,)
    radius = uniform.log_().mul_(-2.0).clamp_(min=_SMALLEST).sqrt_()  # (half,), in standard deviations
    margin.div_(radius).add_(radius).mul_(scale * MARGIN)  # in steps
    samples = _workspace.samples[: 2 * half].view(2, half)
    torch.cos(angle, out=samples[0])
    torch.sin(angle, out=samples[1])
    samples.mul_(radius.mul_(scale))
    rounded = torch.round(samples, out=_workspace.rounded[: 2 * half].view(2, half))
    unsure = samples.sub_(rounded).abs_().add_(margin).amax(dim=0) >= 0.5
    for pair in unsure.nonzero().flatten().tolist():
        u, v = words.view(2, half)[:, pair].tolist()
        rounded[:, pair] = torch.tensor(_exact_pair(stream, u, v, scale))
    return rounded.mul_(step).view(-1)[:n]


def _exact_pair(stream: CipherContext, u: int, v: int, scale: float) -> tuple[int, int]:
    """Return the two samples of a pair in steps of the grid, each the rounding of its real number.

    Args:
        stream: Where further digits come from.
        u, v: The first digits of U and V. scale: K.
    """
    bits = _WORD_BITS
    more = torch.empty(2, dtype=torch.int64)
    for _ in range(_MOST_WORDS):
        found = _pair_in(u, v, bits, scale) if u > 0 else None
        if found is not None:
            return found
        _fill(stream, more)
        further = more.bitwise_and(2**_WORD_BITS - 1).tolist()
        u, v = (u << _WORD_BITS) + further[0], (v << _WORD_BITS) + further[1]
        bits += _WORD_BITS
    raise RuntimeError("The keystream of the noise is not random; nothing was drawn.")


def _pair_in(u: int, v: int, bits: int, scale: float) -> tuple[int, int] | None:
    """Return both samples if all of U in [u, u + 1]·2**-bits and V likewise give the same; None if not."""
    real = _workspace.real
    real.prec = 2 * bits + 64
    shortest, longest = (
        scale * real.sqrt(-2 * real.log(real.ldexp(real.mpf(end), -bits))) for end in (u + 1, u)
    )
    angle = 2 * real.pi * real.ldexp(real.mpf(v), -bits)
    # The angle is up to 2π·2**-bits more, and a function's last bits are wrong.
    slack = longest * real.ldexp(real.mpf(7), -bits)
    found = []
    for cosine in (real.cos(angle), real.sin(angle)):
        ends = sorted((shortest * cosine, longest * cosine))
        low, high = (int(real.floor(end + 0.5)) for end in (ends[0] - slack, ends[1] + slack))
        if low != high:
            return None
        found.append(low)
    return found[0], found[1]


def _uniform(new_key: Callable[[], bytes], n: int) -> NDArray[np.float64]:
    words = torch.empty(n, dtype=torch.int64)
    for piece in torch.split(words, CHUNK):
        _fill(_cipher(new_key()), piece)
    return ((words.numpy().view(np.uint64) >> np.uint64(11)) + np.float64(1.0)) * np.float64(2.0**-53)


def _cipher(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _fill(stream: CipherContext, words: Tensor) -> None:
    """Fill int64 ``words`` with the next bytes of the keystream."""
    stream.update_into(memoryview(_ZEROS)[: 8 * len(words)], words.numpy().view(np.uint8).data)
