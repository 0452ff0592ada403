"""Per-record gradients, clipped and summed: the part of DP-SGD that sees the records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from histoflare.errors import HistoflareError, JobError
from histoflare.privacy import bookkeeping
from histoflare.privacy.mechanism import check_clip_norm
from histoflare.privacy.requirements import check_model

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
        model: One that :func:`check_model` takes.
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


def sum_of_clipped_gradients(
    model: nn.Module, losses: Losses, batch: Any, clip_norm: float, engine: str = "bookkeeping"
) -> ClippedSum:
    """Return the sum of :func:`sum_one_by_one` over the records of one batch, for comparison.

    It is faster for small bags, and the engines agree with each other to within rounding. But records that
    share a batch share its roundings: a bag pads the others, and who chose the model can make much of the
    last bit of it. There is no guarantee that one record moves the sum by at most ``clip_norm``.

    The table is that of :func:`sum_one_by_one`, but that ``ghost`` and ``microbatch`` refuse a batch of
    several with a record that is not finite. ``hooks`` and ``ghost`` look for parameters used outside their
    layer by comparing sums, and a record whose terms cancel to mere rounding looks like one.

    Args:
        model: Is left as it was, but for buffers that its forward pass changes.
        losses: See :data:`Losses`.
        clip_norm: C, from 1e-30 to 1e30.
        engine: One of :data:`histoflare.privacy.requirements.ENGINES`.

    Raises:
        JobError: The model or the engine will not do (see :func:`check_model`), the losses are not one for
            each record (MODEL_NOT_PRIVATE), the clip norm is out of range (PRIVACY_INVALID), or a record is
            not finite (NOT_FINITE).
    """
    check_clip_norm(clip_norm)
    check_model(model, engine)

    def losses_of() -> Tensor:
        return _checked(losses(model, batch))

    def factors_of(norms: Tensor) -> Tensor:
        factors = (clip_norm * (1 - HEADROOM) / norms).clamp(max=1.0)  # (P,); x / 0 = ∞ becomes 1
        return factors.where(norms.isfinite(), 0.0)

    sums = {"bookkeeping": bookkeeping.gradients_of, "hooks": _hooks, "ghost": _ghost}
    tensors, norms, found = sums.get(engine, _microbatch)(model, losses_of, factors_of)
    return ClippedSum({name: tensors[name] for name in _trained(model)}, norms, found)


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


def _microbatch(
    model: nn.Module, losses_of: Callable[[], Tensor], factors_of: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One backward pass for each record, as the definition says."""
    parameters = _trained(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    losses = losses_of()
    norms = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
    for record, loss in enumerate(losses.unbind()):
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
        norms[record] = _norm(gradients.values())
        factor = factors_of(norms[record : record + 1]).item()
        if factor:
            for name, gradient in gradients.items():
                total[name].add_(gradient, alpha=factor)
    _check_finite(norms)
    return total, norms, losses.detach()


def _hooks(
    model: nn.Module, losses_of: Callable[[], Tensor], factors_of: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A gradient for each record at once, from Opacus (Yousefpour et al. 2021)."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks  # takes a second and 100 MB

    parameters = _trained(model)
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
    try:
        losses = losses_of()
        _backward(losses.sum())
        samples = {name: getattr(p, "grad_sample", None) for name, p in parameters.items()}
        _check_taken(parameters, samples)
    finally:
        hooks.cleanup()
        _clear(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    squared = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
    for sample in samples.values():
        if sample is not None:  # (P, ...)
            squared += torch.linalg.vector_norm(sample.flatten(start_dim=1), dim=1, dtype=torch.float64) ** 2
    norms = squared.sqrt()
    factors = factors_of(norms)
    kept = factors != 0
    for name in list(samples):
        sample = samples.pop(name)
        if sample is not None:
            sample = sample if bool(kept.all()) else sample[kept]
            total[name] = torch.tensordot(factors[kept].to(sample.dtype), sample, dims=1)
    return total, norms, losses.detach()


def _ghost(
    model: nn.Module, losses_of: Callable[[], Tensor], factors_of: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two backward passes, the first for the norms alone, from Opacus (fast gradient clipping)."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleHooksFastGradientClipping,
    )

    parameters = _trained(model)
    hooks = GradSampleHooksFastGradientClipping(model, batch_first=True, loss_reduction="sum")
    try:
        losses = losses_of()
        _backward(losses.sum(), retain_graph=True)
        found = {
            name: p._norm_sample.double() for name, p in parameters.items() if hasattr(p, "_norm_sample")
        }
        _check_taken({name: p for name, p in parameters.items() if name not in found}, {})
        norms = sum(
            (norm.square() for norm in found.values()),
            torch.zeros(len(losses), dtype=torch.float64, device=losses.device),
        ).sqrt()
        factors = factors_of(norms)
        hooks.disable_hooks()
        _clear(model)
        _backward((losses * factors.to(losses.dtype)).sum())
        total = {
            name: torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad
            for name, p in parameters.items()
        }
    except NotImplementedError as error:
        raise JobError(f"Opacus cannot train this model: {error}", reason="MODEL_NOT_PRIVATE") from None
    finally:
        hooks.cleanup()
        _clear(model)
    _check_finite(norms)
    if not bool(norms.isfinite().all()):
        total = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
    return total, norms, losses.detach()


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    with warnings.catch_warnings():
        # A first layer's input needs no gradient; that of the output, which is there, is what Opacus takes.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_taken(parameters: dict[str, nn.Parameter], samples: dict[str, Tensor | None]) -> None:
    """Raise :class:`JobError` if a parameter has a gradient that is not the sum of its samples (P, ...)."""
    for name, p in parameters.items():
        sample = samples.get(name)
        if p.grad is None:
            continue
        rest = p.grad if sample is None else p.grad - sample.sum(dim=0)
        size = 0.0 if sample is None else sample.flatten(start_dim=1).norm(dim=1).sum().item()
        if rest.norm().item() > 1e-3 * size:
            raise JobError(
                f"The model uses {name} outside its layer; its gradient cannot be told apart by record.",
                reason="MODEL_NOT_PRIVATE",
            )


def _check_finite(norms: Tensor) -> None:
    """Raise :class:`JobError` if a record is not finite and shares its backward pass: 0 · NaN is NaN."""
    if len(norms) > 1 and not bool(norms.isfinite().all()):
        raise JobError(
            "A record's gradient is not finite, and this engine cannot leave it out of a batch of several: "
            "use the engine bookkeeping, or one record at a time.",
            reason="NOT_FINITE",
        )


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
