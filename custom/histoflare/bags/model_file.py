"""A trained MEM in one file, with all that its use needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from histoflare.bags.mem import MEM
from histoflare.bags.task import MemTask
from histoflare.model_file import check_state, invalid, read_model_file, write_model_file

FORMAT = "histoflare-mem"


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds.

    Attributes:
        state: The model's tensors, in the model's own order.
        task: The task that makes the model; names the encoder and the labels.
        mosaic: Mosaic parameters of the slides it was trained on, as JSON; None if unknown.
        training: Strategy, rounds, seed and the like, as JSON.
    """

    state: dict[str, Tensor]
    task: MemTask
    mosaic: dict[str, Any] | None
    training: dict[str, Any]

    def build_model(self) -> MEM:
        """Return the trained model, in evaluation mode."""
        model = self.task.build_model()
        model.load_state_dict(self.state)
        return model.eval()


def save_model(
    path: Path,
    state: Mapping[str, Tensor],
    task: MemTask,
    *,
    mosaic: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a model file, whole or not at all; the same arguments give the same bytes.

    Args:
        mosaic, training: See :class:`ModelFile`; plain JSON.

    Raises:
        JobError: The state is not one of the task's model, or not finite.
    """
    check_state(state, task.build_model().state_dict(), f"The model for {path.name}")
    header = {
        "encoder": task.encoder,
        "task": task.to_json(),
        "mosaic": None if mosaic is None else dict(mosaic),
        "training": dict(training or {}),
    }
    write_model_file(path, FORMAT, state, header)


def load_model(path: Path) -> ModelFile:
    """Read a model file.

    Raises:
        JobError: No such file, not a model file of this version, or its tensors are not its task's model.
    """
    tensors, header = read_model_file(path, FORMAT)
    if not isinstance(header.get("mosaic"), dict | None):
        raise invalid(path, "its header has no readable mosaic parameters")
    task = MemTask.from_json(header["task"])
    order = check_state(tensors, task.build_model().state_dict(), f"The model file {path}")
    return ModelFile(
        {name: tensors[name] for name in order}, task, header.get("mosaic"), header.get("training") or {}
    )
