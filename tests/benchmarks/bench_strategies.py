"""Strategies beside one another on real features, under four ways in which hospitals differ.

    python -m tests.benchmarks.bench_strategies [--seeds 1,2,3] [--rounds 15]
                                                [--splits even,labels,sizes,stains] [--out FOLDER]

    even     5,000 tiles of colorectal tissue in eight classes (Kather 2016; 43 texture features), a made-up
             patient has a bag of five tiles of one class; four hospitals of 40 patients to train on, dealt
             evenly
    labels   the same, each class dealt by a Dirichlet distribution of concentration 0.3 (Hsu et al. 2019)
    sizes    the same, dealt evenly by class, to hospitals of 107, 32, 16 and 5 patients
    stains   297 tiles of two lung cancers (LC25000), features of EfficientNet-Lite0, each tile a made-up
             patient; four hospitals of 40 patients, each with other strengths of haematoxylin and eosin
             (colour deconvolution, Ruifrok and Johnston 2001)

Each hospital tests on patients of its own, dealt as those that it trains on: as many, where there are enough.
The model is MEM with 8 memories, SGD, one pass over a hospital's patients a round.

Fields decide as much as strategies do. So each strategy has a few settings (``SETTINGS``) at two learning
rates; those with the best mean on a split of another seed (100), which is not shown, are run with the seeds
that are. Each hospital alone, and all data in one place, train with FedAvg's rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from histoflare.bags.encoder import load_encoder
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.task import BagTask
from histoflare.flare.job import read_job
from histoflare.lab.strategy_comparison import Setup, compare_strategies
from histoflare.lab.watch import Watch
from histoflare.report.strategies_page import write_strategies
from histoflare.shipped import JOBS
from histoflare.slides.assemble import read_tiles
from histoflare.storage import write_json
from tests.benchmarks.bags_in_memory import Bags, Slide, pool
from tests.benchmarks.private_questions import PUBLIC, data_folder, read_crc

HOSPITALS, PATIENTS, TILES = 4, 40, 5
CONCENTRATION = 0.3
SIZES = (107, 32, 16, 5)
EQUAL = (1,) * HOSPITALS
STAINS = ((1.0, 1.0), (0.55, 1.3), (1.5, 0.7), (0.75, 0.5))
"""Of each hospital: how strong haematoxylin and eosin are."""

STAIN_VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of haematoxylin, eosin and a third stain in red, green, blue (Ruifrok and Johnston)."""

REHEARSAL = 100
RATES = (0.03, 0.1)
SETTINGS = (
    "fedavg",
    "fedsgd learning_rate=0.1",
    "fedsgd learning_rate=1",
    "fedprox mu=0.01",
    "fedprox mu=0.1",
    "fednova",
    "scaffold",
    "feddyn alpha=0.01",
    "feddyn alpha=0.1",
    "moon mu=0.1",
    "moon mu=1",
    "fedavgm momentum=0.5",
    "fedavgm momentum=0.9",
    "fedadagrad learning_rate=0.03",
    "fedadagrad learning_rate=0.1",
    "fedadam learning_rate=0.01",
    "fedadam learning_rate=0.03",
    "fedyogi learning_rate=0.01",
    "fedyogi learning_rate=0.03",
    'fedrep share=["blocks"]',
    "ditto pull=0.1",
    "ditto pull=1",
    "apfl alpha=0.25",
    "apfl alpha=0.5",
    "finetune",
    "median",
    "trimmed_mean",
    "geometric_median",
    "norm_bound",
    "screened",
    "qfedavg q=0.1",
    "qfedavg q=1",
    "afl rate=0.01",
    "afl rate=0.1",
    "feddg_ga",
    "ensemble",
    "cyclic",
)

Dealt = Mapping[str, Sequence[int]]
"""Hospital → the numbers of its patients, those to train on first."""


def deal_evenly(labels: NDArray[np.int64], sizes: Sequence[int], rng: np.random.Generator) -> Dealt:
    """Deal patients so that each class has its share at each hospital; sizes in proportion to ``sizes``."""
    shares = np.cumsum(sizes) / sum(sizes)
    dealt: dict[str, list[int]] = {f"hospital-{number + 1}": [] for number in range(len(sizes))}
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        start = rng.random()  # so that what does not come out even is not always the same hospital's
        places = (np.arange(len(own)) + start) / len(own)
        for place, patient in zip(places % 1, own, strict=True):
            dealt[f"hospital-{int(np.searchsorted(shares, place, side='right')) + 1}"].append(int(patient))
    return {site: list(rng.permutation(own)) for site, own in dealt.items()}


