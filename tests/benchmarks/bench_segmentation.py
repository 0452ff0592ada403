"""Nuclei of two institutes: every hospital alone, federated, under FedDP, and pooled, over several seeds.

    python -m tests.benchmarks.bench_segmentation [--seeds 1,2,3] [--networks dhunet,unet-monai-31m]

Four sites train: TNBC patients 1-4 and 5-8, the first and the second half of the stained images of DSB 2018.
Every model is asked about TNBC patients 9-11, whom none has seen. The networks are small (width 24) and begin
at random weights; images are halved in scale (windows of 256 px, of which the network sees 128). A seed sets
the first weights, the order of the windows and their augmentation; sites and test patients stay the same, so
the spread is that of training, and not that of other patients.

Every row has as many steps at each site; the pooled model takes those of all four sites, one after the other.
FedDP: each site's whole update is clipped and noised so that the run costs a patient ε = 8. (The noise is
drawn from the seed, so that the figures repeat; whoever wants the guarantee leaves ``noise_seed`` out.)

Rounds and learning rates were chosen with ``--split settings`` (TNBC 4-7 and 8-11 train, 1-3 are tested) on
seed 100, by the federated model. GroupNorm, half scale and the sizes of windows and batches had been chosen
before by a few models that were tested on patients 9-11 themselves, so the figures are slightly kind. Needs
the nuclei of HISTOFLARE_TEST_DATA.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from histoflare.masks.images import ImageCohort, load_image_cohort, pooled_images
from histoflare.masks.importers import MANIFEST
from histoflare.masks.importers.binary import Source, import_binary
from histoflare.masks.task import MaskTask
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.plan import UpdateNoise
from histoflare.rounds.bounds import POOLED, plan_bounds, train_alone
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg

LABELS = ("background", "nucleus")
REPOSITORY = Path(__file__).resolve().parents[2]
SPLITS = {"test": ((1, 4), (5, 8), (9, 11)), "settings": ((4, 7), (8, 11), (1, 3))}
"""Split → TNBC patients (first, last) of two sites and of the test."""
STEPS, BATCH = 8, 4
ROUNDS = {"dhunet": 12, "unet-monai-31m": 8}
RATES = {"dhunet": 0.2, "unet-monai-31m": 0.1}
EPSILON, DELTA, CLIP_NORM = 8.0, 1e-5, 0.01
FIGURES = ("dice", "dice_pooled", "jaccard", "dice_authors")
WORKERS = 2


@dataclass(frozen=True)
class Work:
    """One thing to train: ``arm`` is untrained, local, federated, float16, feddp or pooled."""

    folder: Path
    split: str
    network: str
    arm: str
    seed: int
    rounds: int


Row = dict[str, float]


def make_task(network: str, seed: int) -> MaskTask:
    """Return the task; GroupNorm, as BatchNorm's statistics of four sites make none that fits a fifth."""
    return MaskTask(
        LABELS,
        background="background",
        network=network,
        width=24,
        norm="group",
        patch_px=128,
        window_px=256,
        stride_px=128,
        learning_rate=RATES[network],
        batch_size=BATCH,
        local_epochs=None,
        local_steps=STEPS,
        seed=seed,
    )


def make_plan(task: MaskTask, rounds: int, seed: int | None = None) -> UpdateNoise:
    """Return FedDP with the least noise that costs a patient ``EPSILON`` over all rounds."""
    plan = UpdateNoise(
        budget_epsilon=EPSILON, budget_share=1.0, delta=DELTA, clip_norm=CLIP_NORM, noise_seed=seed
    )
    return plan.settled(rounds, count_sent_by_job(FedAvg(), task))


@lru_cache(maxsize=1)
def find_cohorts(folder: Path, split: str) -> tuple[dict[str, ImageCohort], ImageCohort]:
    """Return the sites' cohorts and that of the test patients, of what was imported into ``folder``."""
    tnbc = load_image_cohort("tnbc", folder / "tnbc" / MANIFEST, LABELS)
    dsb = load_image_cohort("dsb", folder / "dsb" / MANIFEST, LABELS)

    def of_patients(name: str, first: int, last: int, role: str) -> ImageCohort:
        records = [r for r in tnbc.records if first <= int("".join(filter(str.isdigit, r.patient))) <= last]
        return ImageCohort(name, LABELS, tuple(replace(record, split=role) for record in records))

    def half(name: str, number: int) -> ImageCohort:
        middle = len(dsb.records) // 2
        records = dsb.records[:middle] if number == 0 else dsb.records[middle:]
        return ImageCohort(name, LABELS, tuple(replace(record, split="train") for record in records))

    one, two, held_out = SPLITS[split]
    sites = [
        of_patients(f"TNBC {one[0]}-{one[1]}", *one, "train"),
        of_patients(f"TNBC {two[0]}-{two[1]}", *two, "train"),
        half("DSB, first half", 0),
        half("DSB, second half", 1),
    ]
    return {site.name: site for site in sites}, of_patients("test", *held_out, "test")


