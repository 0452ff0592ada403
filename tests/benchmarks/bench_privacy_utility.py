"""What protection costs: a federation of four sites with 500 patients each, at several ε, over three seeds.

    python -m tests.benchmarks.bench_privacy_utility [--quick] [--seeds 3] [--patients 500]

The cohorts are generated: each patient has one or two bags of 20 patches with 32 features; to a third of the
patches of a bag a direction of feature space that stands for its class is added, and every site has an offset
of its own. The task is neither as hard nor as rich as tissue: the figures say what noise does, not what MEM
can do. Learning rates and clip norms were chosen on seed 100, which is not used here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from histoflare.bags.task import BagTask
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.rounds.bounds import plan_bounds, train_alone
from histoflare.rounds.evaluation import evaluate, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.strategies.fedavg import FedAvg
from tests.benchmarks.bench_mil_classic import Fold, Record
from tests.mem import make_mem_task

SITES, FEATURES, PATCHES = 4, 32, 20
DELTA = 1e-5
ROUNDS, STEPS, RATE = 20, 5, 0.1
TASK = make_mem_task(
    ["negative", "positive"],
    "generated",
    mpp=None,
    patch_px=None,
    features=FEATURES,
    memories=2,
    dim=8,
    hidden=8,
    input_norm="rms",
    optimizer="sgd",
    max_patches=None,
)


def make_cohort(site: int, patients: int, seed: int) -> Fold:
    """Return a site's patients: a fifth more than ``patients`` of them, for testing."""
    rng = np.random.default_rng([seed, site])
    shared = np.random.default_rng(seed)
    directions = shared.normal(size=(2, FEATURES)) / np.sqrt(FEATURES)
    offset = 0.3 * rng.normal(size=FEATURES)
    records, bags = [], {}
    for number in range(patients + patients // 5):
        label = number % 2
        for slide in range(1 + int(rng.random() < 0.3)):
            x = rng.normal(size=(PATCHES, FEATURES)) + offset
            x[: PATCHES // 3] += 3 * directions[label]
            name = f"{site}-{number}-{slide}"
            bags[name] = torch.tensor(x, dtype=torch.float32)
            records.append(
                Record(name, f"{site}-{number}", label, "train" if number < patients else "test", {})
            )
    return Fold(records, bags)


def plans(rounds: int, patients: int) -> dict[str, tuple[BagTask, PrivacyPlan]]:
    """Return row → its task and plan."""
    batch = RATE * patients
    plain = replace(TASK, learning_rate=0.1, batch_size=round(batch), local_epochs=1)
    found: dict[str, tuple[BagTask, PrivacyPlan]] = {"federated, no protection": (plain, Open())}
    for target in (8.0, 3.0, 1.0):
        plan = DpSgd(
            budget_epsilon=target,
            budget_share=1.0,
            delta=DELTA,
            clip_norm=1.0,
            sample_rate=RATE,
            batch_size=batch,
            steps=STEPS,
        )
        found[f"DP-SGD, patient, ε = {target:g}"] = (
            replace(TASK, learning_rate=0.3),
            plan.settled(rounds, count_sent_by_job(FedAvg(), TASK)),
        )
    for target in (8.0, 3.0, 1.0):
        plan = UpdateNoise(budget_epsilon=target, budget_share=1.0, delta=DELTA, clip_norm=0.01)
        found[f"update noise, patient, ε = {target:g}"] = (
            plain,
            plan.settled(rounds, count_sent_by_job(FedAvg(), TASK)),
        )
    return found


def score(task: BagTask, states: Mapping[str, State], sites: Mapping[str, Fold]) -> tuple[float, float]:
    """Return balanced accuracy and AUC over the test patients of all sites, each asked of its model."""
    table = merge_predictions(
        {site: predict(task, states[site], data, "test") for site, data in sites.items()}
    )
    metrics = evaluate(table, bootstraps=0)
    assert metrics["balanced_accuracy"].value is not None and metrics["auc"].value is not None
    return metrics["balanced_accuracy"].value, metrics["auc"].value


def run(seed: int, patients: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return row → balanced accuracy, AUC, seconds."""
    sites = {f"site-{index}": make_cohort(index, patients, seed) for index in range(SITES)}
    rows = {}
    for name, (task, plan) in plans(rounds, patients).items():
        task = replace(task, seed=seed)
        started = time.perf_counter()
        state = run_in_process(task, sites, FedAvg(weighting="uniform"), rounds, seed, plan).state
        seconds = time.perf_counter() - started
        rows[name] = (*score(task, dict.fromkeys(sites, state), sites), seconds)
        if isinstance(plan, Open):
            started = time.perf_counter()
            strategy = FedAvg(weighting="uniform")
            courses = plan_bounds(task, sites, strategy, rounds, seed).local
            alone = [
                train_alone(task, sites[site], course, strategy, seed, name=site)
                for site, course in courses.items()
            ]
            means = [score(task, dict.fromkeys(sites, state), sites) for state in alone]
            seconds = time.perf_counter() - started
            rows["local only (mean of the sites' models)"] = (
                statistics.fmean(mean[0] for mean in means),
                statistics.fmean(mean[1] for mean in means),
                seconds,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 100 patients, 4 rounds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--patients", type=int, default=500)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    patients, rounds = (100, 4) if chosen.quick else (chosen.patients, ROUNDS)
    seeds = range(chosen.first_seed, chosen.first_seed + (1 if chosen.quick else chosen.seeds))
    found = [run(seed, patients, rounds) for seed in seeds]
    print(
        f"{SITES} sites, {patients} training patients each, {rounds} rounds, seeds {list(seeds)}, "
        f"δ = {DELTA:g}; chance is 0.5"
    )
    print(f"{'':42} {'balanced accuracy':>19} {'AUC':>15} {'ε RDP':>8} {'ε PLD':>8} {'s':>6}")
    about = plans(rounds, patients)
    for name in found[0]:
        accuracy, auc, seconds = ([rows[name][index] for rows in found] for index in range(3))
        spent = [about[name][1].spend().times(rounds)] if name in about else None
        figures = [epsilon(spent, DELTA, by) for by in ("rdp", "pld")] if spent else [float("nan")] * 2
        print(
            f"{name:42} {_spread(accuracy):>19} {_spread(auc):>15} "
            + " ".join(f"{figure:8.2f}" if figure == figure else f"{'–':>8}" for figure in figures)
            + f" {statistics.fmean(seconds):6.1f}"
        )


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


if __name__ == "__main__":
    main()
