"""Bags in memory, with the interface of ``bags.cohort.Cohort`` that a task reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    slide_id: str
    patient: str
    label: int
    split: str
    subgroups: dict[str, str] = field(default_factory=dict)
    patches: int = 0


@dataclass(frozen=True)
class MemoryBags:
    records: list[Record]
    bags: dict[str, Tensor]

    @property
    def train(self) -> list[Record]:
        return [record for record in self.records if record.split == "train"]

    @property
    def test(self) -> list[Record]:
        return [record for record in self.records if record.split == "test"]

    def by_patient(self, split: str) -> dict[str, MemoryBags]:
        chosen = [record for record in self.records if split in ("all", record.split)]
        return {
            patient: replace(self, records=[record for record in chosen if record.patient == patient])
            for patient in dict.fromkeys(record.patient for record in chosen)
        }

    def features(self, record: Record, rows: Sequence[int] | None = None, /) -> Tensor:
        bag = self.bags[record.slide_id]
        return bag if rows is None else bag[list(rows)]


def memory_bags(seed: int, n: int = 24, features: int = 6) -> MemoryBags:
    """Bags of 3 to 9 patches; in bags of class 1 a third of the patches have a large first feature."""
    generator = torch.Generator().manual_seed(seed)
    records, bags = [], {}
    for index in range(n):
        size = int(torch.randint(3, 10, (1,), generator=generator))
        bag = torch.randn((size, features), generator=generator)
        if index % 2:
            bag[: max(1, size // 3), 0] += 4.0
        name = f"slide_{index}"
        bags[name] = bag
        group = {"sex": "F" if index % 3 else "M"} if index % 5 else {}
        split = "test" if index >= 2 * n // 3 else "train"
        records.append(Record(name, f"patient_{index}", index % 2, split, group, size))
    return MemoryBags(records, bags)
