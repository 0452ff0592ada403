"""The Gaussian mechanism on a whole update: clip it, add noise.

Source: FedDP (Pan et al. 2024, arXiv 2411.04509), eq. 11.

Guarantee, for one call of :func:`release_update` with ``clip_norm`` C, ``noise_multiplier`` z and a secure
noise source. What is released is a Gaussian mechanism with standard deviation z·C in each coordinate.

- Unit *patient*, add or remove one: training with and without a patient may give any two updates, and two
  clipped ones can be 2C apart. The sensitivity is 2C and the event is ``Spend(noise_multiplier=z / 2)``.
- Unit *site*, add or remove one: an update is there or it is not (0 in its place). The sensitivity is C and
  the event is ``Spend(noise_multiplier=z)``. It says nothing of a single patient that the first would not.

Everything that leaves must be clipped together, in one call: two calls are two events.

====================================  ================================================================
clip_norm                             result
====================================  ================================================================
0, negative, ∞, NaN, above 1e30       refused, ``PRIVACY_INVALID``: 0 would release noise of size 0
below 1e-30                           refused, ``PRIVACY_INVALID``: its squares are no floats
====================================  ================================================================

====================================  ================================================================
noise_multiplier                      result
====================================  ================================================================
0                                     clipped, no noise: protects nothing, the event has ε = ∞
negative, ∞, NaN, above 1e30          refused, ``PRIVACY_INVALID``
above 0 and below 1e-30               refused, ``PRIVACY_INVALID``: the noise could round to 0
so large that 2**-29·z·√n >= 1        refused, ``PRIVACY_INVALID``: nothing of the n numbers would be left
====================================  ================================================================

====================================  ================================================================
tensors                               result
====================================  ================================================================
none, or none with an element         themselves; norm 0
all zeros                             noise alone
NaN or ∞ in one                       refused, ``NOT_FINITE``: nothing leaves
norm at most clip_norm                not scaled
integers, booleans, complex numbers   refused, ``MODEL_NOT_PRIVATE``: they never leave
float16, bfloat16                     computed in float64 and rounded once, as every other dtype is
a result beyond the dtype's range     refused, ``NOT_FINITE``
====================================  ================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from histoflare.errors import JobError
from histoflare.privacy.noise import CHUNK, NoiseSource, grid

SMALLEST, LARGEST = 1e-30, 1e30
"""Of a clip norm and of a noise multiplier above 0: beyond them a float64 rounds to 0 or to infinity."""


def clip(tensors: Mapping[str, Tensor], clip_norm: float) -> tuple[dict[str, Tensor], float]:
    """Return ``tensors`` · min(1, clip_norm / norm) and their norm before, in L2 over all of them together.

    The norm of the result, roundings to each tensor's dtype included, is at most ``clip_norm``.

    Raises:
        JobError: See the module's tables.
    """
    check_clip_norm(clip_norm)
    norm = l2_norm(tensors)
    clipped, scale, got = {name: tensor.clone() for name, tensor in tensors.items()}, 1.0, norm
    # Once is enough in float32; where float16 is near its smallest numbers, rounding can undo a part.
    while got > clip_norm:
        eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())
        scale *= clip_norm / got * (1 - eps)
        clipped = {name: _mapped(tensor, lambda part: part.mul_(scale)) for name, tensor in tensors.items()}  # noqa: B023
        got = l2_norm(clipped)
    return clipped, norm


def release_update(
    tensors: Mapping[str, Tensor], *, clip_norm: float, noise_multiplier: float, noise: NoiseSource
) -> dict[str, Tensor]:
    """Return clipped ``tensors`` + N(0, (noise_multiplier · clip_norm)²).

    ``tensors`` are left as they are; one copy of them is made. See the module's text for the guarantee and
    for what is refused.

    Raises:
        JobError: See the module's tables; nothing was released.
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    if noise_multiplier == 0:
        return clip(tensors, clip_norm)[0]
    norm, std = l2_norm(tensors), noise_multiplier * clip_norm
    # Rounding to the noise's grid moves each number by half a step at most; the clip makes room for that.
    n = sum(tensor.numel() for tensor in tensors.values())
    most = clip_norm - grid(std) / 2 * math.sqrt(n)
    if most <= 0:
        raise JobError(
            f"noise_multiplier {noise_multiplier!r} is so large that nothing of {n} numbers would be left.",
            reason="PRIVACY_INVALID",
        )
    scale = min(1.0, most / norm * (1 - 1e-12)) if norm else 1.0
    return add_noise(tensors, std=std, noise=noise, scale=scale)


