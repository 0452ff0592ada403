"""What a model must be for DP-SGD: each record's gradient its own, and nothing else that keeps records."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from histoflare.errors import JobError

ENGINES = ("bookkeeping", "hooks", "ghost", "microbatch")
"""How the per-record gradients of a batch are had; a matter of speed and of the layers it takes.

``bookkeeping``: ours, for models whose parameters are all in ``nn.Linear``. ``hooks`` and ``ghost``: Opacus,
with and without a gradient for each record. ``microbatch``: one backward pass for each record, any layer.
Training under protection takes one record at a time, in one way (``gradients.sum_one_by_one``), and needs
what ``microbatch`` needs; these are what it is compared with.
"""


def check_model(model: nn.Module, engine: str = "microbatch") -> None:
    """Raise :class:`JobError` unless ``engine`` can train ``model`` under DP-SGD; it names every reason.

    Refused for every engine: BatchNorm (it mixes records, and its statistics would leave unprotected),
    InstanceNorm with running statistics, no parameter to train, and parameters that are not float32 or
    float64. For all but ``microbatch``: one parameter under two names. For ``bookkeeping``: a parameter that
    is not in an ``nn.Linear``. For ``hooks`` and ``ghost``: what Opacus refuses.

    What cannot be seen here is met in training: buffers are put back after each record, and in a batch,
    parameters used outside their layer are looked for.

    Raises:
        JobError: The model will not do (MODEL_NOT_PRIVATE), or there is no such engine (PRIVACY_INVALID).
    """
    if engine not in ENGINES:
        raise JobError(
            f"There is no engine {engine!r}; there are: {', '.join(ENGINES)}.", reason="PRIVACY_INVALID"
        )
    problems = [*_layer_problems(model), *_parameter_problems(model)]
    if engine != "microbatch":
        problems += _tied(model)
    if engine == "bookkeeping":
        problems += _not_linear(model)
    elif engine in ("hooks", "ghost") and not problems:
        problems += _opacus_problems(model)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise JobError(
            f"This model cannot be trained under DP-SGD with the engine {engine!r}:{listed}",
            reason="MODEL_NOT_PRIVATE",
        )


def _layer_problems(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm):
            yield f"{where} mixes the records of a batch and keeps their statistics; use GroupNorm instead"
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield f"{where} keeps statistics of the records; set track_running_stats=False"


def _parameter_problems(model: nn.Module) -> Iterator[str]:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield "no parameter to train"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"{name} has no shape yet; run the model once before"
        elif parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            yield f"{name} is {parameter.dtype}; norms are only right in float32 and float64"


def _tied(model: nn.Module) -> list[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [f"{' and '.join(same)} are one parameter" for same in names.values() if len(same) > 1]


def _not_linear(model: nn.Module) -> list[str]:
    in_linear = {
        id(parameter)
        for module in model.modules()
        if type(module) is nn.Linear
        for parameter in (module.weight, module.bias)
        if parameter is not None
    }
    return [
        f"{name} is not the weight or bias of an nn.Linear"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in in_linear
    ]


def _opacus_problems(model: nn.Module) -> list[str]:
    from opacus.validators import ModuleValidator  # takes a second and 100 MB

    return [f"Opacus: {error}" for error in ModuleValidator.validate(model, strict=False)]
