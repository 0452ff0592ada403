"""What a round costs beside training: four sites that take one empty step, in one process.

    python -m tests.benchmarks.bench_round [--rounds 50]

A round builds each site's model, loads the global state, checks and subtracts, passes the privacy plan, and
the server checks, orders and averages in float64. Beside it, as a floor: a weighted mean of the same four
arrays in plain numpy float64.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from histoflare.bags.targets.classes import Predictions
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedavg import FedAvg

SITES = {f"site_{index}": None for index in range(4)}


@dataclass(frozen=True)
class NoOpTask:
    """One step whose loss touches no parameter, so that nothing is trained."""

    parameters: int
    labels: tuple[str, ...] = ("a", "b")

    def build_model(self) -> nn.Module:
        return nn.ParameterDict({"w": torch.zeros(self.parameters)})

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def n_train(self, data: None) -> int:
        return 1

    def train_batches(self, data: None, seed: int) -> Iterator[None]:
        yield None

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        return torch.zeros((), requires_grad=True) * 1.0

    def predict(self, model: nn.Module, data: None, split: str) -> Predictions:
        raise NotImplementedError


def milliseconds(run: Callable[[], None], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
        f"Python {platform.python_version()}; four sites, median (fastest) of {options.rounds} rounds"
    )
    print(f"{'parameters':>12} {'round, ms':>18} {'numpy mean, ms':>18}")
    for parameters in (1_000, 1_000_000):
        task = NoOpTask(parameters)
        run_in_process(task, SITES, FedAvg(), 3, 0)  # warm up
        rounds = [1000 * s for s in run_in_process(task, SITES, FedAvg(), options.rounds, 0).seconds]
        arrays = [np.full(parameters, site, dtype=np.float32) for site in range(4)]
        weights = [1.0, 2.0, 3.0, 4.0]

        def mean(arrays: list[np.ndarray] = arrays, weights: list[float] = weights) -> None:
            total = np.zeros(len(arrays[0]))
            for array, weight in zip(arrays, weights, strict=True):
                total += array.astype(np.float64) * weight
            (total / sum(weights)).astype(np.float32)

        floor = milliseconds(mean, options.rounds)
        print(
            f"{parameters:12,} {np.median(rounds):9.2f} ({min(rounds):.2f}) "
            f"{np.median(floor):11.2f} ({min(floor):.2f})"
        )


if __name__ == "__main__":
    main()