def noise_at_server(
    total: Mapping[str, Tensor], *, clip_norm: float, noise_multiplier: float, noise: NoiseSource
) -> dict[str, Tensor]:
    """Return ``total`` + N(0, (noise_multiplier · clip_norm)²): noise once, by a server that all sites trust.

    Guarantee: ``total`` is the unweighted sum of updates, each clipped to ``clip_norm`` at its site. Towards
    everybody but the server this is the mechanism of :func:`release_update`, with the same events, if no
    patient is at two sites. Towards the server there is none. What is done with the sum afterwards (÷ the
    number of sites) costs nothing. Rounding n numbers to the noise's grid moves the sum by less than
    2**-28·√n standard deviations.

    Raises:
        JobError: See the module's tables.
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    l2_norm(total)
    return add_noise(total, std=noise_multiplier * clip_norm, noise=noise)


def add_noise(
    tensors: Mapping[str, Tensor], *, std: float, noise: NoiseSource, scale: float = 1.0
) -> dict[str, Tensor]:
    """Return tensors · scale + N(0, std²), both on the noise's grid, added in float64 and rounded once.

    Nothing is clipped here, so nothing is guaranteed.

    Raises:
        JobError: A result is beyond its dtype (NOT_FINITE), or ``std`` is negative, infinite or NaN.
    """
    step = grid(std) if std > 0 else 0.0

    def noised(part: Tensor) -> Tensor:
        if scale != 1:
            part.mul_(scale)
        if step:
            part.mul_(1 / step).round_().mul_(step)
        return part.add_(noise.normal(part.shape, std))

    return {name: _mapped(tensor, noised) for name, tensor in tensors.items()}


def l2_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm over all elements of ``tensors``, added up in float64.

    Raises:
        JobError: One is not of floating-point numbers (MODEL_NOT_PRIVATE), or the norm is not finite
            (NOT_FINITE).
    """
    total = 0.0
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise JobError(
                f"{name} is {tensor.dtype}: only floating-point tensors can be clipped and noised.",
                reason="MODEL_NOT_PRIVATE",
            )
        squares = 0.0
        for part in _parts(tensor):
            squares += torch.dot(part, part).item()
        if not math.isfinite(squares):
            raise JobError(
                f"{name} holds NaN, infinity or numbers too large to be squared; nothing leaves.",
                reason="NOT_FINITE",
            )
        total += squares
    return math.sqrt(total)


def check_clip_norm(clip_norm: float) -> None:
    """Raise :class:`JobError` (PRIVACY_INVALID) unless ``clip_norm`` is from 1e-30 to 1e30."""
    if not SMALLEST <= clip_norm <= LARGEST:
        raise JobError(
            f"clip_norm must be a number from {SMALLEST:g} to {LARGEST:g}, not {clip_norm!r}.",
            reason="PRIVACY_INVALID",
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raise :class:`JobError` (PRIVACY_INVALID) unless ``noise_multiplier`` is 0 or from 1e-30 to 1e30."""
    if noise_multiplier != 0 and not SMALLEST <= noise_multiplier <= LARGEST:
        raise JobError(
            f"noise_multiplier must be 0 or a number from {SMALLEST:g} to {LARGEST:g}, not "
            f"{noise_multiplier!r}.",
            reason="PRIVACY_INVALID",
        )


def _mapped(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a new tensor of ``tensor``'s dtype, ``change`` applied in float64, a part at a time."""
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    for piece, part in zip(torch.split(result.view(-1), CHUNK), _parts(tensor), strict=True):
        piece.copy_(change(part))
        # A finite sum has finite terms only; the slow look at each is left for sums that overflow.
        if not math.isfinite(piece.sum().item()) and not bool(piece.isfinite().all()):
            raise JobError(
                f"A noised number is beyond the range of {tensor.dtype}; nothing leaves. Use float32, or a "
                "smaller clip_norm.",
                reason="NOT_FINITE",
            )
    return result


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield ``tensor``'s elements in float64, CHUNK at a time, in one memory: to change, not to keep."""
    flat = tensor.detach().reshape(-1)
    memory = torch.empty(min(CHUNK, len(flat)), dtype=torch.float64)
    for part in torch.split(flat, CHUNK):
        yield memory[: len(part)].copy_(part)
