"""The segmentation task: a network, how it is trained on windows of images, how it is asked; plain numbers.

:class:`MaskTask` has the methods that a round of federated learning asks of any task (``rounds.task.Task``);
it does not import it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.checks import is_above_zero, is_number, is_whole
from histoflare.ensemble import mean_probabilities
from histoflare.errors import JobError, MaskError, list_lines
from histoflare.masks.networks import NETWORKS, TRAINED, build_network, trained_modules
from histoflare.masks.networks.norm import NORMS
from histoflare.masks.networks.sizes import SIDE_MULTIPLE_PX, WIDTH_MULTIPLE
from histoflare.optimizers import SGD
from histoflare.seeds import derive_seed
from histoflare.slides.cohort import choose_split, group
from histoflare.tally_form import TallyForm

# What trains and predicts is imported where it is used: a FLARE server, which has no MONAI, reads the task.
if TYPE_CHECKING:
    from histoflare.masks.images import ImageCohort, ImageRecord
    from histoflare.masks.metrics import MaskPredictions

LARGEST = {
    "width": 192,
    "patch_px": 2048,
    "window_px": 16384,
    "batch_size": 4096,
    "windows_per_record": 4096,
    "local_epochs": 1000,
    "local_steps": 100_000,
}
LARGEST_ENLARGEMENT = 4
MOST_OVERLAPPING = 8
"""What a job may ask of a site's memory and time: a site that runs out of either says so by failing."""


@dataclass(frozen=True)
class MaskBatch:
    """Windows as the network sees them: ``images`` (b, 3, p, p) float32, ``masks`` (b, p, p) int64.

    Of P records of DP-SGD they are (P, b, 3, p, p) and (P, b, p, p).
    """

    images: Tensor
    masks: Tensor


