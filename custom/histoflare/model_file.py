"""A trained model in one file: safetensors with a JSON header that says what it is and how to use it.

The same kind of file whoever writes it: a federation's server (``global_model.safetensors``, every round), a
run on one workstation (``model.safetensors``) and ``masks pretrained``. Its one metadata entry,
:data:`ENTRY`, is JSON with these fields:

``version``
    Of the header, :data:`VERSION`.
``data``, ``model``, ``labels``, ``encoder``
    What it works on (``bags`` or ``images``), which model it is, what it tells apart, and whose features it
    wants (null of images).
``task``
    The arguments that make the task again, and with it the model.
``mosaic``
    How its slides were cut (``mpp``, ``patch_px`` and, where it is known, the rest); null of images and of
    imported features.
``protocol_sha256``
    Of the protocol that the sites agreed on; null if there was none.
``run``, ``round``
    Of a federation's model: the run's name and the round, counted from 0; else null.
``training``
    Strategy, rounds, seed and the like.
``models``
    How many models of the task it holds, where it is more than one: an ensemble (``histoflare.ensemble``).

It holds no paths, and no names or counts of slides or patients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import safetensors

from histoflare.checks import is_whole
from histoflare.errors import JobError
from histoflare.storage import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = 2
ENTRY = "histoflare.model"
"""The metadata entry; safetensors writes several in no fixed order, so there is one."""

EARLIER_ENTRIES = ("histoflare.global_model", "histoflare-mem", "histoflare-masks")
"""What earlier versions wrote: less, under three names, and the task as it is now."""

MODEL_FILE = "model.safetensors"
GLOBAL_MODEL_FILE = "global_model.safetensors"
PLACES = (MODEL_FILE, GLOBAL_MODEL_FILE, f"workspace/{GLOBAL_MODEL_FILE}")
"""Where a model lies in the folder of a run, in a server's, and in what a job's download brings."""

OF_STRATEGY = "strategy/"
"""Tensors that a strategy keeps in a global model, beside the model's own."""

WORKS = {
    "bags": "it classifies slides (histoflare classify)",
    "images": "it segments slides (histoflare segment)",
}
"""Kind of data → what a model on it does: for the message to a user who gave a model of another kind."""

LARGEST_SAFETENSORS_HEADER_BYTES = 1 << 24
LARGEST_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8


