"""A trained segmentation network in one file, with all that its use needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from histoflare.masks.task import MaskTask
from histoflare.model_file import GLOBAL_MODEL, check_state, invalid, read_model_file, write_model_file

FORMAT = "histoflare-masks"
OF_STRATEGY = "strategy/"
"""Tensors that a strategy keeps in a global model, beside the network's."""


@dataclass(frozen=True)
class MaskModelFile:
    """What a model file holds.

    Attributes:
        state: The network's tensors, in its own order.
        task: The task that makes the network; names classes, resolution and windows.
        training: Strategy, rounds, seed and the like, as JSON.
    """

    state: dict[str, Tensor]
    task: MaskTask
    training: dict[str, Any]

    def build_model(self) -> nn.Module:
        """Return the trained network, in evaluation mode."""
        model = self.task.build_model()
        model.load_state_dict(self.state)
        return model.eval()


def save_mask_model(
    path: Path, state: Mapping[str, Tensor], task: MaskTask, *, training: Mapping[str, Any] | None = None
) -> None:
    """Write a model file, whole or not at all; the same arguments give the same bytes.

    Raises:
        JobError: The state is not one of the task's network, or not finite.
    """
    check_state(state, task.build_model().state_dict(), f"The model for {path.name}")
    write_model_file(path, FORMAT, state, {"task": task.to_json(), "training": dict(training or {})})


def load_mask_model(path: Path) -> MaskModelFile:
    """Read a model file, or the global model that a federation's server wrote.

    Raises:
        JobError: No such file, not a model file of this version, or its tensors are not its task's network.
    """
    tensors, header = read_model_file(path, FORMAT, GLOBAL_MODEL)
    if "network" not in header["task"]:
        raise invalid(path, "it classifies slides, and does not segment them (histoflare classify)")
    task = MaskTask.from_json(header["task"])
    expected = task.build_model().state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_STRATEGY)}
    order = check_state(tensors, expected, f"The model file {path}")
    return MaskModelFile({name: tensors[name] for name in order}, task, header.get("training") or {})
