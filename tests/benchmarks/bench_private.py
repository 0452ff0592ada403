"""Accuracy against ε on real tiles: noise of each hospital's own, or shared by all under a secure sum.

    python -m tests.benchmarks.bench_private [--seeds 5] [--cohorts 4x40,4x100,16x40] [--epsilons 8,3,1]
                                             [--tiles 1] [--json FILE]

Texture features of 5,000 real tiles of colorectal tissue, eight classes (Kather 2016; the folder of real data
is HISTOFLARE_TEST_DATA), in made-up patients: each has one tile, or with ``--tiles 5`` a bag of five of one
class. A thousand other tiles stand for public data: their mean and standard deviation scale the features,
which are then cut to ±3. The
model is ``linear`` without projection (352 weights), one protected step a round (``fedsgd``), 60 rounds,
sample rate 0.3, clip 0.5, δ = 1e-5, the model of a run the mean of its last half. Noise is calibrated to
ε by the budget's own filter, and all of it is booked on one budget.

    local    each hospital adds noise for the whole of ε by itself
    shared   each adds 1/√(n - 1) of it, the server sees the sum: ε is against it and any one hospital
    pooled   the noise of one mechanism, all patients in one place; and once more with the noise of shared
    open     no protection
    alone    one hospital by itself, the mean of the first four; protected and not

The learning rate of each row and cohort is the best of three on splits of other seeds (100 and up), which are
not shown; as each of these runs, on real patients, would be an event of its own, what is shown is what a job
does that was rehearsed on public data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.task import BagTask
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.transport import Transport
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum

ROUNDS, RATE, CLIP, DELTA = 60, 0.3, 0.5, 1e-5
RATES = (1.0, 4.0, 16.0)
PUBLIC, TEST = 1000, 1000
ALONE = 4
"""Hospitals whose own models are trained."""
REHEARSALS = 2


@dataclass(frozen=True)
class Tile:
    """One bag."""

    slide_id: str
    patient: str
    label: int
    split: str
    patches: int = 1

    @property
    def subgroups(self) -> dict[str, str]:
        """None."""
        return {}


@dataclass(frozen=True)
class Tiles:
    """A hospital's bags in memory."""

    records: Sequence[Tile]
    bags: dict[str, Tensor]

    @property
    def train(self) -> Sequence[Tile]:
        """Those to train on."""
        return [record for record in self.records if record.split == "train"]

    def features(self, record: Tile, rows: Sequence[int] | None = None, /) -> Tensor:
        """Return a bag (n, f)."""
        bag = self.bags[record.slide_id]
        return bag if rows is None else bag[list(rows)]


def read_tiles() -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]]:
    """Return features (n, 43), class numbers (n,) and the classes' names."""
    folder = Path(os.environ.get("HISTOFLARE_TEST_DATA", ""))
    with np.load(folder / "feat_crc5000" / "crc5000_best2.npz", allow_pickle=False) as held:
        arrays = {name: held[name] for name in held.files}
    x = next(value for value in arrays.values() if value.ndim == 2 and value.shape[1] == 43)
    y = next(value for value in arrays.values() if value.ndim == 1 and len(value) == len(x))
    names, numbers = np.unique(y, return_inverse=True)
    return x.astype(np.float64), numbers.astype(np.int64), [f"class-{name}" for name in names]


def split_tiles(
    sites: int, patients: int, tiles: int, seed: int
) -> tuple[dict[str, Tiles], Tiles, list[str]]:
    """Return site → its patients, all for training, and the tiles to test on, one a patient."""
    x, y, names = read_tiles()
    order = np.random.default_rng([seed, sites, patients, tiles]).permutation(len(x))
    public, test, rest = np.split(order, [PUBLIC, PUBLIC + TEST])
    x = np.clip((x - x[public].mean(axis=0)) / x[public].std(axis=0), -3, 3)
    by_class = [[int(index) for index in rest if y[index] == label] for label in range(len(names))]
    rng = np.random.default_rng([seed, 1])
    made: dict[str, Tiles] = {}
    for site in range(sites):
        records, bags = [], {}
        for number in range(patients):
            label = int(rng.integers(len(names)))
            while len(by_class[label]) < tiles:
                label = int(rng.integers(len(names)))
            chosen = [by_class[label].pop() for _ in range(tiles)]
            name = f"{site}-{number}"
            bags[name] = torch.tensor(x[chosen], dtype=torch.float32)
            records.append(Tile(name, name, label, "train", tiles))
        made[f"site-{site:02}"] = Tiles(records, bags)
    asked = Tiles(
        [Tile(f"t{i}", f"t{i}", int(y[i]), "test") for i in test],
        {f"t{i}": torch.tensor(x[[i]], dtype=torch.float32) for i in test},
    )
    return made, asked, names


def pool(sites: dict[str, Tiles]) -> Tiles:
    """Return the patients of all in one place."""
    return Tiles(
        [record for each in sites.values() for record in each.records],
        {name: bag for each in sites.values() for name, bag in each.bags.items()},
    )


