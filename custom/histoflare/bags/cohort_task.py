"""A question that needs no model: how many patients of which label, resolution, scanner and size of bag.

It is a task on bags, so that all that holds of an evaluation holds of it: admission, ledger, noise, gate and
sums. Its labels are those of the protocol; what a job asks beside them are words and edges of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.models.model import ModelSettings
from histoflare.bags.targets.classes import Classes
from histoflare.bags.task import Bags, BagTask
from histoflare.checks import is_number
from histoflare.count_form import MIXED, MOST_CELLS, OTHER, UNKNOWN, CountForm
from histoflare.errors import JobError, list_lines
from histoflare.slides.cohort import choose_split
from histoflare.tally_form import Predicted

_WORD = re.compile(r"[^\W_][\w .,+()-]{0,63}")
"""No path, no markup, no control character."""


@dataclass(frozen=True)
class CohortTally(CountForm):
    """Counts of patients by what the site's manifest and bags say of their slides.

    Attributes:
        labels, scanners: Words; without scanners nobody is asked for theirs.
        mpp_edges: Inner edges of bins of a slide's own resolution in µm/px, ascending.
        patch_edges: Of the mean number of patches of a patient's bags.
    """

    labels: tuple[str, ...]
    mpp_edges: tuple[float, ...]
    patch_edges: tuple[float, ...]
    scanners: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the task's."""
        return "cohort"

    @property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """As :attr:`CountForm.blocks`."""
        beside = (OTHER, UNKNOWN, MIXED)
        blocks = {
            "label": (*self.labels, *beside),
            "mpp": (*_bins(self.mpp_edges), UNKNOWN, MIXED),
            "patches": _bins(self.patch_edges),
        }
        return blocks | ({"scanner": (*self.scanners, *beside)} if self.scanners else {})

    def places(self, table: Predicted, of_patient: NDArray[np.bool_]) -> tuple[int, ...]:
        """As :meth:`CountForm.places`."""
        columns = {name: values[of_patient] for name, values in table.columns.items()}
        mpps = [
            len(self.mpp_edges) + 1 if not value > 0 else int(np.searchsorted(self.mpp_edges, value, "right"))
            for value in columns["mpp"].tolist()  # one that is not known is NaN
        ]
        patches = float(np.mean(columns["patches"]))
        places = (
            _one(_place(columns["label"].tolist(), self.labels), len(self.labels) + 2),
            _one(mpps, len(self.mpp_edges) + 2),
            int(np.searchsorted(self.patch_edges, patches, "right")),
        )
        if not self.scanners:
            return places
        return *places, _one(_place(columns["scanner"].tolist(), self.scanners), len(self.scanners) + 2)


def _bins(edges: Sequence[float]) -> tuple[str, ...]:
    said = [f"{edge:g}" for edge in edges]
    return (f"below {said[0]}", *(f"{low} to {high}" for low, high in pairwise(said)), f"from {said[-1]}")


