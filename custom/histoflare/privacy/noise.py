"""Where the randomness of a mechanism comes from: Gaussian noise and the uniforms of a Poisson sample.

Both must be secret: whoever can predict the noise subtracts it, and whoever can predict the sample knows
which steps a patient was in. :class:`SecureNoise` is therefore the source of every mechanism;
:class:`SeededNoise` runs the same algorithm under a key that anybody can derive, for research and tests.

Floating point. A float is not a real number, so a float sample is not a Gaussian one, and a guarantee that
was proved for real numbers can be lost in the last bits: of all floats only some can come out of a sampler,
and which ones are left after the value was added tells the value (Mironov, CCS 2012; for Box–Muller:
Holohan & Braghin, ESORICS 2021). What is done about it:

- A sample is drawn in float64 and rounded to :func:`grid`, a power of two near 2**-28 standard deviations; a
  mechanism rounds its value to the same grid and adds the two in float64, where their sum is exact. So every
  value makes the same outcomes possible. Only then is the sum rounded to the tensor's dtype: once, and after
  the mechanism, where nothing can be lost any more.
- What is left is a difference in probability. The radius comes from a uniform of 126 bits, so a tail of 13
  standard deviations is drawn as finely as the rest; what a float64 cannot resolve are the smallest radii,
  below some 2**-24. The distance (total variation) of n samples from rounded Gaussian ones is so about
  n·2**-50: for 55 million it adds 5e-8 to δ.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from histoflare.errors import JobError

GRID_BITS = 28
"""A grid's step is the power of two at or just below std · 2**-28."""

CHUNK = 2**16
"""Samples drawn at once, with all that goes with them some 2 MiB: they stay in a core's cache."""

_ZEROS = bytes(8 * 3 * (CHUNK // 2))
_WORD_BITS = 2**63 - 1


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
    """Noise from a cipher's keystream (AES-256 in counter mode), under a new key of the system for each call.

    A key serves one call and is then forgotten. So there is no state that a copy, a fork, a second thread or
    a restored machine could repeat, and what is read from memory later tells nothing of earlier noise.
    """

    secure = True

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        return _normal(os.urandom(32), shape, std, dtype)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """See :meth:`NoiseSource.uniform`."""
        return _uniform(os.urandom(32), n)


class SeededNoise:
    """The same algorithm with keys derived from a seed and the number of the call: no protection at all.

    The same calls in the same order give the same bytes in every process; a copy and a forked process repeat
    them.
    """

    secure = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls = 0

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """See :meth:`NoiseSource.normal`."""
        return _normal(self._key(), shape, std, dtype)

    def uniform(self, n: int) -> NDArray[np.float64]:
        """See :meth:`NoiseSource.uniform`."""
        return _uniform(self._key(), n)

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


def _normal(key: bytes, shape: Sequence[int], std: float, dtype: torch.dtype) -> Tensor:
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
    stream, flat = _cipher(key), out.view(-1)
    for start in range(0, len(flat), CHUNK):
        piece = flat[start : start + CHUNK]
        piece.copy_(_box_muller(stream, len(piece), std))
    return out


class _Workspace(threading.local):
    """Memory of each thread to draw in: to ask the system for it each time takes as long as to draw."""

    def __init__(self) -> None:
        self.words = torch.empty(3 * CHUNK // 2, dtype=torch.int64)
        self.numbers = torch.empty(3 * CHUNK // 2, dtype=torch.float64)
        self.samples = torch.empty(CHUNK, dtype=torch.float64)


_workspace = _Workspace()


def _box_muller(stream: CipherContext, n: int, std: float) -> Tensor:
    """Return ``n`` <= CHUNK float64 samples on ``grid(std)`` from the next words of ``stream``.

    They are in the thread's workspace: copy them before the next call.
    """
    half = (n + 1) // 2
    words = _workspace.words[: 3 * half]
    _fill(stream, words)
    numbers = _workspace.numbers[: 3 * half].copy_(words.bitwise_and_(2**63 - 1))  # in [0, 2**63)
    coarse, fine, turn = numbers.view(3, half)
    # (coarse + (fine + ½)·2**-63)·2**-63 is above 0 and at most 1, and near 0, the tail, has all its bits.
    uniform = coarse.add_(fine.add_(0.5), alpha=2.0**-63).mul_(2.0**-63)
    step = grid(std)
    radius = uniform.log_().mul_(-2.0).sqrt_().mul_(std / step)  # (half,), in steps of the grid
    angle = turn.mul_(2 * math.pi * 2.0**-63)  # (half,)
    samples = _workspace.samples[: 2 * half].view(2, half)
    torch.cos(angle, out=samples[0])
    torch.sin(angle, out=samples[1])
    return samples.mul_(radius).round_().mul_(step).view(-1)[:n]


def _uniform(key: bytes, n: int) -> NDArray[np.float64]:
    words, stream = torch.empty(n, dtype=torch.int64), _cipher(key)
    for piece in torch.split(words, CHUNK):
        _fill(stream, piece)
    return ((words.numpy().view(np.uint64) >> np.uint64(11)) + np.float64(1.0)) * np.float64(2.0**-53)


def _cipher(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _fill(stream: CipherContext, words: Tensor) -> None:
    """Fill int64 ``words`` with the next bytes of the keystream."""
    stream.update_into(memoryview(_ZEROS)[: 8 * len(words)], words.numpy().view(np.uint8).data)
