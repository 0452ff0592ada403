"""Several models that answer as one: each is asked, and their answers are averaged.

An ensemble travels as one state, like a single model: its members' tensors under ``member/<name>/``. Whoever
is handed a state makes of it what it is, one model or an ensemble (:func:`assemble`), and asks either in the
same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

MEMBER = "member/"
"""Prefix of an ensemble's tensors; a member's name, a slash and the tensor's name follow."""

Value = TypeVar("Value")
Average = Callable[[Tensor], Tensor]


def join_models(models: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """Return the tensors of several models as one state; those of a single one as they are.

    Args:
        models: Name, without a slash → the model's tensors.
    """
    if len(models) == 1:
        return dict(*models.values())
    return {
        f"{MEMBER}{name}/{tensor}": value for name, model in models.items() for tensor, value in model.items()
    }


def split_models(state: Mapping[str, Value]) -> list[dict[str, Value]]:
    """Return the models in a state: an ensemble's members, by name, or the one model that it is.

    Of a state that has both, the members: the rest is what a federation goes on from.
    """
    members: dict[str, dict[str, Value]] = {}
    for name, value in state.items():
        if name.startswith(MEMBER):
            member, _, tensor = name.removeprefix(MEMBER).partition("/")
            members.setdefault(member, {})[tensor] = value
    return [members[name] for name in sorted(members)] or [dict(state)]


def only_models(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return a state with only the tensors of an ensemble's members; that of one model as it is."""
    members = {name: value for name, value in state.items() if name.startswith(MEMBER)}
    return members or dict(state)


def tensor_name(name: str) -> str:
    """Return the name that a tensor of a state has in its model."""
    return name.removeprefix(MEMBER).partition("/")[2] if name.startswith(MEMBER) else name


class Ensemble(nn.Module):
    """Models whose answers are averaged. It gives what one of them gives.

    Args:
        members: Models of one task.
        average: The task's own: outputs of the members (m, ...) → the outputs (...) that say their mean.
    """

    def __init__(self, members: Sequence[nn.Module], average: Average) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.average = average

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return outputs of the same shape as a member's."""
        return self.average(torch.stack([member(*inputs) for member in self.members]))


def mean_probabilities(logits: Tensor, class_axis: int) -> Tensor:
    """Return the logits (...) whose softmax is the mean of the members' softmax.

    Args:
        logits: (m, ...). class_axis: Along which of its axes the classes lie.
    """
    return logits.log_softmax(dim=class_axis).logsumexp(dim=0) - math.log(len(logits))


def assemble(models: Sequence[nn.Module], average: Average) -> nn.Module:
    """Return one model as it is, or several as an :class:`Ensemble`."""
    return models[0] if len(models) == 1 else Ensemble(models, average)


def members_of(model: nn.Module) -> list[nn.Module]:
    """Return an ensemble's members; of any other model, the model itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]
