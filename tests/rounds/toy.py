"""A task small enough for hundreds of rounds in a test: logistic regression, or one hidden layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoflare.bags.targets.class_tally import ClassTally
from histoflare.bags.targets.classes import Predictions
from histoflare.ensemble import mean_probabilities
from histoflare.seeds import derive_seed
from histoflare.tally_form import TallyForm


@dataclass(frozen=True)
class Table:
    """A site's rows: features (n, f) and labels (n,), for training and for testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class ToyTask:
    """``body`` (f → hidden, with dropout and BatchNorm if asked) and ``head``; or the head alone."""

    features: int = 5
    classes: int = 2
    hidden: int = 0
    batch_norm: bool = False
    dropout: float = 0.0
    learning_rate: float = 0.1
    batch_size: int = 8
    local_epochs: int = 1
    seed: int = 0
    labels: Sequence[str] = field(default=("a", "b"))
    data: ClassVar[str] = "bags"
    model_name: ClassVar[str] = "toy"
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    @property
    def tally_form(self) -> TallyForm | None:
        return ClassTally(tuple(self.labels))

    @property
    def manifest_labels(self) -> Sequence[str]:
        return self.labels

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self, table: Predictions) -> tuple[list[str], list[list[str]]]:
        return ["patient"], [[patient] for patient in table.patients]

    def build_model(self) -> nn.Module:
        model = nn.Sequential()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.hidden:
                model.add_module("body", nn.Linear(self.features, self.hidden))
                if self.batch_norm:
                    model.add_module("norm", nn.BatchNorm1d(self.hidden))
                model.add_module("act", nn.Sequential(nn.ReLU(), nn.Dropout(self.dropout)))
            model.add_module("head", nn.Linear(self.hidden or self.features, self.classes))
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate)

    def n_train(self, data: Table) -> int:
        return len(data.y)

    def n_steps(self, data: Table) -> int:
        return self.local_epochs * -(-len(data.y) // self.batch_size)

    def train_batches(self, data: Table, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(self.local_epochs):
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            for rows in torch.randperm(len(data.y), generator=generator).split(self.batch_size):
                yield data.x[rows], data.y[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def average(self, outputs: Tensor) -> Tensor:
        return mean_probabilities(outputs, -1)

    def predict(self, model: nn.Module, data: Table, split: str) -> Predictions:
        x, y = (data.x, data.y) if split == "train" else (data.x_test, data.y_test)
        probabilities = model(x).double().softmax(dim=1).numpy()
        return Predictions(probabilities, y.numpy().astype(np.int64), [f"p{i}" for i in range(len(y))], {})


@dataclass(frozen=True)
class RowTask(ToyTask):
    """The toy task, each row a record."""

    sample_mixing: ClassVar[bool] = False

    def records(self, data: Table, record: str, slides_per_patient: int | None) -> list[int]:
        return list(range(len(data.y)))

    def record_batch(self, data: Table, records: Sequence[int], seed: int) -> Any:
        return data.x[list(records)], data.y[list(records)], torch.Generator().manual_seed(seed)

    def record_losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def toy_table(seed: int, n: int = 40, features: int = 5, shift: float = 0.0) -> Table:
    """Rows of two classes split by a fixed hyperplane; ``shift`` moves a site's features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2 * n, features), generator=generator) + shift
    normal = torch.linspace(-1.0, 1.0, features)
    y = ((x - shift) @ normal > 0).long()
    return Table(x[:n], y[:n], x[n:], y[n:])


def toy_sites(count: int = 4, **arguments: Any) -> dict[str, Table]:
    """Sites ``site_0`` … of different sizes, each shifted a little."""
    return {f"site_{i}": toy_table(100 + i, n=24 + 8 * i, shift=0.2 * i, **arguments) for i in range(count)}
