"""Points of accuracy that sites which lie cost, by attack and by the server's rule.

    python -m tests.benchmarks.bench_robust [--seeds 1,2,3] [--rounds 5] [--federations 5:1,8:2,5:3]

Hospitals of 40 patients to train on, dealt evenly (``bench_strategies``): a made-up patient is a bag of five
tiles of colorectal tissue, in eight classes. The model is linear, SGD, one pass a round. Some hospitals
change their labels, or what leaves their own gate; they know the others' updates. A figure is the mean over
the seeds of what the honest hospitals' patients lose against FedAvg without attack. Where a server refused
an update, or training broke off, the reason stands in place of a figure.

With three liars of five no rule can know who lies: that block shows what breaks each of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.task import BagTask
from histoflare.errors import JobError
from histoflare.privacy.plan import Open
from histoflare.rounds.local import predict
from histoflare.rounds.round import server_round, site_round
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategies.geometric_median import GeometricMedian
from histoflare.rounds.strategies.krum import Krum
from histoflare.rounds.strategies.median import Median
from histoflare.rounds.strategies.norm_bound import NormBound
from histoflare.rounds.strategies.screened import Screened
from histoflare.rounds.strategies.trimmed_mean import TrimmedMean
from histoflare.rounds.strategy import Strategy, join
from tests.benchmarks.bags_in_memory import Bags
from tests.benchmarks.bench_strategies import PATIENTS, TILES, crc, deal_evenly

CLASSES, RATE = 8, 3.0
FEDERATIONS = "5:1,8:2,5:3"
"""How many hospitals, and how many of them lie."""

LITTLE = 1.5
"""Standard deviations from the mean. The paper's own bound is 0 for so few sites; it attacks with 1.5."""

Attack = Callable[[State, Sequence[State]], State]
"""(a liar's own update, the honest ones) → what it sends."""


def over(sent: Sequence[State], figure: Callable[[torch.Tensor], torch.Tensor]) -> State:
    """Return ``figure`` of the updates stacked (sites, ...), tensor by tensor."""
    return {name: figure(torch.stack([each[name] for each in sent])).to(t) for name, t in sent[0].items()}


def times(factor: float) -> Attack:
    """Send so many times one's own update."""
    return lambda own, _: {name: factor * t for name, t in own.items()}


def inner_product(c: float) -> Attack:
    """Send -c times the honest mean (Xie et al. 2019)."""
    return lambda _, honest: over(honest, lambda x: -c * x.mean(dim=0))


ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "NaN": times(float("nan")),
    "times 100": times(100),
    "sign flipped, times 10": times(-10),
    "labels flipped": None,
    "a little is enough": lambda _, honest: over(
        honest, lambda x: x.mean(dim=0) - LITTLE * x.std(dim=0, unbiased=False)
    ),
    "inner product, c = 0.1": inner_product(0.1),
    "inner product, c = 1": inner_product(1),
    "inner product, c = 10": inner_product(10),
}


def rules(sites: Sequence[str], liars: int) -> Mapping[str, Strategy]:
    """Return the rules, each made for so many liars or for as many as it can be."""
    n = len(sites)
    faulty = min(liars, (n - 3) // 2)
    return {
        "fedavg": FedAvg(weighting="uniform"),
        "median": Median(),
        "trimmed": TrimmedMean(trimmed=min(liars, (n - 1) // 2)),
        "geometric": GeometricMedian(),
        "krum": Krum(faulty=faulty),
        "multi-krum": Krum(faulty=faulty, chosen=n - faulty),
        "norm_bound": NormBound(weighting="uniform"),
        "screened": Screened(sites=list(sites)),
    }


def flip_labels(data: Bags) -> Bags:
    """Return the same bags with class k to train on called 7 - k."""
    records = [
        replace(record, label=CLASSES - 1 - record.label) if record.split == "train" else record
        for record in data.records
    ]
    return Bags(records, data.bags)


def accuracy(
    dealt: Mapping[str, Bags], liars: int, attack: str, rule: Strategy, rounds: int, seed: int
) -> float | str:
    """Return the mean accuracy at the honest hospitals, or the reason why the run broke off."""
    task = BagTask(
        [f"class-{number}" for number in range(CLASSES)],
        "made up",
        LinearSettings(),
        mpp=None,
        patch_px=None,
        features=43,
        optimizer="sgd",
        learning_rate=RATE,
        batch_size=8,
        max_patches=TILES,
        seed=seed,
    )
    honest, bad = list(dealt)[:-liars], list(dealt)[-liars:]
    flips = attack == "labels flipped"
    data = {site: flip_labels(own) if flips and site in bad else own for site, own in dealt.items()}
    torch.manual_seed(seed)
    state = model_state(task.build_model())
    own = rule.begin(state)
    change = ATTACKS[attack]
    try:
        for index in range(rounds):
            received = join(state, rule.downlink(own))
            sent = {
                site: site_round(
                    task,
                    rule,
                    received,
                    data[site],
                    site=site,
                    site_state={},
                    round_index=index,
                    total_rounds=rounds,
                    seed=seed,
                    plan=Open(),
                ).update
                for site in dealt
            }
            if change is not None:
                known = [sent[site].tensors for site in honest]
                sent |= {site: replace(sent[site], tensors=change(sent[site].tensors, known)) for site in bad}
            made = server_round(rule, state, list(sent.values()), list(dealt), own=own, round_index=index)
            state, own = made.model, made.own
    except JobError as error:
        return str(error.reason)
    said = [predict(task, state, dealt[site], "test") for site in honest]
    return float(np.mean([(t.probabilities.argmax(1) == t.labels).mean() for t in said]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--federations", default=FEDERATIONS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    for federation in chosen.federations.split(","):
        n, liars = map(int, federation.split(":"))
        started = time.perf_counter()
        dealt = {seed: deal(n, seed) for seed in seeds}
        names = list(rules(list(dealt[seeds[0]]), liars))
        first: list[float] = []
        for attack in ATTACKS:
            cells = []
            for name in names:
                got = [
                    accuracy(sites, liars, attack, rules(list(sites), liars)[name], chosen.rounds, seed)
                    for seed, sites in dealt.items()
                ]
                figures = [value for value in got if isinstance(value, float)]
                if not first:
                    first = figures
                    print(f"\n{liars} of {n} lie; fedavg without attack: {statistics.fmean(first):.3f}")
                    print("| attack | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names))
                whys = sorted({value for value in got if isinstance(value, str)})
                lost = [100 * (was - now) for was, now in zip(first, figures, strict=False)]
                cells.append(whys[0] if whys else f"{statistics.fmean(lost):.1f}")
            print(f"| {attack} | " + " | ".join(cells) + " |", flush=True)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)


def deal(hospitals: int, seed: int) -> Mapping[str, Bags]:
    """Return hospitals alike."""
    return crc(
        seed,
        lambda labels, rng: deal_evenly(labels, (1,) * hospitals, rng),
        [PATIENTS] * hospitals,
    )


if __name__ == "__main__":
    main()