def _place(words: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the cell of each slide's word: its own, or that of others, or of none."""
    return [known.index(word) if word in known else len(known) + (0 if word else 1) for word in words]


def _one(cells: Sequence[int], mixed: int) -> int:
    """Return the cell that all of a patient's slides are in, or the one of those that differ."""
    return cells[0] if len(set(cells)) == 1 else mixed


@dataclass(frozen=True)
class CohortFacts:
    """What is known of a split's slides, a row for each: a ``rounds.task.PredictionTable`` without figures.

    Attributes:
        columns: ``label`` and ``scanner`` ("" where there is none), ``mpp`` (NaN where unknown), ``patches``.
    """

    measures: ClassVar[dict[str, Any]] = {}
    supports: ClassVar[dict[str, Any]] = {}
    unbounded: ClassVar[frozenset[str]] = frozenset()
    why_missing: ClassVar[str] = ""

    columns: Mapping[str, NDArray[Any]]
    patients: Sequence[str]
    slides: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class AnyLabel(Classes):
    """The protocol's labels, at sites whose manifests may have others; a slide's value is its own word."""

    name: ClassVar[str] = "any"

    @property
    def manifest_labels(self) -> None:  # type: ignore[override]
        """Any."""
        return None

    def value_of(self, label: str) -> str:  # type: ignore[override]
        """Return the word as it stands there. It is compared with the labels, and does not leave."""
        return label


@dataclass(frozen=True)
class CohortTask(BagTask):
    """Asks for counts of patients. Nothing is trained, and no model is asked.

    Attributes:
        mpp_edges, patch_edges, scanners: As for :class:`CohortTally`.

    Raises:
        JobError: A word or an edge cannot be used, or there are too many (JOB_INVALID).
    """

    asks_model: ClassVar[bool] = False

    model: ModelSettings = field(default_factory=lambda: LinearSettings(directions=1))
    mpp_edges: Sequence[float] = (0.3, 0.6)
    patch_edges: Sequence[float] = (10, 30, 100, 300)
    scanners: Sequence[str] = ()

    def __post_init__(self) -> None:
        problems = [
            *_word_problems("labels in protocol.toml", self.labels),
            *_word_problems("task.scanners", self.scanners),
            *_edge_problems("task.mpp_edges", self.mpp_edges),
            *_edge_problems("task.patch_edges", self.patch_edges),
        ]
        if problems:
            raise JobError(
                f"This question about cohorts cannot be asked; correct:{list_lines(problems)}",
                reason="JOB_INVALID",
            )
        for name in ("mpp_edges", "patch_edges", "scanners"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "target", AnyLabel())
        super().__post_init__()
        if self.tally_form.length > MOST_CELLS:
            raise JobError(
                f"This question has {self.tally_form.length} cells, and {MOST_CELLS} at most can be asked "
                "for: name fewer words and edges.",
                reason="JOB_INVALID",
            )

    @property
    def model_name(self) -> str:
        """What a site's policy has to list among its models, for this to be asked."""
        return "cohort_statistics"

    @property
    def tally_form(self) -> CohortTally:
        """What is counted."""
        return CohortTally(
            tuple(self.labels), tuple(self.mpp_edges), tuple(self.patch_edges), tuple(self.scanners)
        )

    def to_json(self) -> dict[str, Any]:
        """As :meth:`BagTask.to_json`, without a target: it has its own."""
        said = super().to_json()
        said.pop("target", None)
        return said | {name: list(getattr(self, name)) for name in ("mpp_edges", "patch_edges", "scanners")}

    def predict(self, model: nn.Module, data: Bags, split: str) -> CohortFacts:
        """Return what is known of the slides of ``split``; model and features are not used."""
        records = choose_split(data.records, split)
        mpps = [np.nan if record.l0_mpp is None else record.l0_mpp for record in records]
        return CohortFacts(
            {
                "label": np.array([record.label for record in records], dtype=object),
                "scanner": np.array([record.subgroups.get("scanner") or "" for record in records], object),
                "mpp": np.array(mpps, dtype=np.float64),
                "patches": np.array([record.patches for record in records], dtype=np.int64),
            },
            [record.patient for record in records],
            [record.slide_id for record in records],
        )

    def notes(self, table: Any) -> tuple[list[str], list[list[str]]]:
        """As :meth:`BagTask.notes`: what was counted of each slide."""
        header = ["slide", "patient", *table.columns]
        rows = zip(table.slides, table.patients, *table.columns.values(), strict=True)
        return header, [[str(value) for value in row] for row in rows]


def _word_problems(name: str, words: Any) -> list[str]:
    given = [] if isinstance(words, str) else list(words)
    own = (OTHER, UNKNOWN, MIXED)
    fits = all(isinstance(word, str) and _WORD.fullmatch(word) and word not in own for word in given)
    if isinstance(words, str) or not fits or len(set(given)) != len(given):
        return [f"{name}: different words of letters, digits, spaces and . , + ( ) - _, none of {own}"]
    return []


def _edge_problems(name: str, edges: Any) -> list[str]:
    given = list(edges)
    if not given or not all(is_number(edge) and edge > 0 for edge in given):
        return [f"{name}: numbers above 0, at least one"]
    names = [f"{edge:g}" for edge in given]
    if given != sorted(set(given)) or len(set(names)) != len(names):
        return [f"{name}: ascending numbers that differ in six digits"]
    return []
