"""One step's gradient under differential privacy: DP-SGD (Abadi et al. 2016; for bags: Adnan et al. 2022).

Guarantee. If a step's records are a Poisson sample (:func:`histoflare.privacy.noise.poisson_sample`) of rate
q, then with clip norm C and noise multiplier z the step is one Gaussian mechanism with noise z on a sample of
rate q, for the unit *record*, add or remove one: ``Spend(noise_multiplier=z, sample_rate=q)``. If a record is
a patient with all slides, that is the unit *patient*. Roundings are included: what is measured, clipped and
added is one record's gradient at a time (:func:`histoflare.privacy.gradients.sum_one_by_one`), and the clip
leaves room for rounding the sum to the noise's grid. The noise source must be secure, and the sample as
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
from histoflare.privacy.gradients import Losses, sum_one_by_one
from histoflare.privacy.mechanism import add_noise, check_clip_norm, check_noise_multiplier
from histoflare.privacy.noise import NoiseSource, grid
from histoflare.privacy.requirements import check_model


@dataclass(frozen=True)
class PrivateGradient:
    """The gradient of one step. Only ``tensors`` are protected; the rest is for the site's own log.

    Attributes:
        tensors: By name of parameter, for every parameter that is trained.
        norms: (records,) float64, the drawn records' gradient norms before the clip.
        losses: (records,), the drawn records' losses.
        failures: Why drawn records count as zero, in words.
    """

    tensors: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    failures: tuple[str, ...] = ()


def private_gradient(
    model: nn.Module,
    losses: Losses,
    records: Iterable[Any],
    *,
    clip_norm: float,
    noise_multiplier: float,
    batch_size: float,
    noise: NoiseSource,
    dtype: torch.dtype | None = None,
) -> PrivateGradient:
    """Return (Σ clipped gradients + N(0, (noise_multiplier · clip_norm)²)) / batch_size.

    ========================================  ======================================================
    input                                     result
    ========================================  ======================================================
    no records                                noise alone / batch_size: an empty sample is a step too
    a record whose gradient is not finite     as if it was not there
    a record that cannot be had, or any       as if it was not there
    other error on its way
    noise_multiplier 0                        no noise: protects nothing, the event has ε = ∞
    so large that grid(z·C)·√n >= C           refused: nothing of the n numbers would be left
    batch_size                                the public expected size, never the number drawn; 0,
                                              negative, ∞, NaN refused
    clip_norm                                 from 1e-30 to 1e30, else refused
    a result beyond the parameter's dtype     ∞ in it: it follows from what was noised
    ========================================  ======================================================

    Args:
        losses: See :data:`histoflare.privacy.gradients.Losses`.
        records: The sample, each record a batch of its own; asked for one at a time.
        dtype: Of the result; None: the parameters' own. In float64 with a ``batch_size`` of 1 each number is
            a multiple of ``grid(noise_multiplier · clip_norm)``, as a secure sum needs it.

    Raises:
        JobError: The model will not do (see :func:`check_model`), a batch is not one record with one loss
            (MODEL_NOT_PRIVATE), or a number is out of range (PRIVACY_INVALID). No error follows from the
            numbers in a record, or from its being unreadable.
    """
    check_clip_norm(clip_norm)
    check_noise_multiplier(noise_multiplier)
    if not (math.isfinite(batch_size) and batch_size > 0):
        raise JobError(
            f"batch_size must be a finite number above 0, not {batch_size!r}.", reason="PRIVACY_INVALID"
        )
    check_model(model)
    std, kinds = noise_multiplier * clip_norm, {n: p for n, p in model.named_parameters() if p.requires_grad}
    most = clip_norm
    if std:
        # Rounding two sums to the noise's grid moves each number of their difference by a step at most.
        size = sum(parameter.numel() for parameter in kinds.values())
        most -= grid(std) * math.sqrt(size)
        if most <= 0:
            raise JobError(
                f"noise_multiplier {noise_multiplier!r} is so large that nothing of {size} numbers would be "
                "left.",
                reason="PRIVACY_INVALID",
            )
    clipped = sum_one_by_one(model, losses, records, most)
    noised = add_noise({name: t.cpu() for name, t in clipped.tensors.items()}, std=std, noise=noise)
    # The noise comes from the CPU, where its source is, and is added there, in float64.
    tensors = {
        name: noised[name].div_(batch_size).to(p.device, dtype or p.dtype) for name, p in kinds.items()
    }
    return PrivateGradient(tensors, clipped.norms, clipped.losses, clipped.failures)
