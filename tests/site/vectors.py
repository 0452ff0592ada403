"""A throw-away kind of data: one vector a patient, in a CSV. One file, and one line that registers it."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from histoflare.bags.targets.classes import Predictions
from histoflare.errors import ManifestError, MaskError
from histoflare.report.site_page import SitePage
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.found_data import FoundData
from histoflare.site.kinds.kind import CSV_FILE, DataKind, Entry, PageParts
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

from ..rounds.toy import ToyTask


@dataclass(frozen=True)
class VectorRow:
    """A row of the CSV; ``values`` has one number a feature."""

    line: int
    slide_id: str
    patient: str
    split: str
    label: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Vectors:
    """The rows at ``path``; a cohort has no path, a manifest no name."""

    rows: tuple[VectorRow, ...]
    path: Path = Path()
    name: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[VectorRow, ...]:
        return self.rows

    @property
    def train(self) -> tuple[VectorRow, ...]:
        return tuple(row for row in self.rows if row.split == "train")

    def without(self, patients: Collection[str]) -> Vectors:
        return replace(self, rows=tuple(row for row in self.rows if row.patient not in patients))

    def read_ahead(self) -> None:
        pass

    def read_all(self) -> None:
        pass


@dataclass(frozen=True)
class VectorTask(ToyTask):
    """The toy task on the rows of a cohort."""

    data: ClassVar[str] = "vectors"

    def _columns(self, rows: Sequence[VectorRow]) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor([row.values for row in rows]).view(-1, self.features),
            torch.tensor([list(self.labels).index(row.label) for row in rows]),
        )

    def n_train(self, data: Any) -> int:
        return len(data.train)

    def n_steps(self, data: Any) -> int:
        return self.local_epochs * -(-len(data.train) // self.batch_size)

    def train_batches(self, data: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.local_epochs):
            for start in range(0, len(data.train), self.batch_size):
                yield self._columns(data.train[start : start + self.batch_size])

    def predict(self, model: nn.Module, data: Any, split: str) -> Predictions:
        rows = [row for row in data.rows if split in ("all", row.split)]
        x, y = self._columns(rows)
        probabilities = model(x).double().softmax(dim=1).numpy(force=True)
        return Predictions(probabilities, y.numpy().astype(np.int64), [row.patient for row in rows], {})


class VectorsKind(DataKind):
    """A CSV with the columns patient, label, split (or none) and one for each feature."""

    name = "vectors"
    item = "vector"
    learned = "a table"
    keys: ClassVar = {"vectors": CSV_FILE}
    comment = "# A CSV with the columns patient, label and one for each feature."
    manifest = "vectors.csv"
    task_name = "vectors"
    task_class = "tests.site.vectors:VectorTask"
    task_field = "classes"
    evaluation_job = "mem_evaluate"

    def configure(self, name: str, manifest: Path, beside: Path | None, **settings: Any) -> SiteConfiguration:
        return SiteConfiguration({"vectors": manifest}, **settings)

    def read_splits(
        self, configuration: SiteConfiguration, split: SplitRule, labels: Sequence[str] | None = None
    ) -> Vectors:
        (path,) = self.paths(configuration)
        if not path.is_file():
            raise ManifestError(f"{path}: not there", reason="MANIFEST_UNREADABLE")
        with path.open(newline="") as opened:
            lines = list(csv.DictReader(opened))
        rows = [
            VectorRow(
                line=number,
                slide_id=f"{number}",
                patient=cells["patient"],
                split=cells.get("split") or split.role_of(cells["patient"]),
                label=cells["label"],
                values=tuple(float(cells[name]) for name in cells if name.startswith("x")),
            )
            for number, cells in enumerate(lines, start=2)
        ]
        return Vectors(tuple(rows), path)

    def load(
        self,
        site: str,
        task: Any,
        configuration: SiteConfiguration,
        split: SplitRule = DEFAULT_SPLIT,
        *,
        is_over: bool = False,
    ) -> Vectors:
        return Vectors(self.read_splits(configuration, split).rows, name=site)

    def pool(self, cohorts: Sequence[Any], name: str) -> Vectors:
        if len({cohort.name for cohort in cohorts}) != len(cohorts) or not cohorts:
            raise MaskError("two of one name, or none", reason="COHORT_INVALID")
        rows = [
            replace(row, slide_id=f"{cohort.name}/{row.slide_id}", patient=f"{cohort.name}/{row.patient}")
            for cohort in cohorts
            for row in cohort.rows
        ]
        return Vectors(tuple(rows), name=name)

    def find(self, sites: Mapping[str, SiteConfiguration]) -> FoundData:
        found = [self.read_splits(site, DEFAULT_SPLIT) for site in sites.values()]
        return FoundData(tuple(sorted({row.label for each in found for row in each.rows})))

    def entries(self, configuration: SiteConfiguration) -> Iterator[Entry]:
        found = self.read_splits(configuration, DEFAULT_SPLIT)
        for row in found.rows:
            yield Entry(row.patient, found.path / row.slide_id, f"line {row.line}", str(row.values))

    def build_page(self, parts: PageParts) -> SitePage:
        return SitePage(site=parts.site, report=parts.report, slides=[], left_out=(), sent=())


VECTORS = VectorsKind()


def write_vectors(folder: Path, site: str, seed: int, patients: int = 12) -> Path:
    """Write a site's CSV, a vector a patient; return it."""
    rng = np.random.default_rng(seed)
    path = folder / site / "vectors.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["patient", "label", "split", *(f"x{index}" for index in range(5))])
        for number in range(patients):
            split = ("train", "train", "test", "train", "validation", "test")[number % 6]
            values = rng.normal(number % 2, 1.0, 5).round(4)
            table.writerow([f"{site}-p{number}", "ab"[number % 2], split, *values])
    return path
