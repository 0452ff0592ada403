"""Sums of clipped per-record gradients from one forward and one backward pass, for models of ``nn.Linear``.

Source: Bu et al. 2022, "Differentially private optimization on large model at small cost" (book-keeping). In
the backward pass a layer's weight gradient is not computed; its input a and the gradient b at its output are
kept instead. They tell each record's gradient norm, and after it, with each record weighted by its clip
factor, the sum of the clipped gradients in one product. No record's gradient is ever held for itself, but
for a long record one at a time.

It is for comparison. The product over all records is rounded in float32, and a record is not measured by what
it adds to it; jobs take one record at a time (:func:`histoflare.privacy.gradients.sum_one_by_one`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoflare.errors import JobError

Uses = list[tuple[Tensor, Tensor]]
"""Of one layer: its input (P, ..., i) and the gradient at its output (P, ..., o), for each of its calls."""

ABSORPTION = 2.0**-10
"""A record counts for at least this part of Σ_t ‖a_t‖‖b_t‖.

Its terms may cancel, so that its norm is 0, and still be so large within the float32 product over all records
that the other records' terms are lost beside them. So no term may be above 1024 clip norms. A norm so small
that float64 loses it in the products of its terms (some 1e-8 of them) is then never the one that counts.
"""


class _Kept(torch.autograd.Function):
    """A linear layer that keeps what its weight gradient is made of instead of computing it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, uses: Uses) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.uses.append((x.detach(), gradient))
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


def gradients_of(
    model: nn.Module, losses_of: Callable[[], Tensor], factors_of: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the weighted sum of the records' gradients by parameter, their norms (P,), their losses (P,).

    Args:
        model: One whose trained parameters are all in an ``nn.Linear``, each under one name.
        losses_of: Runs the model and returns the records' losses (P,).
        factors_of: What the records count for (P,), at least their norms → their weights (P,); 0 leaves a
            record out, NaN and all.

    Raises:
        JobError: A parameter was used outside its layer, or a layer's first axis is not the records
            (MODEL_NOT_PRIVATE).
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(p.requires_grad for p in module.parameters())
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _keeping(layers) as kept:
        losses = losses_of()
        outside = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    if any(gradient is not None for gradient in outside):
        raise JobError(
            "The model uses a parameter outside its layer's own call; its gradient cannot be told apart by "
            "record.",
            reason="MODEL_NOT_PRIVATE",
        )
    pairs = {name: _joined(name, uses, len(losses)) for name, uses in kept.items() if uses}
    squared, terms = torch.zeros((2, len(losses)), dtype=torch.float64, device=losses.device)
    grams: dict[Hashable, Tensor] = {}
    for name, (a, b) in pairs.items():
        size = _lengths(b)  # (P, T)
        if layers[name].weight.requires_grad:
            squared += _squared_norms(a, b, grams)
            terms += (size * _lengths(a)).sum(dim=1)
        if _trains_bias(layers[name]):
            squared += b.double().sum(dim=1).square().sum(dim=1)
            terms += size.sum(dim=1)
    del grams
    norms = squared.sqrt()
    factors = factors_of(torch.maximum(norms, ABSORPTION * terms))
    total = {
        name: torch.zeros_like(p, requires_grad=False)
        for name, p in model.named_parameters()
        if p.requires_grad and name.rpartition(".")[0] not in pairs
    }
    for name in list(pairs):
        a, b = _weighted(*pairs.pop(name), factors)  # (P·T, i), (P·T, o)
        kept.pop(name).clear()
        if layers[name].weight.requires_grad:
            total[f"{name}.weight" if name else "weight"] = b.mT @ a  # (o, i)
        if _trains_bias(layers[name]):
            total[f"{name}.bias" if name else "bias"] = b.sum(dim=0)  # (o,)
    return total, norms, losses.detach()


@contextmanager
def _keeping(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Uses]]:
    """Let each layer's calls go through :class:`_Kept` within the block."""
    kept: dict[str, Uses] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.forward = partial(_call, layer, kept[name])  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        for layer in layers.values():
            del layer.forward  # the class's own again


def _call(layer: nn.Linear, uses: Uses, x: Tensor) -> Tensor:
    output: Tensor = _Kept.apply(x, layer.weight, layer.bias, uses)  # type: ignore[no-untyped-call]
    return output


def _trains_bias(layer: nn.Linear) -> bool:
    return layer.bias is not None and layer.bias.requires_grad


def _joined(name: str, uses: Uses, records: int) -> tuple[Tensor, Tensor]:
    """Return a layer's a (P, T, i) and b (P, T, o): all its uses in a row."""
    for a, _ in uses:
        if a.ndim < 2 or len(a) != records:
            raise JobError(
                f"The layer {name} got an input of shape {tuple(a.shape)} for {records} records: its first "
                "axis must be theirs.",
                reason="MODEL_NOT_PRIVATE",
            )
    flat = [(a.reshape(records, -1, a.shape[-1]), b.reshape(records, -1, b.shape[-1])) for a, b in uses]
    if len(flat) == 1:
        return flat[0]
    return torch.cat([a for a, _ in flat], dim=1), torch.cat([b for _, b in flat], dim=1)


def _squared_norms(a: Tensor, b: Tensor, grams: dict[Hashable, Tensor]) -> Tensor:
    """Return ‖Σ_t b_t a_tᵀ‖² (P,) float64 of each record, the cheaper way.

    Either Σ_tt' (a_t·a_t')(b_t·b_t'), which takes T²(i + o) products and no gradient, or from the gradient
    itself, which takes T·i·o. The first is made in float64, at twice the cost: a float32 square may be 0 or
    infinite. ``grams`` holds what is known of a: layers that share an input share it.
    """
    records, t, i = a.shape
    o = b.shape[-1]
    if 2 * t * (i + o) > i * o:
        return torch.stack([_squared_norm(a[p], b[p]) for p in range(records)])
    key = (a.data_ptr(), a.shape, a.stride())
    if key not in grams:
        grams[key] = _gram(a)
    of_a, of_b = grams[key], _gram(b)  # (P, T, T)
    # Rounding may leave a little below 0; what is not finite in a or b stays so.
    return (of_a * of_b).sum(dim=(1, 2)).clamp(min=0.0)  # (P,)


def _gram(x: Tensor) -> Tensor:
    """Return x xᵀ (P, T, T) float64 of x (P, T, d)."""
    wide = x.double()
    return wide @ wide.mT


def _lengths(x: Tensor) -> Tensor:
    """Return ‖x_t‖ (P, T) float64 of x (P, T, d)."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return lengths


def _squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖bᵀ a‖² for a (T, i) and b (T, o): float64, a number."""
    norm: Tensor = torch.linalg.vector_norm(b.mT @ a, dtype=torch.float64)
    return norm.square()


def _weighted(a: Tensor, b: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return a (P·T, i) and b (P·T, o), each record's b times its factor; a record with factor 0 is all 0."""
    out = factors == 0
    if bool(out.any()):
        a, b = (part.masked_fill(out[:, None, None], 0.0) for part in (a, b))
    if bool((factors != 1).any()):
        b = b * factors.to(b.dtype)[:, None, None]
    return a.flatten(end_dim=1), b.flatten(end_dim=1)