def run(work: Work) -> tuple[Work, dict[str, Row]]:
    """Train one thing; return row → figures and seconds."""
    torch.set_num_threads(1)
    sites, test = find_cohorts(work.folder, work.split)
    task = make_task(work.network, work.seed)
    started = time.perf_counter()
    states: Mapping[str, State]
    if work.arm == "local":
        courses = plan_bounds(task, sites, FedAvg(weighting="uniform"), work.rounds, work.seed).local
        states = {
            site: train_alone(task, sites[site], course, FedAvg(weighting="uniform"), work.seed, name=site)
            for site, course in courses.items()
        }
    elif work.arm == "pooled":
        course = plan_bounds(task, sites, FedAvg(weighting="uniform"), work.rounds, work.seed).pooled
        data = pooled_images(list(sites.values()))
        states = {
            POOLED: train_alone(task, data, course, FedAvg(weighting="uniform"), work.seed, name=POOLED)
        }
    elif work.arm == "untrained":
        states = {"untrained": model_state(task.build_model())}
    else:
        plan = make_plan(task, work.rounds, work.seed) if work.arm == "feddp" else None
        strategy = FedAvg(weighting="uniform")
        states = {work.arm: run_in_process(task, sites, strategy, work.rounds, work.seed, plan).state}
    seconds = time.perf_counter() - started
    found = {}
    for name, state in states.items():
        figures = evaluate(predict(task, state, test, "test"), bootstraps=0)
        found[name] = {figure: figures[figure].value or 0.0 for figure in FIGURES} | {"s": seconds}
    return work, found


def all_nuclei(folder: Path, split: str) -> float:
    """Return what it gives to call every pixel a nucleus: the Dice of a model that has seen nothing."""
    test = find_cohorts(folder, split)[1]
    shares = np.array([(test.read(record).mask == 1).mean() for record in test.records])
    return float((2 * shares / (1 + shares)).mean())


def measure(works: Sequence[Work], workers: int) -> dict[str, dict[str, list[Row]]]:
    """Return network → row → one entry per seed."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, list[Row]]] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for work, rows in pool.map(run, works):
            of_network = found.setdefault(work.network, {})
            if work.arm == "local":
                mean = {key: statistics.fmean(row[key] for row in rows.values()) for key in (*FIGURES, "s")}
                of_network.setdefault(ALONE, []).append(mean)
                rows = {f"  {site} alone": row for site, row in rows.items()}
            for name, row in rows.items():
                of_network.setdefault(TITLES.get(name, name), []).append(row)
    return found


ALONE = "local only (mean of the sites' models)"
TITLES = {
    "federated": "federated, no protection",
    "float16": "federated, updates in half precision",
    "feddp": f"federated, FedDP, patient, ε = {EPSILON:g}",
    "pooled": "pooled",
}


def show(network: str, rows: Mapping[str, Sequence[Row]], rounds: int) -> None:
    """Print a network's table, and in how many seeds the federation is above the sites alone."""
    task = make_task(network, 0)
    model = task.build_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    plan = make_plan(task, rounds)
    spent = epsilon([plan.spend().times(rounds)], DELTA, "pld")
    print(f"\n{network}, width 24, {size / 1e6:.1f} million parameters")
    print(f"{rounds} rounds of {STEPS} steps of {BATCH} windows, learning rate {RATES[network]:g}")
    noise = f"clip {CLIP_NORM:g}, noise multiplier {plan.noise_multiplier:.2f}"
    print(f"FedDP: {noise}, patient ε = {spent:.2f} (PLD) at δ = {DELTA:g}")
    print(f"{'':40} " + " ".join(f"{figure:>13}" for figure in FIGURES) + f" {'s':>5}")
    for name, entries in rows.items():
        figures = " ".join(f"{_spread([entry[figure] for entry in entries]):>13}" for figure in FIGURES)
        seconds = "" if name.startswith(" ") else f" {statistics.fmean(entry['s'] for entry in entries):5.0f}"
        print(f"{name:40} {figures}{seconds}")
    if ALONE not in rows or TITLES["federated"] not in rows:
        return
    local = [row["dice"] for row in rows[ALONE]]
    gains = [row["dice"] - mean for row, mean in zip(rows[TITLES["federated"]], local, strict=True)]
    above = sum(gain > 0 for gain in gains)
    print(f"federated less local only, Dice: {_spread(gains)}; above in {above} of {len(gains)} seeds")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--networks", default="dhunet,unet-monai-31m")
    parser.add_argument("--arms", default="untrained,local,federated,float16,feddp,pooled")
    parser.add_argument("--rounds", type=int, help="in place of each network's own")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test")
    parser.add_argument("--workers", type=int, default=WORKERS)
    chosen = parser.parse_args()
    data = Path(os.environ.get("HISTOFLARE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "seg_tnbc").is_dir() or not (data / "seg_dsb2018_he").is_dir():
        sys.exit(f"skipped: no nuclei in {data}; set HISTOFLARE_TEST_DATA")
    started = time.monotonic()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_binary(Source(data / "seg_tnbc"), folder / "tnbc", "nucleus")
        import_binary(Source(data / "seg_dsb2018_he"), folder / "dsb", "nucleus")
        works = [
            Work(folder, chosen.split, network, arm, seed, chosen.rounds or ROUNDS[network])
            for network in chosen.networks.split(",")
            for arm in chosen.arms.split(",")
            for seed in seeds
        ]
        found = measure(works, chosen.workers)
        chance = all_nuclei(folder, chosen.split)
    print(f"seeds {seeds}; every pixel called a nucleus: Dice {chance:.3f}")
    for network, rows in found.items():
        show(network, rows, chosen.rounds or ROUNDS[network])
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
