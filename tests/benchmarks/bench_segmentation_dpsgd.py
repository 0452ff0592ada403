"""Segmentation under DP-SGD with local noise: what a patient's ε = 8 leaves of Dice, on generated tissue.

    python -m tests.benchmarks.bench_segmentation_dpsgd [--seeds 1,2,3] [--patients 60] [--train head,decoder]

Four sites with as many patients each, one image of 128 px a patient; of three pairs of patients one is for
testing, and a fifth site is tested on alone. Their stains differ more than those of the public images. The
network is small (width 24) and sees windows of 64 px at 32. It begins at random weights, or at weights that
were trained on public images: generated tissue of other seeds, without protection. Every row takes the same
steps. *Without noise* clips as the protected row does; *alone* likewise, each site by itself (mean of the
sites' models). A seed sets patients, first weights and draws. (The noise is drawn from the seed, so that the
figures repeat; whoever wants the guarantee leaves ``noise_seed`` out.)

The tissue is drawn by the program and no hospital's: the figures say what noise does, not what a network can
do. Learning rate and clip norm were set beforehand and not tuned.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from histoflare.masks.images import ImageCohort, load_image_cohort
from histoflare.masks.task import MaskTask
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.plan import DpSgd
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.synthetic.cohort import EXTERNAL
from histoflare.synthetic.images import SyntheticImages, plan_images, render_image

LABELS = ("background", "nucleus")
SITES, SIDE_PX, WINDOW_PX = 4, 128, 64
STAIN_POWER = 4.0
RATE, STEPS, ROUNDS = 0.25, 2, 20
DELTA = 1e-5
PUBLIC_SEED, PUBLIC_PATIENTS, PUBLIC_STEPS = 1000, 24, 150
UNIFORM = FedAvg(weighting="uniform")


def make_task(network: str, train: str, seed: int, learning_rate: float, windows: int) -> MaskTask:
    """Return the task of the private sites."""
    return MaskTask(
        LABELS,
        background="background",
        network=network,
        width=24,
        norm="group",
        train=train,
        patch_px=32,
        window_px=WINDOW_PX,
        stride_px=WINDOW_PX,
        learning_rate=learning_rate,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=8,
        windows_per_record=windows,
        local_epochs=None,
        local_steps=STEPS,
        seed=seed,
    )


def draw(folder: Path, sites: int, patients: int, seed: int, stain_power: float) -> dict[str, ImageCohort]:
    """Return generated cohorts: the sites, and one for testing alone."""
    made = SyntheticImages(
        sites=sites,
        patients=patients,
        images_per_patient=1,
        side_px=SIDE_PX,
        seed=seed,
        stain_power=stain_power,
    )
    rows: dict[str, list[list[str]]] = {}
    for image in plan_images(made):
        place = folder / image.site
        place.mkdir(parents=True, exist_ok=True)
        pixels, mask = render_image(image, SIDE_PX, seed)
        Image.fromarray(pixels).save(place / f"{image.patient}.png")
        Image.fromarray(mask).save(place / f"{image.patient}.mask.png")
        names = [f"{image.patient}.png", f"{image.patient}.mask.png", image.patient, str(image.split)]
        rows.setdefault(image.site, []).append(names)
    for site, listed in rows.items():
        with (folder / site / "images.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "mask", "patient", "split"], *listed])
    return {
        site: load_image_cohort(site, folder / site / "images.csv", LABELS, window_px=WINDOW_PX)
        for site in rows
    }


def pretrain(folder: Path, network: str, seed: int) -> State:
    """Return weights that were trained on public images."""
    public = draw(folder, 1, PUBLIC_PATIENTS, PUBLIC_SEED + seed, 1.0)
    data = next(cohort for name, cohort in public.items() if name != EXTERNAL)
    task = replace(make_task(network, "all", seed, 0.1, 1), momentum=0.9, local_steps=PUBLIC_STEPS)
    return train_locally(task, model_state(task.build_model()), data, seed=seed).state


def dice(task: MaskTask, state: State, sites: Mapping[str, ImageCohort]) -> dict[str, float]:
    """Return the Dice of the sites' test patients, and that of the site that nobody trains on."""
    own = [
        evaluate(predict(task, state, cohort, "test"), bootstraps=0)["dice"].value or 0.0
        for name, cohort in sites.items()
        if name != EXTERNAL
    ]
    outside = evaluate(predict(task, state, sites[EXTERNAL], "test"), bootstraps=0)["dice"].value or 0.0
    return {"sites": statistics.fmean(own), "external": outside}


