"""The task on bags: a model, what it learns to say and how it is trained, as plain numbers a job can carry.

:class:`BagTask` has the methods that a round of federated learning asks of any task (``rounds.task.Task``);
it does not import it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare import ranges
from histoflare.bags.models import MODELS, build_model
from histoflare.bags.models.model import BagModel, ModelSettings
from histoflare.bags.parts import read_part, say_part
from histoflare.bags.patients import PatientBatch, collate_patients, mean_over_slides
from histoflare.bags.targets import TARGETS
from histoflare.bags.targets.classes import Classes
from histoflare.bags.targets.target import Said, SlideTable, Target
from histoflare.errors import BagError, JobError, list_lines
from histoflare.optimizers import SGD, Adam
from histoflare.seeds import derive_seed
from histoflare.slides.cohort import choose_split, group
from histoflare.tally_form import TallyForm


class BagRecord(Protocol):
    """What the task reads of one slide's record."""

    @property
    def slide_id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def label(self) -> Any: ...
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
    """A padded batch: ``features`` (b, n, f) float32, ``mask`` (b, n) bool, ``labels`` (b, ...) values."""

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
    label: Any
    split: str = "train"
    subgroups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LongestBags:
    """Made-up training data to measure time with: each of ``patients`` has ``slides`` times ``bag``."""

    patients: int
    slides: int
    bag: Tensor
    label: Any

    @property
    def train(self) -> list[LongestRecord]:
        """One record a slide."""
        return [
            LongestRecord(f"{patient}-{slide}", f"{patient}", len(self.bag), self.label)
            for patient in range(self.patients)
            for slide in range(self.slides)
        ]

    records = train

    def features(self, record: LongestRecord, rows: Sequence[int] | None = None, /) -> Tensor:
        """Return the features (n, f) of every one of them."""
        return self.bag


