"""A model's state as named CPU tensors, and the few sums a round makes with it.

Only floating-point tensors are ever sent or averaged. Integer buffers (BatchNorm's ``num_batches_tracked``)
keep the value of the initial global state: a weighted mean of counts means nothing, and the count itself
would tell how many batches a site has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from histoflare.errors import JobError

State = dict[str, Tensor]


def model_state(model: nn.Module) -> State:
    """Return a copy of the model's state on the CPU, in ``state_dict`` order."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put ``state`` into ``model``; :class:`JobError` unless names, shapes and dtypes are the model's."""
    check_tensors(state, model.state_dict(), whose="The state for this job's model")
    model.load_state_dict(dict(state), strict=True)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity (integers never do).

    A finite sum has only finite terms, and a sum is some ten times faster than looking at each; the look is
    left for sums that overflow.
    """
    if not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def check_tensors(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], *, whose: str) -> None:
    """Raise :class:`JobError` unless ``tensors`` has the names, shapes and dtypes of ``like`` and is finite.

    Args:
        whose: Subject of the error's sentence, e.g. ``"The update of site_a"``.
    """
    problems = [f"{name} is missing" for name in like if name not in tensors]
    for name, tensor in tensors.items():
        if name not in like:
            problems.append(f"{name} is not part of the model")
        elif tensor.shape != like[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(like[name].shape)}")
        elif tensor.dtype != like[name].dtype:
            problems.append(f"{name} has dtype {tensor.dtype}, not {like[name].dtype}")
        elif not is_finite(tensor):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise JobError(
            f"{whose} cannot be used: {shown}. All sites must run the same job with the same version, and a "
            "diverging model needs a smaller learning rate.",
            reason="STATE_INVALID",
        )


def shared_names(state: Mapping[str, Tensor], share: Sequence[str] | None) -> list[str]:
    """Return the names that are sent: floating-point and under one of the ``share`` prefixes (None = all).

    A prefix is a module path: ``"head"`` takes ``head.weight`` but not ``header.weight``.

    Raises:
        JobError: A prefix names no floating-point tensor.
    """
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    if share is None:
        return floating
    share = [share] if isinstance(share, str) else share
    empty = [prefix for prefix in share if not any(_under(name, prefix) for name in floating)]
    if empty or not share:
        wanted = ", ".join(map(repr, empty)) or "an empty list"
        roots = ", ".join(sorted({name.split(".")[0] for name in floating}))
        raise JobError(
            f"share = {wanted} names no tensor of the model; its modules begin with: {roots}.",
            reason="SHARE_INVALID",
        )
    return [name for name in floating if any(_under(name, prefix) for prefix in share)]


BATCH_NORM = ("shared", "local-statistics", "local")
"""What of BatchNorm a site sends: all, all but its running statistics (SiloBN), nothing (FedBN)."""

STATISTICS = ("running_mean", "running_var")


def batch_norm_names(state: Mapping[str, Tensor], kept: str) -> set[str]:
    """Return the tensors of BatchNorm layers that stay at a site.

    Args:
        kept: One of :data:`BATCH_NORM`. ``"local-statistics"``: running mean and variance stay (Andreux et
            al. 2020, SiloBN). ``"local"``: weight and bias too (Li et al. 2021, FedBN).
    """
    if kept == "shared":
        return set()
    layers = {name.rpartition(".")[0] for name in state if name.rpartition(".")[2] == "running_mean"}
    parts = STATISTICS if kept == "local-statistics" else (*STATISTICS, "weight", "bias")
    named = {f"{layer}.{part}" if layer else part for layer in layers for part in parts}
    return named & set(state)


def without_negative_variances(state: Mapping[str, Tensor]) -> State:
    """Return the state with every running variance at 0 at least: noise or a mean can leave one below."""
    return {
        name: tensor.clamp(min=0) if name.rpartition(".")[2] == "running_var" else tensor
        for name, tensor in state.items()
    }


def subtract(local: Mapping[str, Tensor], start: Mapping[str, Tensor], names: Iterable[str]) -> State:
    """Return local - start for ``names``, in the state's own dtype (one rounding)."""
    return {name: local[name] - start[name] for name in names}


def add_weighted_mean(
    state: Mapping[str, Tensor], updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> State:
    """Return state + Σ w_k Δ_k / Σ w_k, in float64 until the end; what no update has is kept.

    Tensor by tensor: the mean of a whole model, in float64, would be twice as large as the model. Updates are
    added up in the given order. Multiplied and added apart: a fused multiply-add rounds once instead of
    twice, and whether a CPU fuses depends on the CPU; the bytes must not.

    Raises:
        JobError: There is no update, a weight is negative or not finite, or the weights sum to 0.
    """
    total = _checked_sum(updates, weights)
    return {
        name: _add(tensor, _mean(updates, weights, total, name)) if name in updates[0] else tensor.clone()
        for name, tensor in state.items()
    }


def weighted_mean(updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """Return Σ w_k Δ_k / Σ w_k in float64, added up as in :func:`add_weighted_mean`.

    Raises:
        JobError: As there.
    """
    total = _checked_sum(updates, weights)
    return {name: _mean(updates, weights, total, name) for name in updates[0]}


def _checked_sum(updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> float:
    total = sum(weights)
    if not updates or any(not 0 <= weight < float("inf") for weight in weights) or total <= 0:
        raise JobError(
            f"The updates cannot be averaged with the weights {list(weights)}: there must be at least one, "
            "none negative or infinite, and their sum above 0.",
            reason="WEIGHTS_INVALID",
        )
    return total


def _mean(
    updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float], total: float, name: str
) -> Tensor:
    summed = torch.zeros_like(updates[0][name], dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        summed += update[name].to(torch.float64, copy=True).mul_(weight)
    return summed.div_(total)


def add(state: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> State:
    """Return state + change, summed in float64 and cast to each tensor's own dtype; the rest is kept."""
    return {
        name: _add(tensor, change[name]) if name in change else tensor.clone()
        for name, tensor in state.items()
    }


def _add(tensor: Tensor, change: Tensor) -> Tensor:
    return (tensor.to(torch.float64) + change).to(tensor.dtype)


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and bytes, in order of name."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def n_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")
