"""Accuracy, balanced accuracy and AUC, with bootstrap intervals over patients, overall and by subgroup.

Slides of one patient are not independent, so the bootstrap draws patients with all their slides: patient
counts are multinomial, and every figure is recomputed with each slide weighted by its patient's count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.rounds.task import PredictionTable
from histoflare.seeds import derive_seed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Slide weights (resamples × slides, float64) held at once: 2**21 of them are 16 MiB.
MAX_WEIGHTS = 2**21


@dataclass(frozen=True)
class Predictions:
    """Predictions of one split, one row per slide; checked when made.

    Attributes:
        probabilities: (n, k), k >= 2, finite, >= 0, rows summing to 1.
        labels: (n,), in [0, k).
        patients: Whose slide each row is.
        subgroups: Column (sex, age_band, scanner, site, …) → one value or None per row.

    Raises:
        JobError: The parts do not fit one another.
    """

    probabilities: Floats
    labels: Integers
    patients: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]]

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


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; ``value`` is None for the ``reason`` given.

    The interval is None for a single patient and where no resample had a value.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figure without what it has not (no NaN)."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` found.

    Attributes:
        subgroups: Column → value → its metrics, or None where the group is smaller than allowed.
    """

    n_slides: int
    n_patients: int
    accuracy: Figure
    balanced_accuracy: Figure
    auc: Figure
    subgroups: dict[str, dict[str, Metrics | None]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON without NaN; a group too small has ``{"suppressed": true}`` and no count."""
        groups = {
            column: {
                value: {"suppressed": True} if metrics is None else metrics.to_json()
                for value, metrics in values.items()
            }
            for column, values in self.subgroups.items()
        }
        return {
            "n_slides": self.n_slides,
            "n_patients": self.n_patients,
            "accuracy": self.accuracy.to_json(),
            "balanced_accuracy": self.balanced_accuracy.to_json(),
            "auc": self.auc.to_json(),
            **({"subgroups": groups} if groups else {}),
        }


def evaluate(
    predictions: PredictionTable, *, seed: int = 0, bootstraps: int = 1000, min_patients: int = 5
) -> Metrics:
    """Return accuracy, balanced accuracy and AUC of ``predictions``.

    AUC is that of class 1 for two classes, else the mean over the present classes of one against the rest.
    Balanced accuracy is the mean recall of the present classes. A resample in which a figure does not exist
    (one class only) is left out of that figure's interval.

    Args:
        seed: Of the resampling.
        bootstraps: Number of resamples of patients; 0 gives no intervals.
        min_patients: A subgroup of fewer patients is suppressed.

    Raises:
        JobError: There is no row, or the parts do not fit (see :class:`Predictions`).
    """
    table = Predictions(
        predictions.probabilities, predictions.labels, list(predictions.patients), predictions.subgroups
    )
    if not len(table.labels):
        raise JobError(
            "There is nothing to evaluate: this split has no slides.", reason="NOTHING_TO_EVALUATE"
        )
    groups: dict[str, dict[str, Metrics | None]] = {}
    for column, values in sorted(table.subgroups.items()):
        groups[column] = {}
        for value in sorted({value for value in values if value is not None}):
            rows = np.array([entry == value for entry in values])
            part = _rows(table, rows)
            enough = len(set(part.patients)) >= min_patients
            groups[column][value] = (
                _evaluate_whole(part, derive_seed(seed, column, value), bootstraps, {}) if enough else None
            )
    return _evaluate_whole(table, seed, bootstraps, groups)


def merge_predictions(by_site: Mapping[str, PredictionTable]) -> Predictions:
    """Return all sites' rows as one table, patients as ``site/patient``, with a subgroup column ``site``."""
    columns = sorted({column for table in by_site.values() for column in table.subgroups})
    merged: dict[str, list[str | None]] = {column: [] for column in columns}
    merged["site"] = [site for site, table in by_site.items() for _ in table.patients]
    for table in by_site.values():
        for column in columns:
            if column != "site":
                merged[column].extend(table.subgroups.get(column, [None] * len(table.patients)))
    return Predictions(
        np.concatenate([table.probabilities for table in by_site.values()]),
        np.concatenate([table.labels for table in by_site.values()]),
        [f"{site}/{patient}" for site, table in by_site.items() for patient in table.patients],
        merged,
    )


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


def _rows(table: Predictions, rows: NDArray[np.bool_]) -> Predictions:
    patients = [patient for patient, keep in zip(table.patients, rows, strict=True) if keep]
    return Predictions(table.probabilities[rows], table.labels[rows], patients, {})


def _evaluate_whole(
    table: Predictions, seed: int, bootstraps: int, groups: dict[str, dict[str, Metrics | None]]
) -> Metrics:
    names, owner = np.unique(np.array(table.patients), return_inverse=True)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    resamples = bootstraps if len(names) > 1 else 0
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)

    def figure(measure: Callable[[Predictions, Floats], Floats], reason: str) -> Figure:
        value = float(measure(table, np.ones((1, len(owner))))[0])
        if np.isnan(value):
            return Figure(None, reason=reason)
        step = max(1, MAX_WEIGHTS // len(owner))
        parts = [
            measure(table, counts[start : start + step, owner].astype(np.float64))
            for start in range(0, resamples, step)
        ]
        found = np.concatenate([np.empty(0), *parts])
        found = found[~np.isnan(found)]
        if not len(found):
            return Figure(value)
        low, high = np.percentile(found, [2.5, 97.5])
        return Figure(value, float(low), float(high))

    return Metrics(
        n_slides=len(table.labels),
        n_patients=len(names),
        accuracy=figure(_accuracy, "no slides"),
        balanced_accuracy=figure(_balanced_accuracy, "no slides"),
        auc=figure(_auc, "all slides are of one class"),
        subgroups=groups,
    )


def _accuracy(table: Predictions, weights: Floats) -> Floats:
    right = table.probabilities.argmax(axis=1) == table.labels  # (n,)
    accuracy: Floats = (weights @ right) / weights.sum(axis=1)
    return accuracy


def _balanced_accuracy(table: Predictions, weights: Floats) -> Floats:
    right = table.probabilities.argmax(axis=1) == table.labels  # (n,)
    present = np.eye(table.probabilities.shape[1])[table.labels]  # (n, k), one-hot
    return _present_mean((weights * right) @ present, weights @ present)


def _auc(table: Predictions, weights: Floats) -> Floats:
    k = table.probabilities.shape[1]
    if k == 2:
        return weighted_auc(table.probabilities[:, 1], table.labels == 1, weights)
    areas = np.stack(
        [weighted_auc(table.probabilities[:, c], table.labels == c, weights) for c in range(k)], axis=1
    )  # (b, k)
    known = ~np.isnan(areas)
    return _present_mean(np.where(known, areas, 0.0), known.astype(np.float64))


def _present_mean(sums: Floats, sizes: Floats) -> Floats:
    """Return the mean over classes of sums / sizes (b, k), classes of size 0 left out; NaN if all are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(sizes > 0, sums / sizes, 0.0)
        mean: Floats = ratio.sum(axis=1) / (sizes > 0).sum(axis=1)
    return mean
