"""MEM on the classic multiple-instance benchmarks Musk1 and Elephant: accuracy by 10-fold cross-validation.

    python -m tests.benchmarks.bench_mil_classic [--quick] [--repeats 3]

Bags are split, stratified by class; features are standardised with the instances of the training folds. The
settings were chosen on other splits (seeds 100 and up) of the same bags, as is customary for these sets, so
the figures are a little optimistic. Data: ``$HISTOFLARE_TEST_DATA/mil_classic`` or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from histoflare.bags.task import BagTask
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.state import model_state

from ..mem import make_mem_task

PUBLISHED = {"musk1": 0.892, "elephant": 0.868}  # attention MIL, Ilse et al. 2018 (from memory)
SETTINGS = make_mem_task(
    ["negative", "positive"],
    "none",
    mpp=None,
    patch_px=None,
    memories=4,
    dim=32,
    hidden=64,
    learning_rate=5e-4,
    weight_decay=2e-2,
    batch_size=8,
    local_epochs=30,
    max_patches=None,
)


@dataclass(frozen=True)
class Record:
    slide_id: str
    patient: str
    label: int
    split: str
    subgroups: dict[str, str]
    patches: int = 0


@dataclass(frozen=True)
class Fold:
    """One fold, with the interface of a cohort."""

    records: list[Record]
    bags: dict[str, Tensor]

    @property
    def train(self) -> list[Record]:
        return [record for record in self.records if record.split == "train"]

    @property
    def test(self) -> list[Record]:
        return [record for record in self.records if record.split == "test"]

    def features(self, record: Record, rows: Sequence[int] | None = None, /) -> Tensor:
        bag = self.bags[record.slide_id]
        return bag if rows is None else bag[list(rows)]


def make_folds(path: Path, folds: int, seed: int) -> list[Fold]:
    packed = np.load(path)
    x, owner, y = packed["x"].astype(np.float64), packed["bag"], packed["y"].astype(int)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(y)), y)
    made = []
    for train, _ in splits:
        seen = x[np.isin(owner, train)]
        scaled = (x - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-6)
        bags = {str(bag): torch.tensor(scaled[owner == bag], dtype=torch.float32) for bag in range(len(y))}
        chosen = set(train.tolist())
        records = [
            Record(str(bag), str(bag), int(y[bag]), "train" if bag in chosen else "test", {})
            for bag in range(len(y))
        ]
        made.append(Fold(records, bags))
    return made


def cross_validate(path: Path, task: BagTask, folds: int, seed: int) -> tuple[float, float]:
    """Return accuracy (all folds together) and mean AUC of the folds."""
    right, total, areas = 0.0, 0, []
    for index, fold in enumerate(make_folds(path, folds, seed)):
        width = next(iter(fold.bags.values())).shape[1]
        task = replace(task, features=width, seed=seed)
        state = train_locally(task, model_state(task.build_model()), fold, seed=1000 * seed + index).state
        metrics = evaluate(predict(task, state, fold, "test"), bootstraps=0)
        right += (metrics["accuracy"].value or 0.0) * metrics.n_slides
        total += metrics.n_slides
        areas.append(metrics["auc"].value or 0.5)
    return right / total, float(np.mean(areas))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one repeat of five folds")
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeats of the cross-validation, other splits"
    )
    parser.add_argument("--folds", type=int, default=10)
    options = parser.parse_args()
    repeats, folds = (1, 5) if options.quick else (options.repeats, options.folds)
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(os.environ.get("HISTOFLARE_TEST_DATA", default)) / "mil_classic"
    if not data.is_dir():
        sys.exit(f"skipped: no mil_classic in {data.parent}; set HISTOFLARE_TEST_DATA")
    print(f"{folds}-fold CV, {repeats} repeats, mean ± standard deviation over repeats")
    print(f"{'':10} {'MEM accuracy':>15} {'MEM AUC':>15} {'attention MIL accuracy':>24} {'seconds':>8}")
    for name, published in PUBLISHED.items():
        started = time.perf_counter()
        runs = np.array([cross_validate(data / f"{name}.npz", SETTINGS, folds, r) for r in range(repeats)])
        (accuracy, area), (spread, area_spread) = runs.mean(axis=0), runs.std(axis=0)
        print(
            f"{name:10} {accuracy:7.3f} ± {spread:5.3f} {area:7.3f} ± {area_spread:5.3f} "
            f"{published:24.3f} {time.perf_counter() - started:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
