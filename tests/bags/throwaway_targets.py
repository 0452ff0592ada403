"""A target that no protocol can name, run by the contract suite beside the registered ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from histoflare import ranges
from histoflare.bags.targets.target import Floats, Said, Target
from histoflare.errors import BagError, JobError


@dataclass(frozen=True)
class Number(Target):
    """One number, such as a share of stained nuclei; its labels name it."""

    name: ClassVar[str] = "number"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"mean_absolute_error"})

    unit: float = 1.0

    def problems(self) -> list[str]:
        names = [] if len(self.labels) == 1 else [f"labels: the number's name, not {self.labels!r}"]
        return names + ranges.above_zero("target.unit", self.unit)

    @property
    def outputs(self) -> int:
        return 1

    @property
    def manifest_labels(self) -> None:
        return None

    @property
    def example(self) -> float:
        return 0.0

    def value_of(self, label: str) -> float:
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BagError(f"the label '{label}' is no number")
        return value

    def say(self, value: float) -> str:
        return f"{value:g}"

    def losses(self, outputs: Tensor, values: Tensor) -> Tensor:
        return (outputs[..., 0] - values / self.unit).square()

    def average(self, outputs: Tensor) -> Tensor:
        return outputs.mean(dim=0)

    def answer(self, outputs: Floats) -> Said:
        return Said(self.say(float(outputs[0]) * self.unit), {})

    def table(
        self,
        outputs: Floats,
        values: Sequence[float],
        patients: Sequence[str],
        subgroups: Mapping[str, Sequence[str | None]],
        slides: Sequence[str],
    ) -> Numbers:
        if not np.isfinite(outputs).all():
            raise JobError("Predicted numbers must be finite; where they are not, training diverged.")
        columns = {"predicted": outputs[:, 0] * self.unit, "values": np.array(values, dtype=np.float64)}
        return Numbers(columns, patients, subgroups, slides)

    def notes(self, table: Numbers) -> tuple[list[str], list[list[str]]]:
        said = [[self.say(each) for each in table.columns[name]] for name in ("values", "predicted")]
        rows = zip(table.slides, table.patients, *said, strict=True)
        return ["slide", "patient", "label", "predicted"], [list(row) for row in rows]


def mean_absolute_error(columns: Mapping[str, NDArray[Any]], weights: Floats) -> Floats:
    error: Floats = (weights @ abs(columns["predicted"] - columns["values"])) / weights.sum(axis=1)
    return error


@dataclass(frozen=True)
class Numbers:
    measures: ClassVar[dict[str, Any]] = {"mean_absolute_error": mean_absolute_error}
    supports: ClassVar[dict[str, Any]] = {}
    unbounded: ClassVar[frozenset[str]] = frozenset(measures)
    why_missing: ClassVar[str] = "there is no slide"

    columns: Mapping[str, NDArray[Any]]
    patients: Sequence[str]
    subgroups: Mapping[str, Sequence[str | None]]
    slides: Sequence[str]


THROWAWAY: dict[str, type[Target]] = {"number": Number}
LABELS = {"number": ("share",), "classes": ("benign", "tumour")}
WRITTEN = {"number": ("0.25", "12"), "classes": ("benign", "tumour")}
"""Labels as manifests have them, two of each target; they differ."""
