"""How many weights a model has, and what is left of what it learns under noise: MEM of three sizes.

    python -m tests.benchmarks.bench_weights [--seeds 3] [--patients 100]

The question is ``tiles`` of ``bench_private`` (HISTOFLARE_TEST_DATA), with its steps, sample and clip: four
hospitals, shared noise against the server and any one, all patients of a step at once (``batched_dpsgd``).
The learning rate of each row is the best of four on two splits of other seeds.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from histoflare.bags.models.mem import MemSettings
from histoflare.bags.task import BagTask
from histoflare.errors import JobError
from histoflare.privacy.advice import advise
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.strategies.fedsgd import FedSgd
from tests.benchmarks.batched_dpsgd import Steps
from tests.benchmarks.bench_private import AVERAGED, CLIP, DELTA, RATE, ROUNDS, Cohort

SITES, CLASSES = 4, 8
SIZES = ((1, 4, 8), (2, 8, 16), (10, 128, 256))
"""Memories, dim and hidden of MEM."""

RATES = (0.1, 0.3, 1.0, 3.0)
REHEARSALS = (100, 101)


def run(task: BagTask, seed: int, patients: int, epsilon: float | None, rate: float) -> float:
    """Return the accuracy on the test tiles; a model that is not finite guesses."""
    split = Cohort("tiles", SITES, patients).split(seed)
    divisor = round(RATE * patients * SITES)
    steps = Steps(ROUNDS, divisor, rate, averaged_part=AVERAGED)
    if epsilon is not None:
        plan = DpSgd(
            budget_epsilon=epsilon,
            budget_share=1.0,
            delta=DELTA,
            clip_norm=CLIP,
            sample_rate=RATE,
            batch_size=divisor,
            noise="shared",
            honest=SITES - 1,
        ).settled(ROUNDS, count_sent_by_job(FedSgd(), task))
        noise = plan.sites_noise * SITES**0.5
        steps = Steps(ROUNDS, divisor, rate, RATE, CLIP, noise, AVERAGED)
    try:
        state = steps.train(task, list(split.sites.values()), seed)
        table = predict(task, state, split.test, "test")
    except JobError as error:
        if error.reason != "NOT_FINITE" and "NaN" not in str(error):
            raise
        return 1 / CLASSES
    labels = np.array([record.label for record in split.test.records])
    return float(np.mean(np.argmax(table.probabilities, axis=1) == labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=100)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="the first so many")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for memories, dim, hidden in SIZES[: chosen.sizes]:
        without = 0.0
        for epsilon in (None, 8.0, 3.0, 1.0):

            def measure(rate: float, seed: int) -> float:
                task = BagTask(
                    [f"class-{number}" for number in range(CLASSES)],
                    "made up",
                    MemSettings(memories, dim, hidden, input_norm="rms"),  # noqa: B023 (used before the next)
                    mpp=None,
                    patch_px=None,
                    features=43,
                    optimizer="sgd",
                    max_patches=1,
                    seed=seed,
                )
                return run(task, seed, chosen.patients, epsilon, rate)  # noqa: B023

            tried = {rate: statistics.fmean(measure(rate, seed) for seed in REHEARSALS) for rate in RATES}
            rate = max(tried, key=lambda each: tried[each])
            mean = statistics.fmean(measure(rate, seed) for seed in range(chosen.seeds))
            said = f"MEM {memories} x {dim}, {hidden}: "
            if epsilon is None:
                without = mean
                print(f"{said}no protection {mean:.3f} (rate {rate:g})", flush=True)
                continue
            advice = advise(SITES, chosen.patients, CLASSES, Budget(epsilon, DELTA), colluders=1)
            left = (mean - 1 / CLASSES) / (without - 1 / CLASSES)
            print(
                f"{said}ε {epsilon:g} {mean:.3f} (rate {rate:g}), left {left:.2f}, advise says "
                f"{advice.part_left:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
