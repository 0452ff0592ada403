"""The messages between a trainer and its process, and how tensors are sent in them.

One message is a small pickled head (kind, content, the tensors' names, dtypes and shapes) and then each
tensor's bytes as they lie in memory: to pickle the tensors too would copy all of them at once on either side.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.privacy.tally import Tally
from histoflare.rounds.state import hash_state
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.transport import Transport
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TrainerSetup:
    """What a trainer's process is given when it starts.

    Attributes:
        site: The site's FLARE name; seeds depend on it.
        configuration: The site's own.
        task: What is learned (``bags.task.BagTask``); has the labels, encoder, mpp and patch_px of the bags.
        strategy: How sites work together. transport: How an update travels.
        seed: The job's.
        run: Name of the run, for the site's own notes; the same for a job that continues another.
        plan: What protects the updates, settled for the job's rounds.
        roles: Patient → train, validation or test, as the ledger has them; None where no ledger is kept.
        split: The protocol's rule, for a manifest without a split column.
        tally: The noise of an evaluation, settled; None: its figures are told as they are.
    """

    site: str
    configuration: SiteConfiguration
    task: Any
    strategy: Strategy
    seed: int
    run: str
    plan: PrivacyPlan = field(default_factory=Open)
    roles: Mapping[str, str] | None = None
    split: SplitRule = DEFAULT_SPLIT
    transport: Transport = PLAIN
    tally: Tally | None = None


@dataclass(frozen=True)
class TrainAnswer:
    """A site's half of a round, or its counts in an evaluation under a budget.

    Attributes:
        tensors: The update: local minus global. Or the noised counts.
        weight: Of the update.
        metrics: Those asked for, of the model as it was received; None where a figure does not exist.
        patients: Patients trained on, or asked about.
        metric_patients: Patients behind the part of the metrics that the fewest are behind.
        numbers: What the strategy sends beside the tensors.
    """

    tensors: Arrays
    weight: float
    metrics: dict[str, float | None]
    patients: int
    metric_patients: int = 0
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateAnswer:
    """How well a model does at a site.

    Attributes:
        metrics: The task's figures, each also with ``_low`` and ``_high`` (95 % interval over patients),
            n_slides and n_patients; None where a figure does not exist.
        patients: Patients the metrics were computed over.
        behind: Metric → patients behind the part of it that the fewest are behind, where that is fewer.
        cells: Block → name of a count → patients, exact and whole: what of it may leave is yet to be said.
    """

    metrics: dict[str, float | None]
    patients: int
    behind: Mapping[str, int] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of tensors, arrays or numbers (None: NaN)."""
    return hash_state({name: _as_tensor(value) for name, value in content.items()})


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, float | int | None):
        return torch.tensor(float("nan") if value is None else value, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(value))


def send(
    connection: Connection[Any, Any],
    kind: str,
    content: Any = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Send one message.

    Raises:
        OSError: The other side is gone.
    """
    whole = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    connection.send((kind, content, [(name, array.dtype, array.shape) for name, array in whole.items()]))
    for array in whole.values():
        connection.send_bytes(_as_bytes(array))


def receive(connection: Connection[Any, Any]) -> tuple[str, Any, Arrays]:
    """Wait for one message and return its kind, content and tensors.

    Raises:
        EOFError, OSError: The other side is gone.
    """
    kind, content, outline = connection.recv()
    arrays: Arrays = {}
    for name, dtype, shape in outline:
        arrays[name] = np.empty(shape, dtype)
        connection.recv_bytes_into(_as_bytes(arrays[name]))
    return kind, content, arrays


def _as_bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
