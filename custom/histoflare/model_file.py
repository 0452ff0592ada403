"""A trained model in one file: safetensors with a JSON header that says what it is and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from histoflare import storage
from histoflare.errors import JobError

VERSION = 1

OTHER_KINDS = {
    "histoflare-mem": "it classifies slides (histoflare classify)",
    "histoflare-masks": "it segments slides (histoflare segment)",
}
"""What to say of a model of another kind."""

GLOBAL_MODEL = "histoflare.global_model"
"""The metadata entry of the models that a federation's server writes; it names their task too."""


def write_model_file(path: Path, kind: str, state: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and their header, whole or not at all; the same arguments give the same bytes.

    Args:
        kind: What the file is; the name of its one metadata entry.
        header: Plain JSON.
    """
    # One metadata entry: safetensors writes several in no fixed order.
    content = {"format": kind, "version": VERSION, **header}
    metadata = {kind: json.dumps(content, sort_keys=True, allow_nan=False)}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    storage.write_bytes(path, safetensors.torch.save(tensors, metadata=metadata), public=True)


def read_model_file(path: Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a file of one of these kinds; the header has a ``task``.

    Raises:
        JobError: No such file, or not a model file of this kind and version.
    """
    if not path.is_file():
        raise JobError(f"There is no model file {path}.", reason="MODEL_FILE_MISSING")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise invalid(path, f"it is damaged or not a safetensors file ({error})") from error
    kind = next((kind for kind in kinds if kind in metadata), kinds[0])
    try:
        header = json.loads(metadata.get(kind, "null"))
    except json.JSONDecodeError as error:
        raise invalid(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format", kind) != kind:
        if any(name in OTHER_KINDS for name in metadata):
            raise invalid(path, OTHER_KINDS[next(name for name in metadata if name in OTHER_KINDS)])
        raise invalid(path, f"it was not written by histoflare for this use (no {kind} header)")
    if kind != GLOBAL_MODEL and header.get("version") != VERSION:
        raise invalid(path, f"it has version {header.get('version')}, this histoflare reads {VERSION}")
    if not isinstance(header.get("task"), dict):
        raise invalid(path, "its header names no task")
    return tensors, header


def read_task(path: Path) -> dict[str, Any]:
    """Return the task of a model file of any kind, as JSON; errors as :func:`read_model_file`."""
    if not path.is_file():
        raise JobError(f"There is no model file {path}.", reason="MODEL_FILE_MISSING")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            headers = [json.loads(text) for text in (opened.metadata() or {}).values()]
        task = headers[0]["task"]
    except (safetensors.SafetensorError, OSError) as error:
        raise invalid(path, f"it is damaged or not a safetensors file ({error})") from error
    except (ValueError, LookupError, TypeError):
        raise invalid(path, "its header names no task") from None
    if not isinstance(task, dict):
        raise invalid(path, "its header names no task")
    return task


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str) -> list[str]:
    """Return the names in the model's order; raises :class:`JobError` unless ``state`` is a state of it."""
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


def invalid(path: Path, what: str) -> JobError:
    """Return the error of a file that is no model."""
    return JobError(f"{path} cannot be used as a model: {what}.", reason="MODEL_FILE_INVALID")