def accuracy(task: BagTask, state: Any, asked: Tiles) -> float:
    """Return the part of the test tiles that is told right."""
    table: Any = predict(task, state, asked, "test")
    labels = np.array([record.label for record in asked.records])
    return float(np.mean(np.argmax(table.probabilities, axis=1) == labels))


@dataclass(frozen=True)
class Row:
    """One way to train: on which sites, under which plan, how its updates travel."""

    sites: dict[str, Tiles]
    plan: PrivacyPlan
    transport: Transport = PLAIN

    def run(self, task: BagTask, asked: Tiles, learning_rate: float, seed: int) -> float:
        """Train and test."""
        strategy = FedSgd(learning_rate=learning_rate, weighting="uniform", averaged_part=0.5)
        run = run_in_process(task, self.sites, strategy, ROUNDS, seed, self.plan, transport=self.transport)
        return accuracy(task, run.handed_out, asked)


def rows_of(
    task: BagTask, sites: dict[str, Tiles], patients: int, epsilons: Sequence[float]
) -> Iterator[tuple[str, float | None, list[Row]]]:
    """Yield name, ε and what to train; several rows are averaged."""
    weights, n = count_sent_by_job(FedSgd(), task), len(sites)
    alone = [{site: data} for site, data in list(sites.items())[:ALONE]]
    yield "open", None, [Row(sites, Open())]
    yield "alone, open", None, [Row(each, Open()) for each in alone]
    for epsilon in epsilons:

        def plan(cohort: int, **more: Any) -> DpSgd:
            asked = DpSgd(
                **{
                    "budget_epsilon": epsilon,  # noqa: B023 (used before the next one)
                    "budget_share": 1.0,
                    "delta": DELTA,
                    "clip_norm": CLIP,
                    "sample_rate": RATE,
                    "batch_size": RATE * cohort,
                    **more,
                }
            )
            return asked.settled(ROUNDS, weights)

        local, shared = plan(patients), plan(n * patients, noise="shared", honest=n - 1)
        whole = {"pool": pool(sites)}
        pooled = plan(n * patients)
        noise = (shared.noise_multiplier or 0.0) * (n / (n - 1)) ** 0.5
        louder = replace(pooled, noise_multiplier=noise)
        yield "local", epsilon, [Row(sites, local)]
        yield "shared", epsilon, [Row(sites, shared, MaskedSum())]
        yield "pooled", epsilon, [Row(whole, pooled)]
        yield "pooled, noise of shared", epsilon, [Row(whole, louder)]
        yield "alone", epsilon, [Row(each, local) for each in alone]


def measure(
    sites: int, patients: int, tiles: int, seeds: int, epsilons: Sequence[float]
) -> list[dict[str, Any]]:
    """Return a line for each row of the table."""
    found: dict[tuple[str, float | None], dict[float, list[float]]] = {}
    shown: dict[tuple[str, float | None], list[float]] = {}
    chosen: dict[tuple[str, float | None], float] = {}
    for seed in [*range(100, 100 + REHEARSALS), *range(seeds)]:
        data, asked, names = split_tiles(sites, patients, tiles, seed)
        task = BagTask(
            names,
            "kather",
            LinearSettings(directions=0),
            mpp=None,
            patch_px=None,
            features=43,
            optimizer="sgd",
            batch_size=max(1, round(RATE * patients)),
            max_patches=tiles,
            seed=seed,
        )
        for name, epsilon, rows in rows_of(task, data, patients, epsilons):
            key = name, epsilon
            if seed >= 100:
                for rate in RATES:
                    of_rate = found.setdefault(key, {}).setdefault(rate, [])
                    of_rate += [row.run(task, asked, rate, seed) for row in rows[:1]]
                continue
            if key not in chosen:
                chosen[key] = max(RATES, key=lambda rate: statistics.fmean(found[key][rate]))
            scores = [row.run(task, asked, chosen[key], seed) for row in rows]
            shown.setdefault(key, []).append(statistics.fmean(scores))
    return [
        {
            "sites": sites,
            "patients": patients,
            "tiles": tiles,
            "row": name,
            "epsilon": epsilon,
            "rate": chosen[name, epsilon],
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
        for (name, epsilon), values in shown.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cohorts", default="4x40,4x100,16x40")
    parser.add_argument("--epsilons", default="8,3,1")
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    epsilons = [float(epsilon) for epsilon in chosen.epsilons.split(",")]
    for cohort in chosen.cohorts.split(","):
        sites, patients = map(int, cohort.split("x"))
        started = time.perf_counter()
        of_cohort = measure(sites, patients, chosen.tiles, chosen.seeds, epsilons)
        lines += of_cohort
        print(f"\n{sites} hospitals x {patients} patients, {chosen.tiles} tile(s) each, {chosen.seeds} seeds")
        for line in of_cohort:
            epsilon = "-" if line["epsilon"] is None else f"{line['epsilon']:g}"
            spread = "" if line["sd"] is None else f" ± {line['sd']:.3f}"
            print(f"  {line['row']:26} ε {epsilon:>3}  {line['mean']:.3f}{spread}  (rate {line['rate']:g})")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
