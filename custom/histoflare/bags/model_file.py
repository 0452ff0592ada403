"""A trained model in one file: safetensors with a JSON header that says what it is and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from histoflare import storage
from histoflare.bags.mem import MEM
from histoflare.bags.task import MemTask
from histoflare.errors import JobError

FORMAT = "histoflare-mem"
VERSION = 1


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
    _check_state(state, task, f"The model for {path.name}")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": task.encoder,
        "task": task.to_json(),
        "mosaic": None if mosaic is None else dict(mosaic),
        "training": dict(training or {}),
    }
    # One metadata entry: safetensors writes several in no fixed order.
    metadata = {FORMAT: json.dumps(header, sort_keys=True, allow_nan=False)}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    storage.write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def load_model(path: Path) -> ModelFile:
    """Read a model file.

    Raises:
        JobError: No such file, not a model file of this version, or its tensors are not its task's model.
    """
    if not path.is_file():
        raise JobError(f"There is no model file {path}.", reason="MODEL_FILE_MISSING")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            text = (opened.metadata() or {}).get(FORMAT)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise _invalid(path, f"it is damaged or not a safetensors file ({error})") from error
    try:
        header = json.loads(text or "null")
    except json.JSONDecodeError as error:
        raise _invalid(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _invalid(path, "it was not written by histoflare (no histoflare-mem header)")
    if header.get("version") != VERSION:
        raise _invalid(path, f"it has version {header.get('version')}, this histoflare reads {VERSION}")
    if not isinstance(header.get("task"), dict):
        raise _invalid(path, "its header names no task")
    if not isinstance(header.get("mosaic"), dict | None):
        raise _invalid(path, "its header has no readable mosaic parameters")
    task = MemTask.from_json(header["task"])
    order = _check_state(tensors, task, f"The model file {path}")
    return ModelFile(
        {name: tensors[name] for name in order}, task, header.get("mosaic"), header.get("training") or {}
    )


def _check_state(state: Mapping[str, Tensor], task: MemTask, whose: str) -> list[str]:
    """Return the names in the model's order; raises :class:`JobError` unless ``state`` is a state of it."""
    expected = task.build_model().state_dict()
    wrong = sorted(set(state) ^ set(expected))
    wrong += [name for name in expected if name in state and state[name].shape != expected[name].shape]
    wrong += [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise JobError(
            f"{whose} does not fit its task: missing, unknown, wrongly shaped or non-finite are "
            f"{', '.join(wrong[:5])}. It belongs to another task, or training diverged.",
            reason="MODEL_FILE_INVALID",
        )
    return list(expected)


def _invalid(path: Path, what: str) -> JobError:
    return JobError(f"{path} cannot be used as a model: {what}.", reason="MODEL_FILE_INVALID")