@dataclass(frozen=True)
class BagTask:
    """A model on bags, what it learns to say, its training and its data's contract, all of it plain JSON.

    Nothing here is fitted over several patients: no feature statistics, no class weights.

    Attributes:
        labels: Names of what the model tells, in the order of its outputs; with the target ``classes`` those
            of the classes.
        encoder: Id of the encoder that made the bags.
        model: One of ``bags.models.MODELS``, or its table: ``name`` and its own settings.
        target: What it learns to say, one of ``bags.targets.TARGETS``, or its table; the labels are its own.
        mpp, patch_px: Of the bags' patches; ``None`` accepts any (imported features may not know).
        features: Length of a patch's feature vector.
        optimizer: ``"adam"`` or ``"sgd"`` (no momentum); made anew each round.
        learning_rate, weight_decay: Of the optimizer; > 0, >= 0.
        batch_size: Bags per step. local_epochs: Passes over the training bags per round.
        max_patches: In training a longer bag is a random subset of this size, drawn anew each epoch (under
            DP-SGD in each step), and nothing else of it is touched; ``None`` takes all. Prediction always
            takes all.
        seed: Of the initial model.

    Raises:
        JobError: A field is out of range; the message names every such field.

    >>> from histoflare import MODELS, BagTask
    >>> task = BagTask(("benign", "tumour"), "uni:v1", MODELS["mem"](memories=4), learning_rate=0.01)
    >>> task.model_name, task.features
    ('mem', 1024)
    """

    data: ClassVar[str] = "bags"

    labels: Sequence[str]
    encoder: str
    model: ModelSettings
    target: Target = field(default_factory=Classes)
    mpp: float | None = 0.5
    patch_px: int | None = 1000
    features: int = 1024
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
        model: Any = self.model
        if not isinstance(model, ModelSettings):
            model = read_part("model", model, MODELS)
        object.__setattr__(self, "model", model)
        target: Any = self.target
        if not isinstance(target, Target):
            target = read_part("target", target, TARGETS, given=("labels",))
        object.__setattr__(self, "target", replace(target, labels=labels))
        problems = _problems(self)
        if problems:
            raise JobError(
                f"The task of this job cannot be used; correct these fields:{list_lines(problems)}"
            )

    @property
    def model_name(self) -> str:
        """The model, as a site's policy lists it."""
        return self.model.name

    @property
    def sample_mixing(self) -> bool:
        """Whether the model's answer on a bag depends on others, as far as it declares that it does not."""
        return getattr(self.model, "sample_mixing", True) is not False

    @property
    def manifest_labels(self) -> Sequence[str] | None:
        """All labels that a manifest may hold; None where a label is no class."""
        return self.target.manifest_labels

    @property
    def lower_is_better(self) -> frozenset[str]:
        """Names of those figures that are better the lower they are."""
        return self.target.lower_is_better

    @property
    def tally_form(self) -> TallyForm | None:
        """What an evaluation under a budget counts: the target knows."""
        return self.target.tally_form

    @property
    def mosaic(self) -> dict[str, Any] | None:
        """How slides are cut for the model, as far as the consortium agreed; None if it left that open."""
        if self.mpp is None or self.patch_px is None:
            return None
        return {"mpp": self.mpp, "patch_px": self.patch_px}

    def to_json(self) -> dict[str, Any]:
        """Return the arguments that make this task again, as plain JSON; without the default target."""
        said = {**asdict(self), "labels": list(self.labels), "model": say_part(self.model)}
        said["target"] = say_part(self.target, given=("labels",))
        if self.target == Classes(tuple(self.labels)):
            del said["target"]
        return said

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> BagTask:
        """Return the task of ``fields``; :class:`JobError` if one is unknown, missing or out of range."""
        if "model" not in fields:
            raise JobError(
                "This is of an earlier histoflare, whose tasks did not name their model: use it with that "
                "one, or train again.",
                reason="MODEL_FILE_INVALID",
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise JobError(f"The task's fields do not fit this version of histoflare: {error}") from error

    def build_model(self) -> BagModel:
        """Return the initial model: the same bytes for the same task, in every process."""
        return build_model(
            self.model, self.features, self.target.outputs, seed=derive_seed(self.seed, "model")
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimizer over the model's parameters."""
        if self.optimizer == "adam":
            return Adam(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return SGD(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

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
        """Return the mean over the batch's bags of the target's loss and what the model adds to it."""
        return self._losses(model, batch).mean()

    def records(self, data: Bags, record: str, slides_per_patient: int | None) -> list[tuple[BagRecord, ...]]:
        """Return the training records of DP-SGD; see :func:`histoflare.slides.cohort.group`."""
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
        losses = self._losses(model, batch)  # (P, S)
        return mean_over_slides(losses, batch.slides.to(losses.device))

    def _losses(self, model: nn.Module, batch: BagBatch | PatientBatch) -> Tensor:
        """Return each bag's loss (...)."""
        batch = batch.to(next(model.parameters()).device)
        seen = cast(BagModel, model).attend(batch.features, batch.mask)
        losses = self.target.losses(seen.outputs, batch.labels)
        return losses if seen.auxiliary is None else losses + seen.auxiliary

    def predict(self, model: nn.Module, data: Bags, split: str) -> SlideTable:
        """Return the target's table of what the model says of ``split`` (train, validation, test or all).

        One bag at a time, so that a slide's figures do not depend on its neighbours. The caller has put the
        model in evaluation mode and switched gradients off.
        """
        records = choose_split(data.records, split)
        rows = [self._outputs(model, self._features(data, record)) for record in records]
        names = sorted({name for record in records for name in record.subgroups})
        return self.target.table(
            np.array(rows, dtype=np.float64).reshape(len(rows), self.target.outputs),
            [record.label for record in records],
            [record.patient for record in records],
            {name: [record.subgroups.get(name) or None for record in records] for name in names},
            [record.slide_id for record in records],
        )

    def notes(self, table: SlideTable) -> tuple[list[str], list[list[str]]]:
        """Return a table's rows for the site's own notes."""
        return self.target.notes(table)

    def average(self, outputs: Tensor) -> Tensor:
        """Return the outputs (...) that say the mean of several models' (m, ...): the target knows how."""
        return self.target.average(outputs)

    def answer(self, model: nn.Module, features: Tensor) -> Said:
        """Return what the model says of one bag (n, f)."""
        return self.target.answer(self._outputs(model, features))

    def _outputs(self, model: nn.Module, features: Tensor) -> NDArray[np.float64]:
        """Return the model's outputs (k,) for one bag (n, f)."""
        outputs = model(features[None].to(next(model.parameters()).device))  # (1, k)
        row: NDArray[np.float64] = outputs[0].double().numpy(force=True)
        return row

    def longest(self, records: int, slides: int = 1) -> LongestBags | None:
        """Return made-up training data whose every bag is as long as one can get; None without a limit.

        Args:
            records: How many patients. slides: How many each has.
        """
        if self.max_patches is None:
            return None
        return LongestBags(records, slides, torch.randn(self.max_patches, self.features), self.target.example)

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


def collate(bags: Sequence[Tensor], labels: Sequence[Any]) -> BagBatch:
    """Return bags (n_i, f) padded with zeros to the longest, with their mask and their target's values."""
    lengths = torch.tensor([len(bag) for bag in bags])  # (b,)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (b, n)
    padded = torch.stack([F.pad(bag, (0, 0, 0, longest - len(bag))) for bag in bags])  # (b, n, f)
    return BagBatch(padded, mask, torch.tensor(labels))


def _problems(task: BagTask) -> list[str]:
    problems = [*task.target.problems()]
    if not isinstance(task.encoder, str) or not task.encoder:
        problems.append(f"encoder: the id of the encoder that made the bags, not {task.encoder!r}")
    of_features = ranges.whole("features", task.features, 16_384)
    problems += of_features or [f"model.{problem}" for problem in task.model.problems(task.features)]
    return [
        *problems,
        *ranges.above_zero("mpp", task.mpp, or_null=True),
        *ranges.whole("patch_px", task.patch_px, 16_384, or_null=True),
        *ranges.one_of("optimizer", task.optimizer, ("adam", "sgd")),
        *ranges.above_zero("learning_rate", task.learning_rate),
        *ranges.at_least_zero("weight_decay", task.weight_decay),
        *ranges.whole("batch_size", task.batch_size, 4096),
        *ranges.whole("local_epochs", task.local_epochs, 1000),
        *ranges.whole("max_patches", task.max_patches, 1_000_000, or_null=True),
        *ranges.seed("seed", task.seed),
    ]
