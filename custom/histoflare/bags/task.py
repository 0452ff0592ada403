"""The classification task: MEM on bags, as plain numbers a job can carry.

:class:`MemTask` has the methods that a round of federated learning asks of any task (``rounds.task.Task``);
it does not import it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.bags.mem import MEM, InputNorm
from histoflare.bags.patients import PatientBatch, collate_patients, group, mean_over_slides
from histoflare.bags.predictions import Predictions
from histoflare.errors import BagError, JobError
from histoflare.seeds import derive_seed

MODEL_NAME = "mem"
LARGEST = {
    "features": 16_384,
    "memories": 256,
    "dim": 16_384,
    "hidden": 16_384,
    "blocks": 16,
    "batch_size": 4096,
    "local_epochs": 1000,
    "max_patches": 1_000_000,
    "patch_px": 16_384,
}
MOST_LABELS = 1000
MOST_WEIGHTS = 2**28
"""What a job may ask of a site's memory and time."""


class BagRecord(Protocol):
    """What the task reads of one slide's record."""

    @property
    def slide_id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def label(self) -> int: ...
    @property
    def split(self) -> str: ...
    @property
    def subgroups(self) -> Mapping[str, str]: ...
    @property
    def patches(self) -> int: ...


class Bags(Protocol):
    """What the task reads of a site's data; ``bags.cohort.Cohort`` is one."""

    @property
    def records(self) -> Sequence[Any]: ...
    @property
    def train(self) -> Sequence[Any]: ...
    def features(self, record: Any, rows: Sequence[int] | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class BagBatch:
    """A padded batch: ``features`` (b, n, f) float32, ``mask`` (b, n) bool, ``labels`` (b,) int64."""

    features: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> BagBatch:
        """Return the batch on ``device``."""
        return BagBatch(self.features.to(device), self.mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class LongestRecord:
    """A slide of :class:`LongestBags`."""

    slide_id: str
    patient: str
    patches: int
    label: int = 0
    split: str = "train"
    subgroups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LongestBags:
    """Made-up training data to measure time with: each of ``patients`` has ``slides`` times ``bag``."""

    patients: int
    slides: int
    bag: Tensor

    @property
    def train(self) -> list[LongestRecord]:
        """One record a slide."""
        return [
            LongestRecord(f"{patient}-{slide}", f"{patient}", len(self.bag))
            for patient in range(self.patients)
            for slide in range(self.slides)
        ]

    records = train

    def features(self, record: LongestRecord, rows: Sequence[int] | None = None, /) -> Tensor:
        """Return the features (n, f) of every one of them."""
        return self.bag


@dataclass(frozen=True)
class MemTask:
    """MEM, its training and its data's contract, all of it plain JSON.

    Nothing here is fitted over several patients: no feature statistics, no class weights.

    Attributes:
        labels: Class names; a record's label is an index into them. At least two.
        encoder: Id of the encoder that made the bags.
        mpp, patch_px: Of the bags' patches; ``None`` accepts any (imported features may not know).
        features, memories, dim, hidden, blocks, input_norm: See :class:`histoflare.bags.mem.MEM`.
        reconstruction: Weight (>= 0) of the autoencoder's mean squared error in the loss; 0 leaves it out.
        optimizer: ``"adam"`` or ``"sgd"`` (no momentum); made anew each round.
        learning_rate, weight_decay: Of the optimizer; > 0, >= 0.
        batch_size: Bags per step. local_epochs: Passes over the training bags per round.
        max_patches: In training a longer bag is a random subset of this size, drawn anew each epoch (under
            DP-SGD in each step), and nothing else of it is touched; ``None`` takes all. Prediction always
            takes all.
        seed: Of the initial model.

    Raises:
        JobError: A field is out of range; the message names every such field.
    """

    data: ClassVar[str] = "bags"
    class_axis: ClassVar[int] = -1

    labels: Sequence[str]
    encoder: str
    mpp: float | None = 0.5
    patch_px: int | None = 1000
    features: int = 1024
    memories: int = 10
    dim: int = 128
    hidden: int = 256
    blocks: int = 1
    input_norm: InputNorm = "none"
    reconstruction: float = 0.0
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    batch_size: int = 8
    local_epochs: int = 1
    max_patches: int | None = 256
    seed: int = 0

    def __post_init__(self) -> None:
        labels = () if isinstance(self.labels, str) else tuple(self.labels)
        object.__setattr__(self, "labels", labels)
        problems = _problems(self)
        if problems:
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise JobError(f"The task of this job cannot be used; correct these fields:{listed}")

    @property
    def model_name(self) -> str:
        """The model, as a site's policy lists it."""
        return MODEL_NAME

    @property
    def mosaic(self) -> dict[str, Any] | None:
        """How slides are cut for the model, as far as the consortium agreed; None if it left that open."""
        if self.mpp is None or self.patch_px is None:
            return None
        return {"mpp": self.mpp, "patch_px": self.patch_px}

    def to_json(self) -> dict[str, Any]:
        """Return the arguments that make this task again, as plain JSON."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MemTask:
        """Return the task of ``fields``; :class:`JobError` if one is unknown, missing or out of range."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise JobError(f"The task's fields do not fit this version of histoflare: {error}") from error

    def build_model(self) -> MEM:
        """Return the initial model: the same bytes for the same task, in every process."""
        return MEM(
            len(self.labels),
            features=self.features,
            memories=self.memories,
            dim=self.dim,
            hidden=self.hidden,
            blocks=self.blocks,
            decoder=self.reconstruction > 0,
            input_norm=self.input_norm,
            seed=derive_seed(self.seed, "model"),
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimizer over the model's parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def n_train(self, data: Bags) -> int:
        """Return the number of training bags."""
        return len(data.train)

    def n_steps(self, data: Bags) -> int:
        """Return the number of optimizer steps of one round."""
        return self.local_epochs * math.ceil(len(data.train) / self.batch_size)

    def train_batches(self, data: Bags, seed: int) -> Iterator[BagBatch]:
        """Yield one round's batches (``local_epochs`` shuffled passes); order and subsets follow ``seed``."""
        records = list(data.train)
        for epoch in range(self.local_epochs):
            generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
            order = torch.randperm(len(records), generator=generator).tolist()
            for start in range(0, len(order), self.batch_size):
                chosen = [records[index] for index in order[start : start + self.batch_size]]
                bags = [self._shown(data, record, generator) for record in chosen]
                yield collate(bags, [record.label for record in chosen])

    def loss(self, model: nn.Module, batch: BagBatch) -> Tensor:
        """Return the batch's mean cross-entropy, plus the weighted reconstruction error if there is one."""
        batch = batch.to(next(model.parameters()).device)
        if self.reconstruction > 0 and isinstance(model, MEM):
            out = model.attend(batch.features, batch.mask)
            entropy = F.cross_entropy(out.logits, batch.labels)
            return entropy + self.reconstruction * out.reconstruction.mean()
        return F.cross_entropy(model(batch.features, batch.mask), batch.labels)

    def records(self, data: Bags, record: str, slides_per_patient: int | None) -> list[tuple[BagRecord, ...]]:
        """Return the training records of DP-SGD; see :func:`histoflare.bags.patients.group`."""
        return group(data.train, record, slides_per_patient)

    def record_batch(self, data: Bags, records: Sequence[tuple[BagRecord, ...]], seed: int) -> PatientBatch:
        """Return ``records`` as one batch; a long bag's subset follows ``seed`` and its slide alone."""
        bags = [
            [
                self._shown(
                    data, slide, torch.Generator().manual_seed(derive_seed(seed, "patches", slide.slide_id))
                )
                for slide in record
            ]
            for record in records
        ]
        return collate_patients(bags, [[slide.label for slide in record] for record in records])

    def record_losses(self, model: nn.Module, batch: PatientBatch) -> Tensor:
        """Return each record's loss (P,): the mean over its slides of the loss that :meth:`loss` has."""
        batch = batch.to(next(model.parameters()).device)
        if self.reconstruction > 0 and isinstance(model, MEM):
            out = model.attend(batch.features, batch.mask)
            logits, error = out.logits, self.reconstruction * out.reconstruction  # (P, S, k), (P, S)
        else:
            logits = model(batch.features, batch.mask)
            error = logits.new_zeros(batch.labels.shape)
        entropy = F.cross_entropy(logits.flatten(end_dim=1), batch.labels.flatten(), reduction="none")
        return mean_over_slides(entropy.view_as(error) + error, batch.slides)

    def predict(self, model: nn.Module, data: Bags, split: str) -> Predictions:
        """Return the model's probabilities for ``split`` (train, validation, test or all).

        One bag at a time, so that a slide's figures do not depend on its neighbours. The caller has put the
        model in evaluation mode and switched gradients off.
        """
        if split not in ("train", "validation", "test", "all"):
            raise JobError(f"There is no split {split!r}; use train, validation, test or all.")
        records = [record for record in data.records if split in ("all", record.split)]
        rows = [self.probabilities(model, self._features(data, record)) for record in records]
        names = sorted({name for record in records for name in record.subgroups})
        return Predictions(
            probabilities=np.array(rows, dtype=np.float64).reshape(len(rows), len(self.labels)),
            labels=np.array([record.label for record in records], dtype=np.int64),
            patients=[record.patient for record in records],
            subgroups={name: [record.subgroups.get(name) or None for record in records] for name in names},
            slides=[record.slide_id for record in records],
        )

    def notes(self, table: Predictions) -> tuple[list[str], list[list[str]]]:
        """Return a table's rows for the site's own notes."""
        header = ["slide", "patient", "label", "predicted", *(f"p_{name}" for name in self.labels)]
        names = [[self.labels[index] for index in column] for column in (table.labels, table.predicted)]
        chances = [[f"{chance:.6f}" for chance in row] for row in table.probabilities.tolist()]
        columns = zip(table.slides, table.patients, *names, chances, strict=True)
        return header, [[*row, *chance] for *row, chance in columns]

    def probabilities(self, model: nn.Module, features: Tensor) -> NDArray[np.float64]:
        """Return the class probabilities (k,) of one bag (n, f)."""
        batch = collate([features], [0]).to(next(model.parameters()).device)
        logits = model(batch.features, batch.mask)  # (1, k)
        row: NDArray[np.float64] = logits[0].double().softmax(dim=-1).numpy(force=True)
        return row

    def longest(self, records: int, slides: int = 1) -> LongestBags | None:
        """Return made-up training data whose every bag is as long as one can get; None without a limit.

        Args:
            records: How many patients. slides: How many each has.
        """
        if self.max_patches is None:
            return None
        return LongestBags(records, slides, torch.randn(self.max_patches, self.features))

    def _shown(self, data: Bags, record: BagRecord, generator: torch.Generator) -> Tensor:
        """Return what a step of training sees of a bag; the choice, too, takes no longer for a longer one."""
        if self.max_patches is None or record.patches <= self.max_patches:
            return self._features(data, record)
        chance = random.Random(int(torch.randint(2**53, (), generator=generator)))
        return self._features(data, record, sorted(chance.sample(range(record.patches), self.max_patches)))

    def _features(self, data: Bags, record: BagRecord, rows: Sequence[int] | None = None) -> Tensor:
        bag = data.features(record, rows)
        if bag.ndim != 2 or bag.shape[1] != self.features:
            raise BagError(
                f"The bag of slide {record.slide_id} has shape {tuple(bag.shape)}, this job's task wants "
                f"(patches, {self.features}): prepare the slides with the job's encoder ({self.encoder})."
            )
        return bag.to(torch.float32)


def collate(bags: Sequence[Tensor], labels: Sequence[int]) -> BagBatch:
    """Return bags (n_i, f) padded with zeros to the longest, with their mask."""
    lengths = torch.tensor([len(bag) for bag in bags])  # (b,)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (b, n)
    padded = torch.stack([F.pad(bag, (0, 0, 0, longest - len(bag))) for bag in bags])  # (b, n, f)
    return BagBatch(padded, mask, torch.tensor(labels, dtype=torch.int64))


def _problems(task: MemTask) -> list[str]:
    problems = []
    if len(task.labels) < 2 or len(set(task.labels)) != len(task.labels):
        problems.append(f"labels: a list of at least two different names, not {task.labels!r}")
    if not isinstance(task.encoder, str) or not task.encoder:
        problems.append(f"encoder: the id of the encoder that made the bags, not {task.encoder!r}")
    for name in ("features", "memories", "dim", "hidden", "blocks", "batch_size", "local_epochs"):
        if not _is_count(getattr(task, name)):
            problems.append(f"{name}: a whole number of at least 1, not {getattr(task, name)!r}")
    for name in ("max_patches", "patch_px"):
        value = getattr(task, name)
        if value is not None and not _is_count(value):
            problems.append(f"{name}: a whole number of at least 1 or null, not {value!r}")
    for name, most in LARGEST.items():
        value = getattr(task, name)
        if _is_count(value) and value > most:
            problems.append(f"{name}: at most {most}, not {value}")
    if len(task.labels) > MOST_LABELS:
        problems.append(f"labels: at most {MOST_LABELS}")
    if not problems and _largest_layer(task) > MOST_WEIGHTS:
        problems.append("memories, dim, hidden, features: a layer would have more than 2 to the 28th weights")
    for name in ("learning_rate", "mpp"):
        value = getattr(task, name)
        if not (name == "mpp" and value is None) and not (_is_number(value) and value > 0):
            problems.append(f"{name}: a finite number above 0, not {value!r}")
    for name in ("reconstruction", "weight_decay"):
        if not (_is_number(getattr(task, name)) and getattr(task, name) >= 0):
            problems.append(f"{name}: a finite number of at least 0, not {getattr(task, name)!r}")
    if task.optimizer not in ("adam", "sgd"):
        problems.append(f"optimizer: adam or sgd, not {task.optimizer!r}")
    if task.input_norm not in ("none", "rms"):
        problems.append(f"input_norm: none or rms, not {task.input_norm!r}")
    if not isinstance(task.seed, int) or isinstance(task.seed, bool):
        problems.append(f"seed: a whole number, not {task.seed!r}")
    return problems


def _largest_layer(task: MemTask) -> int:
    """Return an upper bound of the weights of MEM's largest layer."""
    return max(task.features, task.hidden) * task.memories * max(task.dim, task.hidden)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
