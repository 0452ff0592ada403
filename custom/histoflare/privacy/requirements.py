"""What a model must be for DP-SGD: each record's gradient its own, and nothing else that keeps records."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from histoflare.errors import JobError, list_lines


def check_model(model: nn.Module) -> None:
    """Raise :class:`JobError` unless ``model`` can be trained under DP-SGD; it names every reason.

    Refused: BatchNorm (it mixes records, and its statistics would leave unprotected), InstanceNorm with
    running statistics, no parameter to train, and parameters that are not float32 or float64. What cannot be
    seen here is met in training: buffers are put back after each record.

    Raises:
        JobError: The model will not do (MODEL_NOT_PRIVATE).
    """
    problems = [*_layer_problems(model), *_parameter_problems(model)]
    if problems:
        raise JobError(
            f"This model cannot be trained under DP-SGD:{list_lines(problems)}", reason="MODEL_NOT_PRIVATE"
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
