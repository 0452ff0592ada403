"""Per-record gradients, clipped and summed: the part of DP-SGD that sees the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from histoflare.errors import HistoflareError, JobError

Losses = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the loss (P,) of each record, which depends on that record and on no other."""

HEADROOM = 2.0**-10
"""By how much (relative) a record is clipped below ``clip_norm``: it pays for roundings."""


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped gradients. Only ``tensors``, with noise added, may leave.

    Attributes:
        tensors: By name of parameter, for every parameter that is trained.
        norms: (P,) float64, the records' gradient norms before the clip.
        losses: (P,), the records' losses.
        failures: Why a record counts as zero though its gradient is not known, in words. They name records.
    """

    tensors: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    failures: tuple[str, ...] = ()


def sum_one_by_one(model: nn.Module, losses: Losses, records: Iterable[Any], clip_norm: float) -> ClippedSum:
    """Return Σ_r g_r · min(1, C / ‖g_r‖) (Abadi et al. 2016, algorithm 1), a record at a time, in float64.

    The norm is over all parameters together. No ``.grad`` is left; buffers are put back after each record.
    Gradients and their sum are on the model's device, norms and losses on the CPU.

    Guarantee: one record more or less moves the sum by at most ``clip_norm`` in L2, for up to 2**20 records
    and whatever the model, its numbers included.

    - Each record has a forward and a backward pass of its own. What is computed for it, roundings and all, is
      the same whoever else is there: no neighbour changes the shape of its batch or a layer's buffers.
    - What is measured is what is added: the very tensor, its squares in float64, which neither underflow nor
      overflow for float32. How far the tensor is from the true gradient makes no difference.
    - The total is in float64: of N records, each clipped to C·(1 - 2**-10), the roundings differ with and
      without one of them by less than N²·2**-53·C, at most an eighth of the room for N = 2**20.

    This takes for granted that computing the same on the same record gives the same bytes (one thread), and
    that random masks are independent from record to record.

    ======================  ========================================================================
    a record's gradient     its part in the sum
    ======================  ========================================================================
    norm up to clip_norm    itself (in the last 0.1 % below clip_norm a little less)
    norm above              scaled to just below clip_norm
    0                       0
    NaN or ∞ in it          0: a refusal would tell of the record. Its norm in ``norms`` is not finite
    an error on the way     0, likewise, whatever the error: it cannot be read, has another shape, takes too
                            much memory. Its norm and loss are NaN, and ``failures`` says why
    ======================  ========================================================================

    Args:
        model: One that :func:`histoflare.privacy.requirements.check_model` takes.
        losses: See :data:`Losses`; of a batch of one record, (1,). What it takes to make a batch of a record
            is best done in it: an error there is the record's.
        records: Each a batch of one; asked for one at a time. There may be none.
        clip_norm: C.

    Raises:
        JobError: Something else than one loss for one record, made by the model (MODEL_NOT_PRIVATE): that is
            the task's doing. No other error follows from a record.
    """
    parameters = _trained(model)
    total = {
        name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for name, p in parameters.items()
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms, found, failures = [], [torch.zeros(0)], []
    for record in records:
        try:
            loss, gradients = _loss_and_gradients(model, losses, record, list(parameters.values()))
        except Exception as error:
            if isinstance(error, JobError) and error.reason == "MODEL_NOT_PRIVATE":
                raise
            failures.append(str(error) if isinstance(error, HistoflareError) else repr(error))
            loss, gradients = torch.full((1,), math.nan), ()  # on the CPU, as every loss below
        norm = _norm(gradients) if gradients else math.nan
        _add_clipped(gradients, norm, total, clip_norm * (1 - HEADROOM))
        norms.append(norm)
        found.append(loss.cpu())
        for name, buffer in model.named_buffers():
            buffer.detach().copy_(buffers[name])
    return ClippedSum(total, torch.tensor(norms, dtype=torch.float64), torch.cat(found), tuple(failures))


def _loss_and_gradients(
    model: nn.Module, losses: Losses, record: Any, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return a record's loss (1,), without its graph, and its gradient by each parameter."""
    loss = _checked(losses(model, record))
    if len(loss) != 1:
        raise JobError(
            f"A batch of {len(loss)} records was given; training under protection takes one at a time.",
            reason="MODEL_NOT_PRIVATE",
        )
    return loss.detach(), torch.autograd.grad(loss.sum(), parameters, allow_unused=True)


def _add_clipped(
    gradients: Sequence[Tensor | None], norm: float, total: dict[str, Tensor], clip_norm: float
) -> None:
    """Add a gradient to ``total``, clipped, unless it is not finite."""
    if math.isfinite(norm):
        factor = min(1.0, clip_norm / norm) if norm else 1.0
        for so_far, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                so_far.add_(gradient, alpha=factor)


def _checked(losses: Tensor) -> Tensor:
    if losses.ndim != 1 or not losses.requires_grad:
        raise JobError(
            f"The task's losses have shape {tuple(losses.shape)}; DP-SGD needs one for each record, made by "
            "the model.",
            reason="MODEL_NOT_PRIVATE",
        )
    return losses


def _norm(gradients: Iterable[Tensor | None]) -> float:
    """Return the L2 norm over all elements; squares and sum in float64."""
    parts = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return float(torch.stack(parts).square().sum().sqrt()) if parts else 0.0


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
