"""Numbers in fixed point modulo 2**64, so that they can be added in any order, and padded.

A number x with the step s is the whole number round(x / s) modulo 2**64, written as int64. Adding such
numbers is exact, and the order changes no bit. That a sum of them wraps around is a function of the sum: it
costs no privacy, only correctness where a sum has no room.

Shared noise. Each of m sites sends round(N(0, σ²)/s) on top of multiples of s, with σ/s >= 2**28. The sum of
m independently rounded Gaussians is no rounded Gaussian of variance mσ², but it protects as well as one. For
the chance that round(N) is k is the density at k of N + U, with U uniform on (-½, ½). The m-fold convolution
of it at k is, by Poisson's summation formula, the density at k of N' + U_1 + … + U_m, with N' of variance
mσ², but for a part of e**(-π² (σ/s)²) or so; and that density is the chance that round(N' + U_2 + … + U_m) is
k: the ideal Gaussian mechanism, to which something was added before it was rounded (post-processing). At
σ/s = 2**28 the part is below e**(-7·10**17).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from histoflare.errors import JobError

PLAIN_STEP = 2.0**-40
"""Step of an update without protection: an error of 5e-13 for each site in the sum."""

LIMIT = 2**57
"""Steps: largest number that a site without protection sends, so that a sum of 64 sites does not wrap."""

_RING = 2.0**64
_BLOCK = 2**16


def encode(
    tensor: torch.Tensor, step: float, *, weight: float = 1.0, most: int | None = None
) -> torch.Tensor:
    """Return weight · tensor in fixed point: int64, of the same shape, on the CPU.

    Args:
        tensor: Floating-point numbers; the product and the rounding (half to even) are in float64.
        step: Of the fixed point, a power of two. Multiples of it below step·2**53 are exact.
        weight: What the tensor is multiplied by.
        most: Refuse numbers beyond so many steps, and NaN. None refuses nothing, for a refusal would tell of
            the data: what is too large wraps around, and NaN and infinity count as 0.

    Raises:
        JobError: A number is beyond ``most`` (UPDATE_OUT_OF_RANGE).
    """
    out = torch.empty(tensor.shape, dtype=torch.int64)
    flat = tensor.detach().reshape(-1)
    for piece, part in zip(torch.split(out.view(-1), _BLOCK), torch.split(flat, _BLOCK), strict=True):
        steps = part.to("cpu", torch.float64, copy=True).mul_(weight).mul_(1 / step).round_()
        if most is None:
            _wrap(steps)
        elif not bool((steps.abs() <= most).all()):
            raise JobError(
                f"A number of the update is beyond ±{most * step:g} or none at all: a secure sum has no room "
                "for it, and nothing was sent. Lower the learning rate, weigh the sites equally (weighting = "
                "uniform), or use the transport float32.",
                reason="UPDATE_OUT_OF_RANGE",
            )
        piece.copy_(steps)
    return out


def decode(total: torch.Tensor, step: float) -> torch.Tensor:
    """Return the numbers (float64) that a sum in fixed point stands for: those nearest to 0."""
    return total.to(torch.float64).mul_(step)


def add_up(vectors: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the sum modulo 2**64 of vectors of int64 tensors; {} of none."""
    total = {name: tensor.clone() for name, tensor in vectors[0].items()} if vectors else {}
    for vector in vectors[1:]:
        for name, so_far in total.items():
            # Of numbers without a sign it is defined what happens beyond the largest.
            numbers = so_far.numpy().view(np.uint64)
            np.add(numbers, vector[name].numpy().view(np.uint64), out=numbers)
    return total


def has_room(step: float, clip_norm: float, std: float, sites: int, records: int) -> bool:
    """Return whether a sum with noise fits, by public numbers alone; where it does not, it may wrap around.

    It asks for half of the ring, and that a site's own number stays below step·2**53, up to which float64 has
    each multiple of the step.

    Args:
        step: Of the fixed point.
        clip_norm: How far one record moves a site's number, at most.
        std: Standard deviation of one site's noise; 16 of them are more than ever come up.
        sites: In the sum. records: Of one site, at most.
    """
    one = records * clip_norm + 16 * std
    return one < step * 2**53 and sites * records * clip_norm + 16 * math.sqrt(sites) * std < step * 2**62


def _wrap(steps: torch.Tensor) -> None:
    """Bring whole numbers in float64 to [-2**63, 2**63) modulo 2**64, in place and exactly."""
    steps.nan_to_num_(0.0, 0.0, 0.0)
    steps.sub_(steps.div(_RING).round_().mul_(_RING))
    steps[steps >= _RING / 2] -= _RING