def deal_by_label(labels: NDArray[np.int64], sites: int, rng: np.random.Generator) -> Dealt:
    """Deal each class by its own Dirichlet distribution over the hospitals."""
    dealt: dict[str, list[int]] = {f"hospital-{number + 1}": [] for number in range(sites)}
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen = rng.choice(sites, size=len(own), p=rng.dirichlet([CONCENTRATION] * sites))
        for site, patient in zip(chosen, own, strict=True):
            dealt[f"hospital-{site + 1}"].append(int(patient))
    return {site: list(rng.permutation(own)) for site, own in dealt.items() if len(own) >= 4}


def fives(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return bags of five tiles (n, 5, 43) of one class, and their classes (n,), in an order of ``seed``."""
    x, y = read_crc()
    rng = np.random.default_rng([seed, 51])
    order = rng.permutation(len(x))
    public, rest = order[:PUBLIC], order[PUBLIC:]
    x = np.clip((x - x[public].mean(axis=0)) / x[public].std(axis=0), -3, 3)
    bags, labels = [], []
    for label in range(int(y.max()) + 1):
        own = [index for index in rest if y[index] == label]
        for start in range(0, len(own) - TILES + 1, TILES):
            bags.append(x[own[start : start + TILES]])
            labels.append(label)
    return np.stack(bags), np.array(labels)


@lru_cache(maxsize=1)
def stained_lung() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return features (stains, n, f) of the lung cancers' tiles in every stain, and classes (n,)."""
    encoder = load_encoder("efficientnet-lite0")
    index = data_folder() / "cls_lc25000_lung" / "index.csv"

    def encode(label: str, stain: tuple[float, float]) -> NDArray[np.float64]:
        tiles = read_tiles(index, {label: label})
        pixels = np.stack([restain(np.asarray(Image.open(t.path).convert("RGB")), *stain) for t in tiles])
        return encoder.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).double().numpy()

    healthy = encode("lung_n", STAINS[0])
    of_stain = []
    for stain in STAINS:
        cancers = [encode(label, stain) for label in ("lung_aca", "lung_scc")]
        scaled = (np.vstack(cancers) - healthy.mean(axis=0)) / (healthy.std(axis=0) + 1e-6)
        of_stain.append(np.clip(scaled, -3, 3))
    return np.stack(of_stain), np.repeat([0, 1], [len(each) for each in cancers])


def restain(pixels: NDArray[np.uint8], haematoxylin: float, eosin: float) -> NDArray[np.uint8]:
    """Return a tile (h, w, 3) with its stains so many times as strong."""
    density = -np.log((pixels.astype(np.float64) + 1) / 256)
    vectors = STAIN_VECTORS / np.linalg.norm(STAIN_VECTORS, axis=1, keepdims=True)
    strengths = density @ np.linalg.inv(vectors) * [haematoxylin, eosin, 1.0]
    return np.clip(256 * np.exp(-strengths @ vectors) - 1, 0, 255).round().astype(np.uint8)