class ModelTask(Protocol):
    """A task as far as its model's file is concerned."""

    data: ClassVar[str]

    @property
    def labels(self) -> Any: ...
    @property
    def model_name(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...
    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Any: ...
    def build_model(self) -> nn.Module: ...
    def average(self, outputs: Tensor) -> Tensor: ...


Task = TypeVar("Task", bound=ModelTask)


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says of itself; see the module.

    Attributes:
        path: The file itself, where a folder was given.
    """

    path: Path
    data: str
    task: dict[str, Any]
    mosaic: dict[str, Any] | None
    protocol_sha256: str | None
    run: str | None
    round: int | None
    training: dict[str, Any]
    models: int = 1

    @property
    def labels(self) -> list[str]:
        """What the model tells apart."""
        return list(self.task["labels"])

    @property
    def mpp(self) -> float | None:
        """Resolution at which the model looks, in µm/px; None if it does not say."""
        mpp = self.task.get("mpp")
        return float(mpp) if isinstance(mpp, (int, float)) else None

    def check_data(self, data: str) -> None:
        """Raise :class:`JobError` unless the model works on ``data``."""
        if self.data != data:
            raise invalid(self.path, WORKS.get(self.data, f"it works on {self.data}"))


@dataclass(frozen=True)
class LoadedModel(Generic[Task]):
    """A model file, read: its header, its task, and the tensors of its model or ensemble, in its order."""

    header: ModelHeader
    task: Task
    state: dict[str, Tensor]

    def build_model(self) -> Any:
        """Return the task's model with these tensors, or the ensemble that they are, in evaluation mode."""
        from histoflare.ensemble import assemble, split_models

        members = []
        for state in split_models(self.state):
            members.append(self.task.build_model())
            members[-1].load_state_dict(state)
        return assemble(members, self.task.average).eval()


def save_model(
    path: Path,
    state: Mapping[str, Tensor],
    task: ModelTask,
    *,
    mosaic: Mapping[str, Any] | None = None,
    protocol_sha256: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a trained model, whole or not at all; the same arguments give the same bytes.

    Args:
        state: The model's tensors, or an ensemble's (``ensemble.join_models``). task: Makes the model.
        mosaic, protocol_sha256, training: Of the header, see the module; plain JSON.

    Raises:
        JobError: The state is not one of the task's model, or not finite.
    """
    from histoflare.ensemble import split_models

    _order(state, task, f"The model for {path.name}")
    header = describe_model(
        task,
        mosaic=mosaic,
        protocol_sha256=protocol_sha256,
        training=training,
        models=len(split_models(state)),
    )
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_model_file(path, tensors, header, public=True)


def describe_model(
    task: ModelTask,
    *,
    mosaic: Mapping[str, Any] | None = None,
    protocol_sha256: str | None = None,
    run: str | None = None,
    round_index: int | None = None,
    training: Mapping[str, Any] | None = None,
    models: int = 1,
) -> dict[str, Any]:
    """Return the header of a model of ``task``, or of an ensemble of several."""
    arguments = task.to_json()
    return {
        **({} if models == 1 else {"models": models}),
        "version": VERSION,
        "data": task.data,
        "model": task.model_name,
        "labels": list(task.labels),
        "encoder": arguments.get("encoder"),
        "task": arguments,
        "mosaic": None if mosaic is None else dict(mosaic),
        "protocol_sha256": protocol_sha256,
        "run": run,
        "round": round_index,
        "training": dict(training or {}),
    }


def write_model_file(
    path: Path, state: Mapping[str, Tensor], header: Mapping[str, Any], *, public: bool = False
) -> None:
    """Write tensors under a header of :func:`describe_model`.

    Args:
        state: Contiguous tensors on the CPU, no two of which share memory.
        public: Others may read the file.

    Raises:
        JobError: The header is larger than a reader takes.
    """
    from safetensors.torch import save_file

    text = json.dumps(header, sort_keys=True, allow_nan=False)
    if len(text.encode()) > LARGEST_HEADER_BYTES:
        raise JobError(f"{path}: the model's header would be larger than {LARGEST_HEADER_BYTES} bytes.")
    with atomic_path(path, public=public) as partial:
        save_file(dict(state), partial, metadata={ENTRY: text})


def read_model_header(path: Path) -> ModelHeader:
    """Return what a model file says of itself; no tensor is read, and no PyTorch loaded.

    Args:
        path: The file, or a folder with one of :data:`PLACES`.

    Raises:
        JobError: There is none (MODEL_FILE_MISSING), or it is damaged, has no header, or one of another
            version (MODEL_FILE_INVALID).
    """
    file = find_model_file(path)
    metadata = _read_metadata(file)
    entry = next((name for name in (ENTRY, *EARLIER_ENTRIES) if name in metadata), None)
    if entry is None:
        raise invalid(
            file, "it has no header of histoflare, so that nobody knows its task; give a file that it wrote"
        )
    try:
        said = json.loads(metadata[entry]) if len(metadata[entry]) <= LARGEST_HEADER_BYTES else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise invalid(file, "its header is not JSON, or too large")
    if entry == ENTRY and said.get("version") != VERSION:
        raise invalid(file, f"it has version {said.get('version')}, this histoflare reads {VERSION}")
    task = said.get("task")
    if not isinstance(task, dict) or not isinstance(task.get("labels"), list):
        raise invalid(file, "its header names no task")
    header = ModelHeader(
        path=file,
        data=said.get("data", "") if entry == ENTRY else _data_of_earlier(task),
        task=task,
        mosaic=said.get("mosaic"),
        protocol_sha256=said.get("protocol_sha256"),
        run=said.get("run"),
        round=said.get("round"),
        training=said.get("training") or {},
        models=said.get("models", 1),
    )
    wanted = {
        "data": isinstance(header.data, str) and header.data != "",
        "mosaic": isinstance(header.mosaic, dict | None),
        "protocol_sha256": isinstance(header.protocol_sha256, str | None),
        "run": isinstance(header.run, str | None),
        "round": header.round is None or is_whole(header.round, 0),
        "training": isinstance(header.training, dict),
        "models": type(header.models) is int and header.models >= 1,
    }
    if wrong := [name for name, fits in wanted.items() if not fits]:
        raise invalid(file, f"its header has no readable {', '.join(wrong)}")
    return header


def read_model_file(path: Path, kind: type[Task]) -> LoadedModel[Task]:
    """Read a model file.

    Args:
        path: As for :func:`read_model_header`.
        kind: The class of its task, such as ``bags.task.BagTask``.

    Raises:
        JobError: As :func:`read_model_header`, or the model is of another kind, or its tensors are not those
            of its task's model.
    """
    import safetensors.torch

    from histoflare.ensemble import split_models

    header = read_model_header(path)
    header.check_data(kind.data)
    task: Task = kind.from_json(header.task)
    try:
        found = safetensors.torch.load_file(header.path)
    except (safetensors.SafetensorError, OSError) as error:
        raise invalid(header.path, f"it is damaged ({error})") from error
    state = handed_out(found)
    if len(split_models(state)) != header.models:
        raise invalid(header.path, f"its header says that it holds {header.models}, and it does not")
    order = _order(state, task, f"The model file {header.path}")
    return LoadedModel(header, task, {name: state[name] for name in order})


def handed_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a file's tensors hand out: its model, or its ensemble, without what a run goes on from."""
    from histoflare.ensemble import only_models

    return only_models({n: tensor for n, tensor in tensors.items() if not n.startswith(OF_STRATEGY)})


def find_model_file(path: Path) -> Path:
    """Return ``path`` if it is a file, or the model in the folder ``path``; JobError (MODEL_FILE_MISSING)."""
    if path.is_dir():
        found = next((path / place for place in PLACES if (path / place).is_file()), None)
        if found is None:
            raise JobError(
                f"There is no model in the folder {path}: none of {', '.join(PLACES)}.",
                reason="MODEL_FILE_MISSING",
            )
        return found
    if not path.is_file():
        raise JobError(f"There is no model file {path}.", reason="MODEL_FILE_MISSING")
    return path


def invalid(path: Path, what: str) -> JobError:
    """Return the error of a file that is no model."""
    return JobError(f"{path} cannot be used as a model: {what}.", reason="MODEL_FILE_INVALID")


def _data_of_earlier(task: Mapping[str, Any]) -> str:
    """Return what a model of an earlier version works on: its header has the task alone."""
    return "images" if "network" in task else "bags"


def _read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; what is too large is refused before it is parsed."""
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if length > LARGEST_SAFETENSORS_HEADER_BYTES:
            raise invalid(path, "it is damaged or not a safetensors file")
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise invalid(path, f"it is damaged or not a safetensors file ({error})") from error


def _order(state: Mapping[str, Tensor], task: ModelTask, whose: str) -> list[str]:
    """Return the names in the model's order; raises :class:`JobError` unless ``state`` is one of it.

    An ensemble's, member by member: each must be a state of the model.
    """
    import torch

    from histoflare.ensemble import tensor_name

    prefixes = dict.fromkeys(name.removesuffix(tensor_name(name)) for name in state) or {"": None}
    like = task.build_model().state_dict()
    expected = {prefix + name: tensor for prefix in prefixes for name, tensor in like.items()}
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
