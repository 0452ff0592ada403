"""How good predictions are, with bootstrap intervals over patients, overall and by subgroup.

What is computed of a row (a slide, an image) is the task's own (``PredictionTable.measures``). Rows of one
patient are not independent, so the bootstrap draws patients with all their rows: patient counts are
multinomial, and every figure is recomputed with each row weighted by its patient's count.

Where that says nothing, it is not made to:

- *Few patients.* n draws from n patients are all of one and the same with probability n^-n. With 2 or 3
  patients that is more than the 2.5 % of an interval's end, which then is the least or the greatest value
  seen and no estimate. Below :data:`LEAST_PATIENTS` behind a part of a figure (a class) it has no interval.
- *No spread.* Where every patient counts the same (all right, say), every resample gives the same figure,
  which shows no certainty. The interval is then that of Clopper & Pearson (1934, Biometrika 26:404-413) for n
  out of n patients, the exact form of the rule of three (Hanley & Lippman-Hand 1983, JAMA 249:1743-1745), see
  :func:`interval_of_no_spread`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.figure import Figure
from histoflare.rounds.task import Columns, Measure, PredictionTable, Support
from histoflare.seeds import derive_seed

__all__ = [
    "Figure",
    "Metrics",
    "Rows",
    "evaluate",
    "evaluate_difference",
    "interval_of_no_spread",
    "merge_predictions",
]

# Row weights (resamples × rows, float64) held at once: 2**21 of them are 16 MiB.
MAX_WEIGHTS = 2**21

LEAST_PATIENTS = 5
"""Behind each part of a figure that has an interval."""

BOOTSTRAPS = 1000
"""Resamples of patients behind an interval, unless a caller asks for another number."""

ALPHA = 0.05
NO_SPREAD = 1e-9
"""Resamples that differ by no more than this are one value and the rounding of sums."""


@dataclass(frozen=True)
class Rows:
    """A prediction table of some of another's rows, or of several one after the other."""

    columns: Columns
    measures: Mapping[str, Measure]
    supports: Mapping[str, Support]
    unbounded: Collection[str]
    why_missing: str
    patients: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` found; ``metrics["auc"]`` is one figure.

    Attributes:
        n_slides: Rows: slides, or images.
        figures: Name → figure, in the order of the table's measures.
        subgroups: Column → value → its metrics, or None where the group is smaller than allowed.
    """

    n_slides: int
    n_patients: int
    figures: Mapping[str, Figure]
    subgroups: Mapping[str, Mapping[str, Metrics | None]]

    def __getitem__(self, name: str) -> Figure:
        return self.figures[name]

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
            **{name: figure.to_json() for name, figure in self.figures.items()},
            **({"subgroups": groups} if groups else {}),
        }


def named(figures: Mapping[str, Figure]) -> dict[str, float | None]:
    """Return figures as names and numbers: ``auc``, ``auc_low``, ``auc_high``, …; None for what is not."""
    flat: dict[str, float | None] = {}
    for name, figure in figures.items():
        flat |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return flat


def evaluate(
    table: PredictionTable, *, seed: int = 0, bootstraps: int = BOOTSTRAPS, min_patients: int = 5
) -> Metrics:
    """Return every figure of ``table``.

    A resample in which a figure does not exist (one class only) is left out of that figure's interval.

    Args:
        seed: Of the resampling.
        bootstraps: Number of resamples of patients; 0 gives no intervals.
        min_patients: A subgroup of fewer patients is suppressed.

    Raises:
        JobError: There is no row, or the parts do not fit one another.

    >>> from pathlib import Path
    >>> from histoflare import MODELS, BagTask, evaluate, load_cohort, predict, read_manifest
    >>> model = MODELS["mem"](memories=2, dim=4, hidden=8)
    >>> task = BagTask(("glandular", "solid"), "densenet121-random:v1", model, patch_px=224)
    >>> manifest = read_manifest(Path("clinic-a/manifest.csv"), check_files=False)
    >>> cohort = load_cohort("clinic-a", manifest, Path("clinic-a/bags"), task.target, task.encoder)
    >>> state = task.build_model().state_dict()  # or that of a run
    >>> found = evaluate(predict(task, state, cohort, "test"))
    >>> 0 <= found["accuracy"].value <= 1 and found.n_patients == len(cohort.test)
    True
    """
    _check(table)
    if not len(table.patients):
        raise JobError(
            "There is nothing to evaluate: this split has no slides.", reason="NOTHING_TO_EVALUATE"
        )
    groups: dict[str, dict[str, Metrics | None]] = {}
    for column, values in sorted(table.subgroups.items()):
        groups[column] = {}
        for value in sorted({value for value in values if value is not None}):
            part = _rows(table, np.array([entry == value for entry in values]))
            enough = len(set(part.patients)) >= min_patients
            groups[column][value] = (
                _evaluate_whole(part, derive_seed(seed, column, value), bootstraps, {}) if enough else None
            )
    return _evaluate_whole(table, seed, bootstraps, groups)


def figure_of(table: PredictionTable, name: str) -> float | None:
    """Return one figure of a table without its interval; None where there is no row, or no such value.

    Raises:
        JobError: The task has no figure of that name.
    """
    if name not in table.measures:
        raise JobError(f"There is no figure '{name}'; there are {', '.join(table.measures)}.")
    return evaluate(table, bootstraps=0)[name].value if len(table.patients) else None


def merge_predictions(by_site: Mapping[str, PredictionTable]) -> Rows:
    """Return all sites' rows as one table, patients as ``site/patient``, with a subgroup column ``site``."""
    tables = list(by_site.values())
    columns = sorted({column for table in tables for column in table.subgroups})
    merged: dict[str, list[str | None]] = {column: [] for column in columns}
    merged["site"] = [site for site, table in by_site.items() for _ in table.patients]
    for table in tables:
        for column in columns:
            if column != "site":
                merged[column].extend(table.subgroups.get(column, [None] * len(table.patients)))
    common = [name for name in tables[0].columns if all(name in table.columns for table in tables)]
    return Rows(
        {name: np.concatenate([table.columns[name] for table in tables]) for name in common},
        tables[0].measures,
        tables[0].supports,
        tables[0].unbounded,
        tables[0].why_missing,
        [f"{site}/{patient}" for site, table in by_site.items() for patient in table.patients],
        merged,
    )


def _check(table: PredictionTable) -> None:
    n = len(table.patients)
    wrong = [name for name, values in table.columns.items() if len(values) != n]
    wrong += [name for name, values in table.subgroups.items() if len(values) != n]
    if wrong:
        raise JobError(f"The columns {', '.join(wrong)} do not have one value for each of {n} rows.")


def _rows(table: PredictionTable, rows: NDArray[np.bool_]) -> Rows:
    patients = [patient for patient, keep in zip(table.patients, rows, strict=True) if keep]
    columns = {name: values[rows] for name, values in table.columns.items()}
    return Rows(columns, table.measures, table.supports, table.unbounded, table.why_missing, patients, {})


def _evaluate_whole(
    table: PredictionTable,
    seed: int,
    bootstraps: int,
    groups: Mapping[str, Mapping[str, Metrics | None]],
) -> Metrics:
    """Return the figures of a whole table."""
    names, owner = np.unique(np.array(table.patients), return_inverse=True)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=bootstraps)

    def figure(name: str, measure: Measure) -> Figure:
        behind = _fewest(table.supports.get(name), table.columns, owner)
        value = float(measure(table.columns, np.ones((1, len(owner))))[0])
        if np.isnan(value):
            return Figure(None, reason=table.why_missing, patients=behind)
        if not bootstraps:
            return Figure(value, patients=behind)
        if behind < LEAST_PATIENTS:
            return Figure(value, patients=behind, no_interval=_say_few(len(names)))
        step = max(1, MAX_WEIGHTS // len(owner))
        parts = [
            measure(table.columns, counts[start : start + step, owner].astype(np.float64))
            for start in range(0, bootstraps, step)
        ]
        found = np.concatenate([np.empty(0), *parts])
        found = found[~np.isnan(found)]
        if not len(found):
            return Figure(value, patients=behind, no_interval="no resample has the figure")
        if name not in table.unbounded and np.ptp(found) <= NO_SPREAD:
            low, high = interval_of_no_spread(value, behind)
        else:
            low, high = np.percentile(found, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
        return Figure(value, float(low), float(high), patients=behind)

    return Metrics(
        n_slides=len(owner),
        n_patients=len(names),
        figures={name: figure(name, measure) for name, measure in table.measures.items()},
        subgroups=groups,
    )


def interval_of_no_spread(value: float, patients: int) -> tuple[float, float]:
    """Return the 95 % interval of a figure between 0 and 1 for which each of n patients counted the same.

    Of n out of n patients, the lower end of Clopper and Pearson's interval is a = 0.025^(1/n): at least that
    share of all patients is as those that were seen. The rest may count anything from 0 to 1, so that the
    figure lies between a·value and 1 - a·(1 - value); at value 1 that is their interval, [a, 1]. For an AUC
    the n are pairs of a positive and a negative patient that share nobody, each ranked alike.

    Args:
        value: In [0, 1].
        patients: n, those behind the part (the class) with the fewest, which makes it the widest.
    """
    alike = (ALPHA / 2) ** (1 / patients)
    return alike * value, 1 - alike * (1 - value)


def _say_few(patients: int) -> str:
    """Return why there is no interval; of a class no number is said, for a report may hold none so small."""
    if patients < LEAST_PATIENTS:
        return f"{patients} patient{'' if patients == 1 else 's'}: no interval"
    return f"fewer than {LEAST_PATIENTS} patients of a class: no interval"


def _fewest(support: Support | None, columns: Columns, owner: NDArray[np.intp]) -> int:
    """Return how many patients are behind the part of a figure with the fewest; empty parts are left out."""
    if support is None:
        return len(np.unique(owner))
    parts = support(columns)  # (n, parts)
    counts = [len(np.unique(owner[rows])) for rows in parts.T]
    return min((count for count in counts if count), default=0)


def evaluate_difference(
    one: PredictionTable,
    others: Sequence[PredictionTable],
    name: str,
    *,
    seed: int = 0,
) -> Figure:
    """Return a figure of ``one`` less the mean of that of ``others``: models asked about the same rows.

    The bootstrap draws the same patients for all, so what is hard for all models does not widen the interval
    (Efron & Tibshirani 1993, the paired bootstrap).

    Args:
        one: A model's predictions.
        others: Those of one other model or more; the rows of all are the same, in the same order.
        name: The figure.
        seed: As for :func:`evaluate`.

    Raises:
        JobError: There is no row, no other model, or the rows are not of the same patients.
    """
    for table in (one, *others):
        _check(table)
        if not len(one.patients) or list(one.patients) != list(table.patients):
            raise JobError("Models can be compared on the same rows only, and there must be some.")
    if not others:
        raise JobError("There is no model to compare with.")

    def less(columns: Columns, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = [other.measures[name](other.columns, weights) for other in others]
        difference: NDArray[np.float64] = one.measures[name](one.columns, weights) - np.mean(found, axis=0)
        return difference

    both = Rows(one.columns, {name: less}, one.supports, {name}, one.why_missing, one.patients, {})
    return _evaluate_whole(both, seed, BOOTSTRAPS, {})[name]
