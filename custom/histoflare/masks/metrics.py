"""How good masks are: Dice, Jaccard and accuracy, honest ones and those of DHUnet's authors beside them.

Everything is computed of one confusion matrix (classes × classes, in pixels) for each image: masks need not
be kept, and a bootstrap over patients is a few matrix products. Pixels that nobody annotated
(:data:`IGNORE`) are in no figure.

For one image and one class let T be the class's pixels in the truth, P those in the prediction, B both:
Dice = 2B / (T + P), Jaccard = B / (T + P - B). What an image counts in which the class is not:

==========================  ===============  ===============
                            honest           the authors
==========================  ===============  ===============
T > 0, P = 0 (missed)       0                0, accuracy too
T = 0, P > 0 (made up)      0                left out
T = 0, P = 0                left out         1, accuracy too
==========================  ===============  ===============

To the authors (``calculate_metric_perpatch`` of pengsl-lab/DHUnet) a class that is made up costs nothing, and
one that is rightly nowhere counts as perfect. Their figures are here to be compared with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.masks.windows import IGNORE

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Columns = Mapping[str, NDArray[Any]]
Measure = Callable[[Columns, Floats], Floats]

CHUNK_PX = 2**20
"""Pixels counted at once: their codes (int64) are 8 MiB, whatever the size of the image."""


def confusion(truth: NDArray[np.uint8], predicted: NDArray[Any], classes: int) -> Integers:
    """Return how many pixels of each class were given which: (classes, classes), [truth, predicted].

    For ``confusion_tissue``, hand in the prediction with the background where there is no tissue.

    Args:
        truth: (h, w) class indices; pixels of :data:`IGNORE` are left out.
        predicted: (h, w) class indices, of any whole-number type.
        classes: At least 1, at most 255.

    Raises:
        MaskError: The two differ in size (MASK_SIZE) or hold an index that is no class (MASK_CLASS).
    """
    if truth.shape != predicted.shape:
        raise MaskError(
            f"The truth has shape {truth.shape}, the prediction {predicted.shape}: both must be of one size.",
            reason="MASK_SIZE",
        )
    flat_truth, flat_predicted = truth.reshape(-1), predicted.reshape(-1)
    counts = np.zeros(classes * classes, dtype=np.int64)
    for start in range(0, flat_truth.size, CHUNK_PX):
        t, p = flat_truth[start : start + CHUNK_PX], flat_predicted[start : start + CHUNK_PX]
        known = t != IGNORE
        t, p = t[known].astype(np.int64), p[known].astype(np.int64)
        if t.size and (max(t.max(), p.max()) >= classes or p.min() < 0):
            raise MaskError(
                f"A mask holds an index that is no class; there are {classes}, from 0 to {classes - 1}, and "
                f"{IGNORE} in the truth where nothing is annotated.",
                reason="MASK_CLASS",
            )
        counts += np.bincount(t * classes + p, minlength=classes * classes)
    return counts.reshape(classes, classes)


@dataclass(frozen=True)
class MaskPredictions:
    """Predictions of one split, one row per image; checked when made.

    Attributes:
        labels: Class names, in the order of the indices.
        background: The class that no figure but ``pixel_accuracy`` is about; None: every class counts.
        columns: ``confusion`` int64 (n, k, k), see :func:`confusion`. With ``confusion_tissue``, the same of
            predictions that are background outside the tissue, the authors' figures are computed of that.
        patients: Whose image each row is.
        subgroups: Column (sex, scanner, site, …) → one value or None per row.
        image_ids: Of the rows; what :meth:`listed` calls them.

    Raises:
        MaskError: The parts do not fit one another.
    """

    unbounded: ClassVar[frozenset[str]] = frozenset()

    labels: Sequence[str]
    background: str | None
    columns: Columns
    patients: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]]
    image_ids: Sequence[str]

    def __post_init__(self) -> None:
        n, k = len(self.patients), len(self.labels)
        shapes = {name: column.shape for name, column in self.columns.items()}
        if self.background is not None and self.background not in self.labels:
            raise MaskError(f"The background {self.background!r} is none of {', '.join(self.labels)}.")
        if "confusion" not in shapes or set(shapes.values()) != {(n, k, k)} or len(self.image_ids) != n:
            raise MaskError(
                f"{len(self.image_ids)} images, {n} patients and {k} classes do not fit the columns {shapes}."
            )
        wrong = [column for column, values in self.subgroups.items() if len(values) != n]
        if wrong:
            raise MaskError(
                f"The subgroup columns {', '.join(wrong)} do not have one value for each of {n} rows."
            )

    @property
    def foreground(self) -> tuple[int, ...]:
        """The indices of the classes that figures are about."""
        return tuple(index for index, label in enumerate(self.labels) if label != self.background)

    @cached_property
    def measures(self) -> Mapping[str, Measure]:
        """Name → figure.

        ``dice``, ``jaccard``: of each image and class, honest; mean over images, then over classes (macro).
        ``dice_pooled``, ``jaccard_pooled``: of each class's pixels of all images together (micro); mean over
            classes. Large images and those with much of a class weigh more.
        ``pixel_accuracy``: the share of annotated pixels, of all images together, that have the right class,
            background included.
        ``dice_authors``, ``jaccard_authors``, ``accuracy_authors``: as DHUnet's authors have them; mean over
            images, then over classes. Accuracy is the share of an image's pixels that are rightly the class
            or rightly not.
        """
        kinds: dict[str, Callable[[Sequence[int], Columns, Floats], Floats]] = {
            "dice": partial(_honest, _dice),
            "jaccard": partial(_honest, _jaccard),
            "dice_pooled": partial(_pooled, _dice),
            "jaccard_pooled": partial(_pooled, _jaccard),
            "pixel_accuracy": _pixel_accuracy,
            "dice_authors": partial(_authors, _dice),
            "jaccard_authors": partial(_authors, _jaccard),
            "accuracy_authors": partial(_authors, _accuracy),
        }
        return {name: partial(kind, self.foreground) for name, kind in kinds.items()}

    @cached_property
    def supports(self) -> Mapping[str, Callable[[Columns], NDArray[np.bool_]]]:
        """Name → the images (n, classes twice) that a figure rests on: those with a class in truth or
        prediction, and those with it in the truth.

        The second, because a model that predicts a class everywhere concerns every image, and its Dice still
        tells of the few that have the class. For the same reason accuracies rest on each class: of such a
        model ``pixel_accuracy`` is the share of that class's pixels, whatever class it is.
        """
        figures, every = partial(_rests_on, self.foreground), partial(_rests_on, range(len(self.labels)))
        return dict.fromkeys(self.measures, figures) | {"pixel_accuracy": every}

    @property
    def why_missing(self) -> str:
        """In words, why a figure may not exist."""
        return "no class is in the truth or in the predictions"

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """Return a header and rows, for the site's own notes: each image's Dice of each class.

        A cell is empty where the class is neither in the image's truth nor in its prediction.
        """
        header = ["image", "patient", *(f"dice_{self.labels[index]}" for index in self.foreground)]
        scores = _dice(_Counts.of(self.columns["confusion"], self.foreground))  # (n, c)
        rows = zip(self.image_ids, self.patients, scores.tolist(), strict=True)
        cells = [["" if score != score else f"{score:.6f}" for score in row] for _, _, row in rows]
        names = zip(self.image_ids, self.patients, cells, strict=True)
        return header, [[image, patient, *row] for image, patient, row in names]


@dataclass(frozen=True)
class _Counts:
    """Pixels of each row and class (n, c): in the truth, in the prediction, in both, and annotated at all."""

    truth: Floats
    predicted: Floats
    both: Floats
    annotated: Floats

    @classmethod
    def of(cls, matrices: NDArray[Any], classes: Sequence[int]) -> _Counts:
        """Return the counts of confusion matrices (n, k, k)."""
        chosen = list(classes)
        matrices = matrices.astype(np.float64)
        diagonal = np.einsum("nkk->nk", matrices)  # (n, k)
        annotated = np.repeat(matrices.sum(axis=(1, 2))[:, None], len(chosen), axis=1)
        return cls(
            matrices.sum(axis=2)[:, chosen], matrices.sum(axis=1)[:, chosen], diagonal[:, chosen], annotated
        )


Score = Callable[[_Counts], Floats]
"""Counts (n, c) → (n, c), NaN where it would be 0/0."""


def _dice(counts: _Counts) -> Floats:
    return _ratio(2 * counts.both, counts.truth + counts.predicted)


def _jaccard(counts: _Counts) -> Floats:
    return _ratio(counts.both, counts.truth + counts.predicted - counts.both)


def _accuracy(counts: _Counts) -> Floats:
    wrong = counts.truth + counts.predicted - 2 * counts.both
    return _ratio(counts.annotated - wrong, counts.annotated)


def _honest(score: Score, classes: Sequence[int], columns: Columns, weights: Floats) -> Floats:
    return _mean_over_images(score(_Counts.of(columns["confusion"], classes)), weights)


def _pooled(score: Score, classes: Sequence[int], columns: Columns, weights: Floats) -> Floats:
    matrices = columns["confusion"]
    summed = weights @ matrices.reshape(len(matrices), -1).astype(np.float64)  # (b, k·k)
    return _mean_over_classes(score(_Counts.of(summed.reshape(-1, *matrices.shape[1:]), classes)))


def _pixel_accuracy(classes: Sequence[int], columns: Columns, weights: Floats) -> Floats:
    matrices = columns["confusion"].astype(np.float64)
    right = np.einsum("nkk->n", matrices)
    return _ratio(weights @ right, weights @ matrices.sum(axis=(1, 2)))


def _authors(score: Score, classes: Sequence[int], columns: Columns, weights: Floats) -> Floats:
    counts = _Counts.of(columns.get("confusion_tissue", columns["confusion"]), classes)
    there, given = counts.truth > 0, counts.predicted > 0
    scores = np.select([there & given, there & ~given, ~there & ~given], [score(counts), 0.0, 1.0], np.nan)
    return _mean_over_images(np.where(counts.annotated > 0, scores, np.nan), weights)


def _rests_on(classes: Sequence[int], columns: Columns) -> NDArray[np.bool_]:
    """Return which images (n, 2 c) have a class in their truth or prediction, and in their truth."""
    counts = _Counts.of(columns["confusion"], classes)
    return np.concatenate([counts.truth + counts.predicted > 0, counts.truth > 0], axis=1)


def _mean_over_images(scores: Floats, weights: Floats) -> Floats:
    """Return the weighted mean over images of scores (n, c), NaN left out, then that over classes: (b,)."""
    known = ~np.isnan(scores)
    sums = weights @ np.where(known, scores, 0.0)  # (b, c)
    return _mean_over_classes(_ratio(sums, weights @ known))


def _mean_over_classes(scores: Floats) -> Floats:
    """Return the mean over classes of scores (b, c), those that are NaN left out: (b,), NaN if all are."""
    known = ~np.isnan(scores)
    return _ratio(np.where(known, scores, 0.0).sum(axis=1), known.sum(axis=1))


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """Return above / below, NaN where below is 0."""
    undefined = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    ratio: Floats = np.divide(above, below, out=undefined, where=below > 0)
    return ratio