@dataclass(frozen=True)
class MaskTask:
    """A segmentation network, its training and its data's contract, all of it plain JSON.

    Windows of ``window_px`` are cut out of the images every ``stride_px``, resized to ``patch_px`` (FedDP:
    1000, 500, 224), augmented and trained on by SGD whose rate falls as (1 - done)^power over all rounds.

    Attributes:
        labels: Class names; a pixel's value in a mask is an index into them. At least two.
        background: The class that figures leave out; None if there is none.
        network: One of ``masks.networks.NETWORKS``. width, norm: See :func:`build_network`.
        train: Which parameters are trained and sent, one of ``masks.networks.TRAINED``. The others stay as
            the job began with them; stochastic depth, which is for encoders that are trained, is left out
            then.
        mpp: Of the images in µm/px; None takes any.
        patch_px: Side of what the network sees, a multiple of 32.
        window_px, stride_px: Of the windows, in pixels of the images.
        augmentation: Flips, turns by 90° and HSV jitter.
        learning_rate, momentum, weight_decay, power: Of SGD and its decay; > 0, [0, 1), >= 0, >= 0. The
            momentum starts anew each round.
        batch_size: Windows per step.
        windows_per_record: Under DP-SGD, which has no ``batch_size`` of windows: how many are drawn of each
            record (a patient, or an image) in a step. A patient with fewer gives some of them again, so that
            the number is the same for all and tells nothing. So many are in memory at once.
        local_epochs: Passes over the training windows per round; or
        local_steps: Steps per round (FedDP: 5), of which each pass takes its share. One of the two is null.
        seed: Of the initial network.

    Raises:
        JobError: A field is out of range; the message names every such field.

    >>> from histoflare import MaskTask
    >>> task = MaskTask(("background", "nucleus"), background="background", width=24, patch_px=64)
    >>> task.model_name
    'dhunet'
    """

    data: ClassVar[str] = "images"
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    labels: Sequence[str]
    background: str | None = None
    network: str = "dhunet"
    width: int = 96
    norm: str = "batch"
    train: str = "all"
    mpp: float | None = None
    patch_px: int = 224
    window_px: int = 1000
    stride_px: int = 500
    augmentation: bool = True
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    batch_size: int = 24
    windows_per_record: int = 4
    local_epochs: int | None = 1
    local_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        labels = () if isinstance(self.labels, str) else tuple(self.labels)
        object.__setattr__(self, "labels", labels)
        problems = _problems(self)
        if problems:
            listed = list_lines(problems)
            raise JobError(f"The task of this job cannot be used; correct these fields:{listed}")

    @property
    def manifest_labels(self) -> Sequence[str]:
        """All classes that a manifest may name: the labels."""
        return self.labels

    @property
    def model_name(self) -> str:
        """The model, as a site's policy lists it: the network."""
        return self.network

    @property
    def tally_form(self) -> TallyForm:
        """What an evaluation under a budget counts: each patient's Dice."""
        from histoflare.masks.dice_tally import DiceTally

        kept = [index for index, label in enumerate(self.labels) if label != self.background]
        return DiceTally(tuple(kept))

    def to_json(self) -> dict[str, Any]:
        """Return the arguments that make this task again, as plain JSON."""
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MaskTask:
        """Return the task of ``fields``; :class:`JobError` if one is unknown, missing or out of range."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise JobError(f"The task's fields do not fit this version of histoflare: {error}") from error

    @property
    def sample_mixing(self) -> bool:
        """Whether an image's logits depend on others of its batch, as far as the network declares it."""
        return self.norm != "group" or NETWORKS[self.network].sample_mixing

    @property
    def trained(self) -> tuple[str, ...] | None:
        """Paths of the modules that are trained and sent; None for all."""
        return trained_modules(self.network, self.train)

    def build_model(self) -> nn.Module:
        """Return the initial network: the same bytes for the same task, in every process.

        Parameters that are not trained want no gradient.
        """
        network = build_network(
            self.network,
            len(self.labels),
            width=self.width,
            norm=self.norm,
            drop_path=self.train == "all",
            seed=derive_seed(self.seed, "model"),
        )
        if self.trained is not None:
            network.requires_grad_(False)
            for path in self.trained:
                network.get_submodule(path).requires_grad_(True)
        return network

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a fresh optimizer over the network's parameters; those without a gradient stay."""
        return SGD(
            model.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def decay(self, progress: float) -> float:
        """Return what the learning rate is multiplied by when ``progress`` (0 to 1) of the run is done."""
        return float(max(0.0, 1.0 - progress) ** self.power)

    def n_train(self, data: ImageCohort) -> int:
        """Return the number of training windows."""
        return len(self._windows(data))

    def n_steps(self, data: ImageCohort) -> int:
        """Return the number of optimizer steps of one round."""
        if self.local_steps is not None:
            return self.local_steps
        return (self.local_epochs or 1) * math.ceil(self.n_train(data) / self.batch_size)

    def train_batches(self, data: ImageCohort, seed: int) -> Iterator[MaskBatch]:
        """Yield one round's batches: shuffled passes over the windows, all of it by ``seed``."""
        from histoflare.masks.augmentation import WindowDataset

        windows = WindowDataset(
            data,
            self._windows(data),
            window_px=self.window_px,
            patch_px=self.patch_px,
            augment=self.augmentation,
        )
        for step, chosen in zip(range(self.n_steps(data)), self._orders(len(windows), seed), strict=False):
            items = [
                windows.item(index, derive_seed(seed, "window", step, place))
                for place, index in enumerate(chosen)
            ]
            yield MaskBatch(
                torch.stack([item["image"] for item in items]),
                torch.stack([item["mask"] for item in items]).long(),
            )

    def loss(self, model: nn.Module, batch: MaskBatch) -> Tensor:
        """Return the batch's loss over all of the network's heads."""
        from histoflare.masks.losses import segmentation_loss

        device = next(model.parameters()).device
        weights: Any = model.loss_weights
        return segmentation_loss(model(batch.images.to(device)), batch.masks.to(device), weights)

    def records(
        self, data: ImageCohort, record: str, slides_per_patient: int | None
    ) -> list[tuple[ImageRecord, ...]]:
        """Return the training records of DP-SGD; see :func:`histoflare.slides.cohort.group`."""
        return group(data.train, record, slides_per_patient)

    def record_batch(
        self, data: ImageCohort, records: Sequence[tuple[ImageRecord, ...]], seed: int
    ) -> MaskBatch:
        """Return ``windows_per_record`` windows of each record.

        Which windows, and how they are augmented, follows ``seed`` and that record alone.

        Raises:
            MaskError: An image of a record cannot be read, or none of its windows has an annotated pixel.
        """
        drawn = [self._drawn(data, record, seed) for record in records]
        return MaskBatch(
            torch.stack([each.images for each in drawn]), torch.stack([each.masks for each in drawn])
        )

    def record_losses(self, model: nn.Module, batch: MaskBatch) -> Tensor:
        """Return each record's loss (P,): that of :meth:`loss` over its own windows, and over no others."""
        of_records = zip(batch.images, batch.masks, strict=True)
        return torch.stack([self.loss(model, MaskBatch(images, masks)) for images, masks in of_records])

    def longest(self, records: int, slides: int = 1) -> ImageCohort:
        """Return made-up training data to measure time with: images of one window, all of it annotated.

        Args:
            records: How many patients. slides: How many images each has.
        """
        from histoflare.masks.images import made_up_images

        return made_up_images(self.labels, self.window_px, records, slides)

    def predict(self, model: nn.Module, data: ImageCohort, split: str) -> MaskPredictions:
        """Return how masks by the network agree with those given; ``split``: train, validation, test or all.

        The caller has put the network in evaluation mode and switched gradients off.

        Raises:
            MaskError: An image cannot be read any more.
            JobError: There is no such split.
        """
        from histoflare.masks.metrics import MaskPredictions

        records = choose_split(data.records, split)
        compared = [self._compare(model, data, record) for record in records]
        k, names = len(self.labels), sorted({name for record in records for name in record.subgroups})
        return MaskPredictions(
            labels=self.labels,
            background=self.background,
            columns={
                "confusion": np.array([each for each, _ in compared], dtype=np.int64).reshape(-1, k, k),
                "confusion_tissue": np.array([each for _, each in compared], dtype=np.int64).reshape(
                    -1, k, k
                ),
            },
            patients=[record.patient for record in records],
            subgroups={name: [record.subgroups.get(name) or None for record in records] for name in names},
            image_ids=[record.slide_id for record in records],
        )

    def average(self, outputs: Tensor) -> Tensor:
        """Return the logits (b, k, h, w) of the mean, pixel by pixel, of several networks' probabilities."""
        return mean_probabilities(outputs, 2)

    def notes(self, table: MaskPredictions) -> tuple[list[str], list[list[str]]]:
        """Return a table's rows for the site's own notes: each image's Dice per class."""
        return table.listed()

    def window_probabilities(self, model: nn.Module, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return class probabilities (b, k, patch_px, patch_px) of windows (b, window_px, window_px, 3)."""
        from histoflare.masks.predict import window_probabilities

        return window_probabilities(model, windows, self.patch_px)

    def _compare(
        self, model: nn.Module, data: ImageCohort, record: ImageRecord
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return an image's confusions: as it is, and with background predicted outside the tissue."""
        from histoflare.masks.metrics import confusion
        from histoflare.masks.predict import predict_image

        read = data.read(record)
        nothing = 0 if self.background is None else self.labels.index(self.background)
        predicted = predict_image(
            model,
            read.image,
            window_px=self.window_px,
            stride_px=self.stride_px,
            patch_px=self.patch_px,
            batch_size=self.batch_size,
            fallback=nothing,
        )  # (h, w)
        k = len(self.labels)
        plain = confusion(read.mask, predicted, k)
        if read.tissue is None or self.background is None:
            return plain, plain
        inside = np.where(read.tissue, predicted, nothing)
        return plain, confusion(read.mask, inside, k)

    def _windows(self, data: ImageCohort) -> list[tuple[ImageRecord, tuple[int, int]]]:
        from histoflare.masks.training_windows import training_windows

        return training_windows(data, self.window_px, self.stride_px, patch_px=self.patch_px)

    def _drawn(self, data: ImageCohort, record: Sequence[ImageRecord], seed: int) -> MaskBatch:
        """Return what a step of DP-SGD sees of one record."""
        from histoflare.masks.augmentation import WindowDataset
        from histoflare.masks.training_windows import image_windows

        sizes = {"window_px": self.window_px, "patch_px": self.patch_px}
        found = [
            window
            for image in record
            for window in image_windows(data, image, stride_px=self.stride_px, **sizes)
        ]
        if not found:
            raise MaskError(f"{record[0].slide_id}: none of this patient's windows has an annotated pixel")
        windows = WindowDataset(data, found, **sizes, augment=self.augmentation)
        of_record = derive_seed(seed, "windows", record[0].slide_id)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(of_record)).tolist()
        items = [
            windows.item(order[place % len(order)], derive_seed(of_record, place))
            for place in range(self.windows_per_record)
        ]
        return MaskBatch(
            torch.stack([item["image"] for item in items]), torch.stack([item["mask"] for item in items])
        )

    def _orders(self, windows: int, seed: int) -> Iterator[list[int]]:
        """Yield batches of window indices, pass after pass; the last batch of a pass may be smaller."""
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
            order = torch.randperm(windows, generator=generator).tolist()
            yield from (order[i : i + self.batch_size] for i in range(0, windows, self.batch_size))


def _problems(task: MaskTask) -> list[str]:
    problems = []
    if len(task.labels) < 2 or len(set(task.labels)) != len(task.labels):
        problems.append(f"labels: a list of at least two different names, not {task.labels!r}")
    if task.background is not None and task.background not in task.labels:
        problems.append(f"background: one of the labels, or null, not {task.background!r}")
    if task.network not in NETWORKS:
        problems.append(f"network: one of {', '.join(NETWORKS)}, not {task.network!r}")
    if task.norm not in NORMS:
        problems.append(f"norm: one of {', '.join(NORMS)}, not {task.norm!r}")
    if task.train not in TRAINED:
        problems.append(f"train: one of {', '.join(TRAINED)}, not {task.train!r}")
    elif task.train != "all" and task.norm == "batch":
        problems.append(
            f"norm: group where train is {task.train!r}; BatchNorm's statistics would move where nothing is "
            "trained or sent"
        )
    for name in ("width", "patch_px", "window_px", "stride_px", "batch_size", "windows_per_record"):
        if not is_whole(getattr(task, name), 1):
            problems.append(f"{name}: a whole number of at least 1, not {getattr(task, name)!r}")
    for name, most in LARGEST.items():
        value = getattr(task, name)
        if is_whole(value, 1) and value > most:
            problems.append(f"{name}: at most {most}, not {value}")
    if not problems and task.patch_px > LARGEST_ENLARGEMENT * task.window_px:
        problems.append(f"patch_px: at most {LARGEST_ENLARGEMENT} times window_px ({task.window_px})")
    if not problems and task.window_px > MOST_OVERLAPPING * task.stride_px:
        problems.append(f"stride_px: at least window_px / {MOST_OVERLAPPING}, not {task.stride_px}")
    if not problems and task.patch_px % SIDE_MULTIPLE_PX:
        problems.append(f"patch_px: a multiple of {SIDE_MULTIPLE_PX}, not {task.patch_px}")
    if not problems and task.width % WIDTH_MULTIPLE:
        problems.append(f"width: a multiple of {WIDTH_MULTIPLE}, not {task.width}")
    if not problems and task.stride_px > task.window_px:
        problems.append(f"stride_px: at most window_px ({task.window_px}), not {task.stride_px}")
    if (task.local_epochs is None) == (task.local_steps is None):
        problems.append("local_epochs or local_steps: one of them, the other null")
    for name in ("local_epochs", "local_steps"):
        value = getattr(task, name)
        if value is not None and not is_whole(value, 1):
            problems.append(f"{name}: a whole number of at least 1 or null, not {value!r}")
    if not is_above_zero(task.learning_rate):
        problems.append(f"learning_rate: a number above 0, not {task.learning_rate!r}")
    for name in ("weight_decay", "power"):
        value = getattr(task, name)
        if not (is_number(value) and value >= 0):
            problems.append(f"{name}: a number of at least 0, not {value!r}")
    if not (is_number(task.momentum) and 0 <= task.momentum < 1):
        problems.append(f"momentum: at least 0 and below 1, not {task.momentum!r}")
    if task.mpp is not None and not is_above_zero(task.mpp):
        problems.append(f"mpp: a number above 0 or null, not {task.mpp!r}")
    if not isinstance(getattr(task, "augmentation"), bool):  # noqa: B009 (its annotation is no proof)
        problems.append(f"augmentation: true or false, not {task.augmentation!r}")
    if not is_whole(task.seed):
        problems.append(f"seed: a whole number, not {task.seed!r}")
    return problems
