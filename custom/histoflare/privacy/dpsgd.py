"""One step's gradient under differential privacy: DP-SGD (Abadi et al. 2016; for bags: Adnan et al. 2022).

Guarantee. If a step's records are a Poisson sample (:func:`histoflare.privacy.noise.poisson_sample`) of rate
q, then with clip norm C and noise multiplier z the step is one Gaussian mechanism with noise z on a sample of
rate q, for the unit *record*, add or remove one: ``Spend(noise_multiplier=z, sample_rate=q)``. If a record is
a patient with all slides, that is the unit *patient*. The noise source must be secure, and the sample as
secret as the noise. What is made of the gradient afterwards (optimizer, proximal and control terms that know
nothing of the records) costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.gradients import Losses, sum_of_clipped_gradients
from histoflare.privacy.mechanism import add_noise, check_clip_norm, check_noise_multiplier
from histoflare.privacy.noise import NoiseSource
from histoflare.privacy.requirements import check_model


@dataclass(frozen=True)
class PrivateGradient:
    """The gradient of one step. Only ``tensors`` are protected; the rest is for the site's own log.

    Attributes:
        tensors: By name of parameter, for every parameter that is trained.
        norms: (records,) float64, the drawn records' gradient norms before the clip.
        losses: (records,), the drawn records' losses.
    """

    tensors: dict[str, Tensor]
    norms: Tensor
    losses: Tensor


def private_gradient(
    model: nn.Module,
    losses: Losses,
    batches: Iterable[Any],
    *,
    clip_norm: float,
    noise_multiplier: float,
    batch_size: float,
    noise: NoiseSource,
    engine: str = "bookkeeping",
) -> PrivateGradient:
    """Return (Σ clipped gradients + N(0, (noise_multiplier · clip_norm)²)) / batch_size.

    ====================  ==========================================================================
    input                 result
    ====================  ==========================================================================
    no batches            noise alone / batch_size: an empty sample is a step like any other
    noise_multiplier 0    no noise: protects nothing, the event has ε = ∞
    batch_size            the public expected size, never the number drawn; 0, negative, ∞, NaN refused
    clip_norm             from 1e-30 to 1e30, else refused
    ====================  ==========================================================================

    Args:
        losses: See :data:`histoflare.privacy.gradients.Losses`.
        batches: The sample in any number of parts, each worked off at once; they change memory and speed,
            and the result by rounding only.
        engine: See :data:`histoflare.privacy.requirements.ENGINES`.

    Raises:
        JobError: See :func:`sum_of_clipped_gradients`; or a number is out of range (PRIVACY_INVALID).
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    if not (math.isfinite(batch_size) and batch_size > 0):
        raise JobError(
            f"batch_size must be a finite number above 0, not {batch_size!r}.", reason="PRIVACY_INVALID"
        )
    check_model(model, engine)
    total: dict[str, Tensor] = {}
    seen_norms, seen_losses = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
    for batch in batches:
        part = sum_of_clipped_gradients(model, losses, batch, clip_norm, engine)
        for name, tensor in part.tensors.items():
            total[name] = total[name].add_(tensor) if name in total else tensor
        seen_norms.append(part.norms)
        seen_losses.append(part.losses)
    if not total:
        total = {
            name: torch.zeros_like(p, requires_grad=False)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    noised = add_noise(total, std=noise_multiplier * clip_norm, noise=noise)
    for tensor in noised.values():
        tensor.div_(batch_size)
    return PrivateGradient(noised, torch.cat(seen_norms), torch.cat(seen_losses))
