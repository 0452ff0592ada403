"""Other ways to a sum of clipped gradients: all records in one batch. What training is compared with.

They are no protection against who chose the model: records that share a batch share its roundings. Jobs take
one record at a time (``histoflare.privacy.gradients.sum_one_by_one``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy.gradients import HEADROOM, ClippedSum, Losses, _checked, _norm, _trained
from histoflare.privacy.mechanism import check_clip_norm
from histoflare.privacy.requirements import check_model

from . import bookkeeping

ENGINES = ("bookkeeping", "hooks", "ghost", "microbatch")
"""``bookkeeping``: ours, for models whose parameters are all in ``nn.Linear``. ``hooks`` and ``ghost``:
Opacus, with and without a gradient for each record. ``microbatch``: a backward pass for each record."""


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
        engine: One of :data:`ENGINES`.

    Raises:
        JobError: The model will not do (see :func:`check_model`), the losses are not one for
            each record (MODEL_NOT_PRIVATE), the clip norm is out of range (PRIVACY_INVALID), or a record is
            not finite (NOT_FINITE).
    """
    check_clip_norm(clip_norm)
    check_model(model)

    def losses_of() -> Tensor:
        return _checked(losses(model, batch))

    def factors_of(norms: Tensor) -> Tensor:
        factors = (clip_norm * (1 - HEADROOM) / norms).clamp(max=1.0)  # (P,); x / 0 = ∞ becomes 1
        return factors.where(norms.isfinite(), 0.0)

    sums = {"bookkeeping": bookkeeping.gradients_of, "hooks": _hooks, "ghost": _ghost}
    tensors, norms, found = sums.get(engine, _microbatch)(model, losses_of, factors_of)
    return ClippedSum({name: tensors[name] for name in _trained(model)}, norms, found)


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