def make_bags(site: str, features: NDArray[np.float64], labels: NDArray[np.int64], n_train: int) -> Bags:
    """Return a hospital's bags (n, patches, f), the first ``n_train`` to train on."""
    names = [f"{site}-{number}" for number in range(len(labels))]
    slides = [
        Slide(name, name, int(label), "train" if number < n_train else "test", features.shape[1])
        for number, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    tensors = (torch.tensor(bag, dtype=torch.float32) for bag in features)
    return Bags(slides, dict(zip(names, tensors, strict=True)))


def crc(
    seed: int, deal: Callable[[NDArray[np.int64], np.random.Generator], Dealt], sizes: Sequence[int]
) -> Mapping[str, Bags]:
    """Return hospitals of colorectal bags, with ``sizes`` of them to train on, or half of what there is."""
    bags, labels = fives(seed)
    dealt = deal(labels, np.random.default_rng([seed, 52]))
    sites = {}
    for number, (site, own) in enumerate(dealt.items()):
        train = min(sizes[number], len(own) // 2)
        chosen = np.array(own[: train + max(train, PATIENTS)])
        sites[site] = make_bags(site, bags[chosen], labels[chosen], train)
    return sites


def crc_even(seed: int) -> Mapping[str, Bags]:
    """Return four hospitals alike."""
    return crc(seed, lambda labels, rng: deal_evenly(labels, EQUAL, rng), [PATIENTS] * HOSPITALS)


def crc_labels(seed: int) -> Mapping[str, Bags]:
    """Return four hospitals that see other classes."""
    return crc(seed, lambda labels, rng: deal_by_label(labels, HOSPITALS, rng), [PATIENTS] * HOSPITALS)


def crc_sizes(seed: int) -> Mapping[str, Bags]:
    """Return four hospitals, from 107 patients to 5."""
    return crc(seed, lambda labels, rng: deal_evenly(labels, EQUAL, rng), SIZES)


def lung_stains(seed: int) -> Mapping[str, Bags]:
    """Return hospitals of lung tiles, each in its own stain."""
    features, labels = stained_lung()
    dealt = deal_evenly(labels, EQUAL, np.random.default_rng([seed, 53]))
    sites = {}
    for number, (site, own) in enumerate(dealt.items()):
        chosen = np.array(own)
        sites[site] = make_bags(site, features[number][chosen][:, None, :], labels[chosen], PATIENTS)
    return sites


SPLITS: Mapping[str, tuple[str, Callable[[int], Mapping[str, Bags]]]] = {
    "even": ("colorectal, dealt evenly", crc_even),
    "labels": ("colorectal, other labels", crc_labels),
    "sizes": ("colorectal, other sizes", crc_sizes),
    "stains": ("lung, other stains", lung_stains),
}


def set_up(
    make: Callable[[int], Mapping[str, Bags]], seed: int, rounds: int, rate: float = RATES[0]
) -> Setup:
    """Return the hospitals of a seed, and their job with the rate of those that train alone."""
    sites = make(seed)
    pooled = pool(dict(sites))
    sample = next(iter(pooled.bags.values()))
    task = BagTask(
        [f"class-{number}" for number in range(1 + max(record.label for record in pooled.records))],
        "made up",
        MemSettings(memories=8, dim=16, hidden=32),
        mpp=None,
        patch_px=None,
        features=sample.shape[1],
        optimizer="sgd",
        learning_rate=rate,
        batch_size=4,
        max_patches=TILES,
        seed=seed,
    )
    job = replace(read_job(JOBS / "mem_fedavg"), task=task, rounds=rounds, seed=seed)
    return Setup(job, sites, pooled)


def rehearse(make: Callable[[int], Mapping[str, Bags]], rounds: int, settings: Sequence[str]) -> list[str]:
    """Return each strategy with the settings and the learning rate that did best on a split not shown."""

    setup = set_up(make, REHEARSAL, rounds)
    texts = [f"{text} task.learning_rate={rate:g}" for text in settings for rate in RATES]
    found = compare_strategies({"": [setup]}, texts, "accuracy", watch=Watch(on_warning=print))
    chosen: dict[str, tuple[float, str]] = {}
    for row in found["splits"][0]["rows"]:
        if "course" in row:
            name = row["strategy"].split()[0]
            chosen[name] = max(chosen.get(name, (-1.0, "")), (row["mean"], row["strategy"]))
    return [text for _, text in chosen.values()]


def show(found: Mapping[str, Any]) -> None:
    """Print the table of one split."""
    seeds = len(found["seeds"])
    heads = f"{'mean':>6} {'sd':>5} {'worst':>6} {'spread':>6} {'rounds':>9} {'kB up':>6} {'down':>6}"
    print(f"  {'strategy':48} {heads}")
    for row in found["splits"][0]["rows"]:
        if "refused" in row:
            print(f"  {row['strategy']:48} {row['refused']['reason']}")
            continue
        cost = ""
        if "course" in row:
            near = "never" if row["near_rounds"] is None else f"{row['near_rounds']:.1f}"
            near += f" ({row['near_seeds']})" if 0 < row["near_seeds"] < seeds else ""
            cost = f"{near:>9} {row['bytes_up'] / 1e3:6.0f} {row['bytes_down'] / 1e3:6.0f}"
        served = f"{row['mean']:6.3f} {row['mean_sd'] or 0:5.3f} {row['worst']:6.3f} {row['spread']:6.3f}"
        print(f"  {row['strategy']:48} {served} {cost}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    shown: list[dict[str, Any]] = []
    for name in chosen.splits.split(","):
        title, make = SPLITS[name]
        started = time.perf_counter()
        texts = rehearse(make, chosen.rounds, SETTINGS)
        rate = next(float(text.rpartition("=")[2]) for text in texts if text.split()[0] == "fedavg")
        setups = [set_up(make, seed, chosen.rounds, rate) for seed in seeds]
        found = compare_strategies({title: setups}, texts, "accuracy", watch=Watch(on_warning=print))
        shown.append(found)
        print(f"\n{title}: {chosen.rounds} rounds, seeds {chosen.seeds}")
        show(found)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        together = shown[0] | {"splits": [split for found in shown for split in found["splits"]]}
        write_json(chosen.out / "strategies.json", together, public=True)
        write_strategies(together, chosen.out / "strategies.html")


if __name__ == "__main__":
    main()
