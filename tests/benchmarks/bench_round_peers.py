"""What a round costs beside training, in one process, beside Flower's simulation and Apple's pfl.

    python -m venv peers
    peers/bin/pip install 'flwr[simulation]==1.42.0' 'pfl==0.6.0'
    peers/bin/python -m tests.benchmarks.bench_round_peers --packages .venv/lib/python3.11/site-packages

The peers' packages do not go together with NVIDIA FLARE's, so they have an environment of their own;
``--packages`` is where PyTorch and what else histoflare needs are found. Four sites take one empty step, as
in ``bench_round``; every library averages their updates. All run one after the other. The time of a round is
from one average to the next, the first rounds left out. Flower's simulation has its clients in processes of
Ray's, which lets it use many machines and costs it here.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SITES = 4
SIZES = (1_000, 1_000_000)


def ours(parameters: int, rounds: int) -> list[float]:
    """Return the seconds of rounds of ``run_in_process``."""
    from histoflare.rounds.runner import run_in_process
    from histoflare.rounds.strategies.fedavg import FedAvg
    from tests.benchmarks.bench_round import SITES as FOUR
    from tests.benchmarks.bench_round import NoOpTask

    return list(run_in_process(NoOpTask(parameters), FOUR, FedAvg(), rounds, 0).seconds)


def flower(parameters: int, rounds: int) -> list[float]:
    """Return the seconds of rounds of Flower's simulation."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    ends: list[float] = []

    class Idle(NumPyClient):  # type: ignore[misc, no-any-unimported]
        def fit(self, parameters: Any, config: Any) -> Any:
            return parameters, 1, {}

    class Timed(FedAvg):  # type: ignore[misc, no-any-unimported]
        def aggregate_fit(self, *arguments: Any, **named: Any) -> Any:
            made = super().aggregate_fit(*arguments, **named)
            ends.append(time.perf_counter())
            return made

    def serve(context: Any) -> Any:
        strategy = Timed(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=SITES,
            min_available_clients=SITES,
            initial_parameters=ndarrays_to_parameters([np.zeros(parameters, np.float32)]),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    run_simulation(
        ServerApp(server_fn=serve),
        ClientApp(client_fn=lambda context: Idle().to_client()),
        num_supernodes=SITES,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return list(np.diff(ends))


def pfl(parameters: int, rounds: int) -> list[float]:
    """Return the seconds of rounds of pfl's simulation."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    ends: list[float] = []

    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(parameters))

        def loss(self, x: Any, **named: Any) -> Any:
            return torch.zeros((), requires_grad=True) * 1.0

        def metrics(self, x: Any, **named: Any) -> Any:
            return {"loss": Weighted(0.0, 1)}

    class Timed(TrainingProcessCallback):  # type: ignore[misc, no-any-unimported]
        def after_central_iteration(self, *arguments: Any, **named: Any) -> Any:
            ends.append(time.perf_counter())
            return False, Metrics()

    idle = Idle()
    server = torch.optim.SGD(idle.parameters(), lr=1.0)
    turns = (number % SITES for number in range(10**9))
    people = FederatedDataset(lambda user: Dataset([torch.zeros(1, 1)], user_id=user), turns.__next__)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=SITES,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=people, val_data=None),
        PyTorchModel(idle, torch.optim.SGD, central_optimizer=server),
        NNTrainHyperParams(local_learning_rate=0.1, local_num_epochs=1, local_batch_size=None),
        NNEvalHyperParams(local_batch_size=None),
        [Timed()],
    )
    return list(np.diff(ends))


LIBRARIES: dict[str, Callable[[int, int], list[float]]] = {"histoflare": ours, "pfl": pfl, "flower": flower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "PARAMETERS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        sys.path += [str(Path("custom").resolve()), str(chosen.packages)]
        found = LIBRARIES[chosen.one[0]](int(chosen.one[1]), chosen.rounds)[3:]
        print("milliseconds", 1000 * statistics.median(found), 1000 * min(found))
        return
    print(f"{os.cpu_count()} CPUs, {SITES} sites; median (fastest) of {chosen.rounds - 3} rounds, ms")
    for parameters in SIZES:
        medians: dict[str, float] = {}
        for library in LIBRARIES:
            command = [sys.executable, "-m", "tests.benchmarks.bench_round_peers"]
            command += ["--packages", str(chosen.packages), "--rounds", str(chosen.rounds)]
            command += ["--one", library, str(parameters)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
            _, median, least = next(
                line for line in ended.stdout.splitlines() if line.startswith("milliseconds")
            ).split()
            medians[library] = float(median)
            times = medians[library] / medians["histoflare"]
            said = f"{float(median):9.2f} ({float(least):.2f})  × {times:.1f}"
            print(f"{parameters:>10,} parameters  {library:12} {said}")


if __name__ == "__main__":
    main()
