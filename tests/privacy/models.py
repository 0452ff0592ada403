"""Models and batches whose per-record gradients the tests know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoflare.bags.patients import PatientBatch, collate_patients
from histoflare.bags.task import BagTask
from histoflare.privacy.gradients import Losses

from ..mem import make_mem_task

FEATURES = 6


def mem_task(**fields: object) -> BagTask:
    small = {"features": FEATURES, "memories": 3, "dim": 4, "hidden": 7, "seed": 1}
    return make_mem_task(["a", "b", "c"], "encoder", **{**small, **fields})  # type: ignore[arg-type]


def patients(sizes: list[list[int]], seed: int = 0, scale: float = 1.0) -> PatientBatch:
    """Return a batch of patients whose slides have ``sizes`` patches."""
    generator = torch.Generator().manual_seed(seed)
    bags = [[scale * torch.randn((n, FEATURES), generator=generator) for n in of_one] for of_one in sizes]
    labels = [[(p + s) % 3 for s in range(len(of_one))] for p, of_one in enumerate(sizes)]
    return collate_patients(bags, labels)


def only(batch: PatientBatch, chosen: list[int]) -> PatientBatch:
    """Return the patients ``chosen`` of a batch, padded as they were."""
    return PatientBatch(
        batch.features[chosen], batch.mask[chosen], batch.slides[chosen], batch.labels[chosen]
    )


def one_by_one(batch: PatientBatch) -> list[PatientBatch]:
    """Return the patients of a batch as batches of one, padded as they were."""
    return [only(batch, [p]) for p in range(len(batch.labels))]


class Reused(nn.Module):
    """One linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))  # type: ignore[no-any-return]


class Outside(Reused):
    """A layer whose weight is used without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.layer.weight) + self.layer(x))  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.LayerNorm(2)
    )


def rows(seed: int = 0, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, FEATURES), generator=generator), torch.arange(n) % 2


def single_rows(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    x, y = batch
    return [(x[r : r + 1], y[r : r + 1]) for r in range(len(y))]


def row_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def channel_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0][:, None]), batch[1], reduction="none")


_: Losses = row_losses
