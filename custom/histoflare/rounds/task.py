"""What a round asks of a task. A round is handed a task and its data; it imports neither."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.tally_form import TallyForm

Columns = Mapping[str, NDArray[Any]]
"""Name → (n, …), one row per slide or image."""

Measure = Callable[[Columns, NDArray[np.float64]], NDArray[np.float64]]
"""(columns, weights (b, n) >= 0) → (b,): a figure under each row of weights; NaN where it does not exist."""


Support = Callable[[Columns], NDArray[np.bool_]]
"""columns → (n, parts): the rows that each part of a figure (each class) rests on."""


class PredictionTable(Protocol):
    """One row per slide (or image) of one split, and how good predictions of this kind are told.

    ``patients`` n names; ``subgroups`` column → n values, None where a row has none. Two tables of one task
    can be put one after the other.
    """

    @property
    def columns(self) -> Columns:
        """What the measures are computed of."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Name of a figure (as in a protocol's ``metric``) → how it is computed."""

    @property
    def supports(self) -> Mapping[str, Support]:
        """Name of a figure → the rows behind it; one that is not named rests on all rows."""

    @property
    def unbounded(self) -> Collection[str]:
        """Names of those figures that do not lie between 0 and 1."""

    @property
    def why_missing(self) -> str:
        """In words, why a figure may not exist."""

    @property
    def patients(self) -> Sequence[str]: ...
    @property
    def subgroups(self) -> Mapping[str, Sequence[str | None]]: ...


class Task(Protocol):
    """A model, how it is trained, and how it is asked.

    Data and batches are the task's own types. Everything random follows the seeds handed in, torch's global
    generator included (local training seeds it and puts it back).
    """

    data: ClassVar[str]
    """The kind of data it is trained on, by its name in ``site.kinds``."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of what the model tells, such as classes, in the order of its outputs."""

    @property
    def manifest_labels(self) -> Sequence[str] | None:
        """All labels that a site's manifest may hold; None where a label is no class."""

    @property
    def lower_is_better(self) -> Collection[str]:
        """Names of those figures that are better the lower they are."""

    @property
    def model_name(self) -> str:
        """Name of the model, as the policies of sites list it."""

    @property
    def tally_form(self) -> TallyForm | None:
        """What an evaluation under a budget counts; None if it has no figures that can be counted."""

    def to_json(self) -> dict[str, Any]:
        """Return its settings, as plain JSON."""

    def build_model(self) -> nn.Module:
        """Return the initial model: the same bytes in every process."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimizer; its state lives for one round."""

    def n_train(self, data: Any) -> int:
        """Return the number of training samples."""

    def n_steps(self, data: Any) -> int:
        """Return the number of optimizer steps of one round: as many as :meth:`train_batches` yields."""

    def train_batches(self, data: Any, seed: int) -> Iterable[Any]:
        """Yield the batches of one round, all its local epochs."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of one batch."""

    def average(self, outputs: Tensor) -> Tensor:
        """Return the outputs that say the mean of several models' answers (``histoflare.ensemble``).

        Args:
            outputs: Of all of them (m, ...).
        """

    def predict(self, model: nn.Module, data: Any, split: str) -> PredictionTable:
        """Return predictions for ``split``: train, validation, test or all."""

    def notes(self, table: Any) -> tuple[list[str], list[list[str]]]:
        """Return a table of :meth:`predict` for the site's own notes: column names, and one row for each."""


@runtime_checkable
class Decaying(Protocol):
    """A task whose learning rate falls over the whole run, and not only within a round."""

    def decay(self, progress: float) -> float:
        """Return what the learning rate is multiplied by when ``progress`` (0 to 1) of the run is done."""


@runtime_checkable
class PartlyTrained(Protocol):
    """A task that can train a part of its model alone."""

    @property
    def trained(self) -> Sequence[str] | None:
        """Paths of the modules that are trained; None for all. Other parameters want no gradient."""


@runtime_checkable
class PerRecord(Protocol):
    """What DP-SGD asks of a task besides: its training data in records, and the loss of each by itself.

    A record is what is sampled and clipped. The loss of one must depend on no other record of the batch.
    """

    @property
    def sample_mixing(self) -> bool:
        """Whether what the model says of one record depends on others; DP-SGD refuses it then."""

    def records(self, data: Any, record: str, slides_per_patient: int | None) -> list[Any]:
        """Return the training records in a fixed order.

        Args:
            record: ``"patient"``: all of a patient's slides are one record. ``"slide"``: each slide is one.
            slides_per_patient: A patient's further slides are not used; None takes all.
        """

    def record_batch(self, data: Any, records: Sequence[Any], seed: int) -> Any:
        """Return ``records`` as one batch; what is drawn of a record follows ``seed`` and that record."""

    def record_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the losses (records,) of a batch of :meth:`record_batch`."""
