"""One class for each slide: cross-entropy, and accuracy, balanced accuracy and AUC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from histoflare.bags.targets.class_tally import ClassTally
from histoflare.bags.targets.target import Floats, Said, Target
from histoflare.checks import is_above_zero
from histoflare.ensemble import mean_probabilities
from histoflare.errors import BagError, JobError

MOST_LABELS = 1000

MOST_TIMES = 1_000_000
"""How many times as common as the rarest class the most common one may be said to be."""

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Classes(Target):
    """One of several classes, whose names are the labels of manifests; a slide's value is its index.

    With ``class_shares`` π the loss is the logit-adjusted cross-entropy of Menon et al. 2021 (Long-tail
    learning via logit adjustment, eq. 10, τ = 1): softmax(outputs + log π) against the class. How common a
    class is then need not be learned, and is no part of the answer: probabilities are those of a patient
    whose classes are equally likely beforehand, and the most probable class is the one to name for balanced
    accuracy. Under noise that matters: what is not learned has no noise. A bag's gradient is as bounded as
    without them, since softmax(outputs + log π) is a softmax.

    Attributes:
        class_shares: How common each of the labels is where the model learns, in their order, above 0, in any
            proportion (0.8 and 0.2, or 4 and 1); None: whatever the data say is learned. They are no part of
            what noise protects, so under a budget they are public numbers: of a register, of the literature,
            or how patients are agreed to be chosen, and never a count of those who are trained on.
    """

    name: ClassVar[str] = "classes"

    class_shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.class_shares, list):
            object.__setattr__(self, "class_shares", tuple(self.class_shares))

    def problems(self) -> list[str]:
        """Return what is wrong with the names, or with the shares."""
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            return [f"labels: a list of at least two different names, not {self.labels!r}"]
        if len(self.labels) > MOST_LABELS:
            return [f"labels: at most {MOST_LABELS}"]
        shares = self.class_shares
        if shares is None or (
            isinstance(shares, tuple)
            and len(shares) == len(self.labels)
            and all(is_above_zero(share) for share in shares)
            and max(shares) / min(shares) <= MOST_TIMES
        ):
            return []
        return [
            f"target.class_shares: a number above 0 for each of the {len(self.labels)} labels, none more "
            f"than {MOST_TIMES:,} times another, not {shares!r}"
        ]

    @property
    def outputs(self) -> int:
        """One logit for each class."""
        return len(self.labels)

    @property
    def manifest_labels(self) -> Sequence[str]:
        """The classes."""
        return self.labels

    @property
    def classes(self) -> Sequence[str]:
        """All of them."""
        return self.labels

    @property
    def tally_form(self) -> ClassTally:
        """Who is taken for what, and how scores lie."""
        return ClassTally(self.labels)

    @property
    def example(self) -> int:
        """The first class."""
        return 0

    def value_of(self, label: str) -> int:
        """Return the index of the class ``label``."""
        if label not in self.labels:
            known = ", ".join(self.labels)
            raise BagError(f"unknown label '{label}'; the job's labels (protocol.labels) are {known}")
        return self.labels.index(label)

    def say(self, value: int) -> str:
        """Return the class's name."""
        return self.labels[value]

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Return each bag's cross-entropy, logit-adjusted where the classes' shares are given."""
        if self.class_shares is not None:
            outputs = outputs + torch.tensor(self.class_shares, dtype=torch.float64).log().to(outputs)
        entropy = F.cross_entropy(outputs.flatten(end_dim=-2), values.flatten(), reduction="none")
        return entropy.view_as(values)

    def average(self, outputs: Tensor) -> Tensor:
        """Return the logits (...) of the mean of the models' probabilities."""
        return mean_probabilities(outputs, -1)

    def answer(self, outputs: Floats) -> Said:
        """Return the most probable class, of equally probable ones the first, and all probabilities."""
        shares = dict(zip(self.labels, _softmax(outputs).tolist(), strict=True))
        return Said(max(shares, key=shares.__getitem__), shares)

    def table(
        self,
        outputs: Floats,
        values: Sequence[int],
        patients: Sequence[str],
        subgroups: Mapping[str, Sequence[str | None]],
        slides: Sequence[str],
    ) -> Predictions:
        """Return the probabilities of n slides."""
        return Predictions(
            _softmax(outputs), np.array(values, dtype=np.int64), patients, subgroups, slides=slides
        )

    def notes(self, table: Predictions) -> tuple[list[str], list[list[str]]]:
        """Return each slide's class, the predicted one, and every class's probability."""
        header = ["slide", "patient", "label", "predicted", *(f"p_{name}" for name in self.labels)]
        names = [[self.say(index) for index in column] for column in (table.labels, table.predicted)]
        chances = [[f"{chance:.6f}" for chance in row] for row in table.probabilities.tolist()]
        columns = zip(table.slides, table.patients, *names, chances, strict=True)
        return header, [[*row, *chance] for *row, chance in columns]