def all_nuclei(sites: Mapping[str, ImageCohort]) -> dict[str, float]:
    """Return the same for calling every pixel a nucleus: a model that has seen nothing."""

    def of(cohort: ImageCohort) -> float:
        shares = np.array([(cohort.read(record).mask == 1).mean() for record in cohort.of_split("test")])
        return float((2 * shares / (1 + shares)).mean())

    own = statistics.fmean(of(cohort) for name, cohort in sites.items() if name != EXTERNAL)
    return {"sites": own, "external": of(sites[EXTERNAL])}


def make_plan(task: MaskTask, patients: int, clip_norm: float, noise_seed: int) -> DpSgd:
    """Return DP-SGD with the least noise that costs a patient ε = 8 over all rounds."""
    asked = DpSgd(
        clip_norm=clip_norm,
        delta=DELTA,
        budget_epsilon=8.0,
        budget_share=1.0,
        sample_rate=RATE,
        batch_size=RATE * patients,
        steps=STEPS,
        noise_seed=noise_seed,
    )
    return asked.settled(ROUNDS, count_sent_by_job(UNIFORM, task))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--patients", type=int, default=60, help="of a site, two thirds to train on")
    parser.add_argument("--network", default="unet-monai-31m")
    parser.add_argument("--train", default="head,decoder")
    parser.add_argument("--starts", default="random,public")
    parser.add_argument("--arms", default="alone,without noise,protected")
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--clip-norm", type=float, default=0.5)
    parser.add_argument("--stain-power", type=float, default=STAIN_POWER)
    parser.add_argument("--windows", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    found: dict[str, list[dict[str, float]]] = {}

    def note(row: str, figures: Mapping[str, float], since: float) -> None:
        found.setdefault(row, []).append(dict(figures))
        said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"  {row:50} {said} ({time.monotonic() - since:.0f} s)", flush=True)

    for seed in map(int, chosen.seeds.split(",")):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            now = time.monotonic()
            sites = draw(Path(name) / "private", SITES, chosen.patients, seed, chosen.stain_power)
            training = {site: cohort for site, cohort in sites.items() if site != EXTERNAL}
            patients = min(len(cohort.train) for cohort in training.values())
            note(f"every pixel a nucleus ({patients} training patients)", all_nuclei(sites), now)
            for start in chosen.starts.split(","):
                state = None if start == "random" else pretrain(Path(name) / "public", chosen.network, seed)
                for part in chosen.train.split(","):
                    task = make_task(chosen.network, part, seed, chosen.learning_rate, chosen.windows)
                    first = model_state(task.build_model()) if state is None else state
                    if part == chosen.train.split(",")[0]:
                        note(f"{start}: as it begins", dice(task, first, sites), now)
                    plan = make_plan(task, patients, chosen.clip_norm, seed)
                    for arm in chosen.arms.split(","):
                        now = time.monotonic()
                        taken = plan if arm == "protected" else plan.without_noise(seed)
                        groups = (
                            [{site: cohort} for site, cohort in training.items()]
                            if arm == "alone"
                            else [training]
                        )
                        figures = [
                            dice(
                                task,
                                run_in_process(
                                    task, group, UNIFORM, ROUNDS, seed, taken, initial_state=first
                                ).state,
                                sites,
                            )
                            for group in groups
                        ]
                        mean = {key: statistics.fmean(row[key] for row in figures) for key in figures[0]}
                        note(f"{start}, {part}: {arm}", mean, now)
                    weights = count_sent_by_job(UNIFORM, task)
                    spent = epsilon([plan.spend().times(ROUNDS)], DELTA, "pld")
                    print(
                        f"  {part}: {weights} weights, noise multiplier {plan.noise_multiplier:.3f}, patient "
                        f"ε = 8 in the ledger, {spent:.2f} by PLD, δ = {DELTA:g}",
                        flush=True,
                    )
    print(f"\nDice, mean and standard deviation over seeds {chosen.seeds}")
    for row, entries in found.items():
        print(f"{row:50} " + ", ".join(f"{key} {_spread([e[key] for e in entries])}" for key in entries[0]))
    print(f"{time.monotonic() - started:.0f} s")


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


if __name__ == "__main__":
    main()
