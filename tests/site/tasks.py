"""MEM with a small model, and tasks that go wrong; importable by a trainer's process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.bags.models.mem import MemSettings
from histoflare.bags.task import BagBatch, BagTask
from histoflare.errors import BagError, HistoflareError
from histoflare.privacy.plan import Open
from histoflare.rounds.round import site_round
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SiteOutcome, Strategy
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.trainer import KIT_MALLOC, TrainerSetup

from ..flare.bags_on_disk import ENCODER, LABELS

SEED = 7
SMALL: dict[str, Any] = {
    "labels": LABELS,
    "encoder": ENCODER,
    "mpp": 0.5,
    "patch_px": 224,
    "model": MemSettings(memories=2, dim=8, hidden=8),
    "learning_rate": 1e-2,
    "batch_size": 4,
}
TASK = BagTask(**SMALL)
SHARED_BODY = FedAvg(share=("blocks",))
"""Every site keeps a head of its own."""


@dataclass(frozen=True)
class GatedTask(BagTask):
    """Trains as any other, unless the file ``gate`` is there: then it makes ``<gate>.here`` and waits."""

    gate: str = ""

    def train_batches(self, data: Any, seed: int) -> Iterator[BagBatch]:
        if Path(self.gate).exists():
            Path(f"{self.gate}.here").touch()
            time.sleep(60)
        yield from super().train_batches(data, seed)


@dataclass(frozen=True)
class FailingTask(BagTask):
    """Fails as ``how`` says."""

    how: str = ""

    def loss(self, model: nn.Module, batch: BagBatch) -> Tensor:
        if self.how == "refuses":
            raise BagError("s1.h5 of patient Doe is damaged", reason="BAG_DAMAGED")
        if self.how == "raises":
            raise ValueError("patient Doe")
        if self.how == "end of file":
            raise EOFError("patient Doe")
        if self.how == "exits":
            os._exit(3)
        if self.how == "modules":
            raise HistoflareError(" ".join(sys.modules))
        if self.how == "environment":
            malloc = [os.environ.get(name) for name in KIT_MALLOC]
            raise HistoflareError(f"{os.environ.get('OMP_NUM_THREADS')} {malloc} {os.getpgrp()}")
        return super().loss(model, batch)


@dataclass(frozen=True)
class UnreadableTask(BagTask):
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return (_refuse_to_exist, ())


def _refuse_to_exist() -> None:
    raise ImportError("no module of patient Doe")


def setup_of(configuration: SiteConfiguration, task: Any = TASK, **changes: Any) -> TrainerSetup:
    """Return the setup of a site called ``a``."""
    arguments: dict[str, Any] = {"site": "a", "strategy": FedAvg(), "seed": SEED, "run": "run-1", **changes}
    return TrainerSetup(configuration=configuration, task=task, **arguments)


def first_state(task: Any = TASK) -> dict[str, NDArray[Any]]:
    """Return the first global state as FLARE hands it over."""
    return {name: tensor.numpy() for name, tensor in model_state(task.build_model()).items()}


def in_process(
    configuration: SiteConfiguration,
    state: State,
    index: int,
    site_state: State,
    strategy: Strategy | None = None,
    task: Any = TASK,
) -> SiteOutcome:
    """Return site ``a``'s half of round ``index`` without a trainer."""
    return site_round(
        task,
        strategy or FedAvg(),
        state,
        load_site_data("a", task, configuration),
        site="a",
        site_state=site_state,
        round_index=index,
        total_rounds=5,
        seed=SEED,
        plan=Open(),
    )


def same_bytes(arrays: Mapping[str, NDArray[Any]], state: State) -> bool:
    """Return whether names, dtypes, shapes and bytes are the same."""
    return list(arrays) == list(state) and all(
        array.dtype == state[name].numpy().dtype
        and np.array_equal(array.view(np.uint8), state[name].numpy().view(np.uint8))
        for name, array in arrays.items()
    )