def _softmax(outputs: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # of a model that diverged nothing is known
        powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        probabilities: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


@dataclass(frozen=True)
class Predictions:
    """Predictions of one split, one row per slide; checked when made.

    Attributes:
        probabilities: (n, k), k >= 2, finite, >= 0, rows summing to 1.
        labels: (n,), in [0, k).
        patients: Whose slide each row is.
        subgroups: Column (sex, age_band, scanner, site, …) → one value or None per row.
        slides: Ids of the slides, where they are known.

    Raises:
        JobError: The parts do not fit one another.
    """

    measures: ClassVar[dict[str, Callable[[Columns, Floats], Floats]]]
    supports: ClassVar[dict[str, Callable[[Columns], NDArray[np.bool_]]]]
    unbounded: ClassVar[frozenset[str]] = frozenset()
    why_missing: ClassVar[str] = "all slides are of one class"

    probabilities: Floats
    labels: NDArray[np.int64]
    patients: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]]
    slides: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        n = len(self.labels)
        shape = self.probabilities.shape
        if len(shape) != 2 or shape[0] != n or shape[1] < 2 or len(self.patients) != n:
            raise JobError(f"{n} labels and {len(self.patients)} patients do not fit probabilities {shape}.")
        wrong = [column for column, values in self.subgroups.items() if len(values) != n]
        if wrong:
            raise JobError(
                f"The subgroup columns {', '.join(wrong)} do not have one value for each of {n} rows."
            )
        sums = self.probabilities.sum(axis=1)
        if not (np.isfinite(sums).all() and (self.probabilities >= 0).all() and (abs(sums - 1) < 1e-3).all()):
            raise JobError(
                "Predicted probabilities must be finite, at least 0 and sum to 1 in each row; where they are "
                "not, training diverged: use a smaller learning rate."
            )
        if n and (self.labels.min() < 0 or self.labels.max() >= shape[1]):
            raise JobError(f"Labels must be in [0, {shape[1]}).")

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Index of each slide's most probable class: (n,)."""
        predicted: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return predicted

    @property
    def columns(self) -> Columns:
        """What the measures are computed of."""
        return {"probabilities": self.probabilities, "labels": self.labels}


def accuracy(columns: Columns, weights: Floats) -> Floats:
    """Return the share of slides whose most probable class is theirs, under each row of weights: (b,)."""
    right = columns["probabilities"].argmax(axis=1) == columns["labels"]  # (n,)
    share: Floats = (weights @ right) / weights.sum(axis=1)
    return share


def balanced_accuracy(columns: Columns, weights: Floats) -> Floats:
    """Return the mean recall of the present classes, under each row of weights: (b,)."""
    probabilities = columns["probabilities"]
    right = probabilities.argmax(axis=1) == columns["labels"]  # (n,)
    present = np.eye(probabilities.shape[1])[columns["labels"]]  # (n, k), one-hot
    return _present_mean((weights * right) @ present, weights @ present)


def auc(columns: Columns, weights: Floats) -> Floats:
    """Return the AUC under each row of weights (b,): of class 1 for two classes.

    For more, the mean over the present classes of one against the rest.
    """
    probabilities, labels = columns["probabilities"], columns["labels"]
    k = probabilities.shape[1]
    if k == 2:
        return weighted_auc(probabilities[:, 1], labels == 1, weights)
    areas = np.stack(
        [weighted_auc(probabilities[:, c], labels == c, weights) for c in range(k)], axis=1
    )  # (b, k)
    known = ~np.isnan(areas)
    return _present_mean(np.where(known, areas, 0.0), known.astype(np.float64))


def of_each_class(columns: Columns) -> NDArray[np.bool_]:
    """Return which slides (n, k) are of each class.

    Every figure rests on each class, accuracy too: of a model that names one class always, it is the share of
    that class, and so tells of the few who are of it.
    """
    classes = np.arange(columns["probabilities"].shape[1])
    of_class: NDArray[np.bool_] = columns["labels"][:, None] == classes
    return of_class


Predictions.measures = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "auc": auc}
Predictions.supports = dict.fromkeys(Predictions.measures, of_each_class)


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Return the AUC under each row of ``weights``: P(score⁺ > score⁻) + P(score⁺ = score⁻)/2.

    The weighted Mann–Whitney statistic by midranks: slides are sorted once, tied scores form groups, and each
    row's AUC is Σ_g P_g (N_<g + N_g/2) / (P N) with its weights of positives P and negatives N.

    Args:
        scores: (n,). positive: (n,). weights: (b, n), >= 0.

    Returns:
        (b,), NaN where a row has no weight on positives or none on negatives.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sorted_weights = weights[:, order]
    sign = positive[order]
    plus = np.add.reduceat(sorted_weights * sign, starts, axis=1)  # (b, groups)
    minus = np.add.reduceat(sorted_weights * ~sign, starts, axis=1)  # (b, groups)
    below = np.cumsum(minus, axis=1) - minus / 2
    pairs = plus.sum(axis=1) * minus.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = (plus * below).sum(axis=1) / pairs
    return area


def _present_mean(sums: Floats, sizes: Floats) -> Floats:
    """Return the mean over classes of sums / sizes (b, k), classes of size 0 left out; NaN if all are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(sizes > 0, sums / sizes, 0.0)
        mean: Floats = ratio.sum(axis=1) / (sizes > 0).sum(axis=1)
    return mean
