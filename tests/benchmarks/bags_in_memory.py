"""A hospital's bags in memory, as a task on bags reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Slide:
    """One bag."""

    slide_id: str
    patient: str
    label: int
    split: str
    patches: int = 1

    @property
    def subgroups(self) -> dict[str, str]:
        """None."""
        return {}


@dataclass(frozen=True)
class Bags:
    """A hospital's bags."""

    records: Sequence[Slide]
    bags: Mapping[str, Tensor]

    @property
    def train(self) -> Sequence[Slide]:
        """Those to train on."""
        return [record for record in self.records if record.split == "train"]

    def features(self, record: Slide, rows: Sequence[int] | None = None, /) -> Tensor:
        """Return a bag (n, f)."""
        bag = self.bags[record.slide_id]
        return bag if rows is None else bag[list(rows)]

    def stacked(self, split: str) -> tuple[Tensor, NDArray[np.int64]]:
        """Return the bags (N, n, f) and labels (N,) of ``split``, all of one length."""
        chosen = [record for record in self.records if record.split == split]
        bags = torch.stack([self.bags[record.slide_id] for record in chosen])
        return bags, np.array([record.label for record in chosen], dtype=np.int64)


def pool(sites: Mapping[str, Bags]) -> Bags:
    """Return the patients of all in one place."""
    return Bags(
        [record for each in sites.values() for record in each.records],
        {name: bag for each in sites.values() for name, bag in each.bags.items()},
    )
