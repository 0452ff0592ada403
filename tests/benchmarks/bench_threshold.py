"""A model that ranks patients well under noise and names one class for all: what cures it, before and after.

    python -m tests.benchmarks.bench_threshold [--seeds 10] [--cohorts lung:4x24@0.2,lung:4x40]
               [--epsilons 0,8,3,1] [--arms before,after] [--own] [--mem]
               [--preset private-small] [--json FILE]

With each way stand its balanced accuracy on other patients, what it were with the threshold that is best in
hindsight, and the AUC. What is between the first two was lost by the threshold alone. ε = 0 is no protection.

    before    the linear model as it was: with a bias, classes as common as the data say
    shares    the classes' shares are public numbers (``class_shares``)
    no bias   the model has none
    after     both
    misjudged both, with shares half way to equal ones: 0.35 in place of 0.2
    centred   both, and a public mean is taken from the features
    offset    both, and an offset of the outputs from a booked release over the training patients, for which a
              tenth of the budget is taken from the training: for each class the sum of the outputs, cut to
              length 2, and how many patients it has
    means     no training: the class whose mean is nearest, of a release of the sums of each class (1 step)

Cohorts: ``lung`` is features of real tiles of two lung cancers as the encoder makes them, each tile a
patient, and ``@0.2`` that one in five of those trained on is of the second; the public mean is that of
healthy lung. ``tumour`` is tumour against the seven other classes of the colorectal tiles, one in eight;
``tiles`` all eight (see ``private_questions``). ``drawn`` is drawn bags, ``shifted`` the same with an
offset as long as the noise of a patch. Tests are on balanced patients, but for tumour and tiles, which are
as they are.

Steps, clip, rate, δ and averaging are those of ``bench_private``; noise is shared against the server and any
one hospital, with ``--own`` each hospital's own. The learning rate of each row is the best of three on three
splits of other seeds, by balanced accuracy. ``--mem`` measures the model and the rounds of ``jobs/mem_dpsgd``
in the package's own process, on lung tiles; ``--preset`` what a preset of ``jobs/linear_shared`` leaves, with
the bias and without shares (before) and as it is (after).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare.bags.models.linear import Linear, LinearSettings
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.targets.classes import Classes, auc
from histoflare.bags.task import BagTask
from histoflare.flare.job_variant import read_preset, try_variant
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedavg import FedAvg
from tests.benchmarks.bags_in_memory import Bags, Slide
from tests.benchmarks.bench_private import AVERAGED, CLIP, DELTA, RATE, ROUNDS
from tests.benchmarks.linear_steps import Matrix, Points, Protection, train
from tests.benchmarks.private_questions import PUBLIC, encode_lung, read_crc

REHEARSALS = (100, 101, 102)
RATES = (1.0, 4.0, 16.0)
TUMOUR = 0
"""Which class of the colorectal tiles that is."""

BOOKED = 0.1
"""Part of the budget for an offset."""
LONGEST = 2.0
"""To which length outputs are cut for it."""

COUNTED = 0.3
"""Of the one release of class means: what a patient counts for beside a vector of length 1."""

JOB = Path(__file__).resolve().parents[2] / "jobs" / "linear_shared"
COHORTS = "lung:4x24@0.2,lung:4x40,tumour:4x100,tiles:4x40,drawn:4x40@0.2,shifted:4x40@0.2,drawn:4x500@0.2"
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Patients:
    """Site → the mean of each patient's scaled patches (n, f) and the classes; the same to test on.

    Attributes:
        public: Others of which the features may be known, (m, f).
        directions: Of the model; 0 keeps all.
    """

    sites: list[tuple[Matrix, Labels]]
    test: tuple[Matrix, Labels]
    public: Matrix
    classes: int
    directions: int

    @property
    def shares(self) -> Matrix:
        """How common the classes are among those trained on."""
        counts = np.bincount(np.concatenate([y for _, y in self.sites]), minlength=self.classes)
        shares: Matrix = counts / counts.sum()
        return shares

    def points(self, which: tuple[Matrix, Labels], bias: bool, centred: bool) -> Points:
        """Return patients as the model ``linear`` sees them; a test holds this to the model."""
        seen = which[0] - (self.public.mean(axis=0) if centred else 0.0)
        if self.directions:
            model = LinearSettings(self.directions).build(seen.shape[1], self.classes)
            assert isinstance(model, Linear) and model.directions is not None
            seen = seen @ model.directions.double().numpy()
        seen = seen / np.sqrt(np.square(seen).sum(axis=1, keepdims=True) + 1e-12)
        return Points(np.hstack([seen, np.full((len(seen), 1), float(bias))]), which[1])


@dataclass(frozen=True)
class Cohort:
    """So many hospitals of so many patients, of whom a part is of the second class (None: as it comes)."""

    question: str
    sites: int
    patients: int
    part: float | None

    @classmethod
    def parse(cls, said: str) -> Cohort:
        """Read ``lung:4x24@0.2``."""
        question, _, rest = said.partition(":")
        numbers, _, part = rest.partition("@")
        sites, _, patients = numbers.partition("x")
        return cls(question, int(sites), int(patients), float(part) if part else None)

    def deal(self, seed: int) -> Patients:
        """Return the patients of a seed."""
        rng = np.random.default_rng([seed, self.sites, self.patients, 7])
        if self.question in ("drawn", "shifted"):
            return self._draw(seed)
        if self.question == "lung":
            healthy, *cancers = encode_lung()
            x, y = scaled(np.vstack(cancers)), np.repeat([0, 1], [len(cancer) for cancer in cancers])
            return Patients(*self._divide(x, y, rng), scaled(healthy), 2, 64)
        features, labels = read_crc()
        order = rng.permutation(len(features))
        public, rest = order[:PUBLIC], order[PUBLIC:]
        x = scaled(np.clip((features - features[public].mean(0)) / features[public].std(0), -3, 3))
        y = (labels == TUMOUR).astype(np.int64) if self.question == "tumour" else labels
        return Patients(*self._divide(x[rest], y[rest], rng), x[public], int(y.max()) + 1, 0)

    def _divide(
        self, x: Matrix, y: Labels, rng: np.random.Generator
    ) -> tuple[list[tuple[Matrix, Labels]], tuple[Matrix, Labels]]:
        """Return the sites' patients and all others."""
        order = rng.permutation(len(y))
        if self.part is not None:
            pools = [list(order[y[order] == label]) for label in (0, 1)]
            second = round(self.part * self.patients)
            sites = [
                [pools[1].pop() for _ in range(second)]
                + [pools[0].pop() for _ in range(self.patients - second)]
                for _ in range(self.sites)
            ]
            order = np.concatenate([*sites, *pools])
        train_on, rest = np.split(order, [self.sites * self.patients])
        return [(x[i], y[i]) for i in train_on.reshape(self.sites, -1)], (x[rest], y[rest])

    def _draw(self, seed: int) -> Patients:
        """Return drawn bags of 8 patches with 128 numbers, as ``drawn_bags`` has them."""
        rng = np.random.default_rng(seed)
        direction = rng.normal(size=128)
        direction *= 0.4 / np.linalg.norm(direction)
        shift = rng.normal(size=128) * (self.question == "shifted")

        def draw(number: int, count: int, part: float) -> tuple[Matrix, Labels]:
            of_site = np.random.default_rng([seed, number])
            offset = 0.05 * of_site.normal(size=128)
            y = (of_site.random(count) < part).astype(np.int64)
            place = of_site.normal(size=count) + np.where(y, 1.3, -1.3)
            x = of_site.normal(size=(count, 8, 128)) + offset + shift + place[:, None, None] * direction
            return scaled(x).mean(axis=1), y

        part = 0.5 if self.part is None else self.part
        sites = [draw(number, self.patients, part) for number in range(self.sites)]
        return Patients(sites, draw(1000, 1000, 0.5), draw(1001, 200, 0.5)[0], 2, 0)


def scaled(x: Matrix) -> Matrix:
    """Return patches (..., f), each scaled by itself."""
    found: Matrix = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-12)
    return found


def noise_of(cohort: Cohort, epsilon: float, own: bool, share: float) -> float:
    """Return the standard deviation of the noise in the whole sum of a step, in clips."""
    shared = {} if own else {"noise": "shared", "honest": cohort.sites - 1}
    plan = DpSgd(
        budget_epsilon=epsilon,
        budget_share=share,
        delta=DELTA,
        clip_norm=CLIP,
        sample_rate=RATE,
        batch_size=RATE * cohort.patients * (1 if own else cohort.sites),
        **shared,  # type: ignore[arg-type]
    ).settled(ROUNDS, 100)
    return plan.sites_noise * math.sqrt(cohort.sites)


def noise_of_one(cohort: Cohort, epsilon: float, own: bool, share: float) -> float:
    """Return that of one release over all patients whose rows have length 1; 0 without protection."""
    if not epsilon:
        return 0.0
    noise = Budget(epsilon, DELTA).calibrate(1.0, 1, share)
    return noise * math.sqrt(cohort.sites if own else cohort.sites / (cohort.sites - 1))


def offset(weights: Matrix, sites: Sequence[Points], noise: float, rng: np.random.Generator) -> Matrix:
    """Return what is added to the outputs (k,) so that the mean of the classes' mean outputs is 0.

    A patient's row is his class's (0.8 · outputs / LONGEST, 0.6): its length is at most 1.
    """
    k = weights.shape[1]
    rows = noise * rng.normal(size=(k, k + 1))
    for site in sites:
        said = site.inputs @ weights
        said = said - said.mean(axis=1, keepdims=True)
        said /= np.maximum(1.0, np.linalg.norm(said, axis=1, keepdims=True) / LONGEST)
        row = np.hstack([0.8 * said / LONGEST, np.full((len(said), 1), 0.6)])
        np.add.at(rows, site.labels, row)
    counts = np.maximum(rows[:, -1:] / 0.6, 1.0)
    means = np.clip(rows[:, :-1] / 0.8 * LONGEST / counts, -LONGEST, LONGEST)
    found: Matrix = -means.mean(axis=0)
    return found


def nearest_mean(sites: Sequence[Points], test: Points, k: int, noise: float, seed: Sequence[int]) -> Matrix:
    """Return the outputs (n, k) of the model of class means; ``noise`` is for rows of length 1."""
    rng = np.random.default_rng(seed)
    x, y = np.vstack([s.inputs[:, :-1] for s in sites]), np.concatenate([s.labels for s in sites])
    std = noise * math.sqrt(1 + COUNTED**2)
    sums = np.stack([x[y == label].sum(axis=0) for label in range(k)]) + std * rng.normal(
        size=(k, x.shape[1])
    )
    counts = np.bincount(y, minlength=k) + std / COUNTED * rng.normal(size=k)
    counts = np.maximum(counts, len(y) / k / 8)
    means = sums / counts[:, None]
    lengths = np.square(means).sum(axis=1) - x.shape[1] * np.square(std / counts)
    found: Matrix = test.inputs[:, :-1] @ means.T - lengths / 2
    return found


ARMS = ("before", "shares", "no bias", "after", "misjudged", "centred", "offset", "means")


def outputs_of(
    cohort: Cohort, who: Patients, arm: str, epsilon: float, own: bool, rate: float, seed: int
) -> Matrix:
    """Return the outputs (n, k) of a model that was trained in a way, for the patients to test on."""
    bias, centred = arm in ("before", "shares"), arm == "centred"
    sites = [who.points(site, bias, centred) for site in who.sites]
    test = who.points(who.test, bias, centred)
    if arm == "means":
        return nearest_mean(sites, test, who.classes, noise_of_one(cohort, epsilon, own, 1.0), (seed, 4))
    shares = (who.shares + 1 / who.classes) / 2 if arm == "misjudged" else who.shares
    protection = None
    if epsilon:
        noise = noise_of(cohort, epsilon, own, 1 - BOOKED if arm == "offset" else 1.0)
        protection = Protection(RATE, CLIP, noise, RATE * cohort.patients * cohort.sites)
    weights = train(
        sites,
        np.zeros((sites[0].inputs.shape[1], who.classes)),
        protection,
        rounds=ROUNDS,
        learning_rate=rate,
        batch_size=max(1, round(RATE * cohort.patients)),
        averaged_part=AVERAGED,
        seed=(seed, 3),
        class_shares=None if arm in ("before", "no bias") else list(shares),
    )
    said: Matrix = test.inputs @ weights
    if arm == "offset":
        noise = noise_of_one(cohort, epsilon, own, BOOKED)
        said = said + offset(weights, sites, noise, np.random.default_rng([seed, 8]))
    return said


@dataclass(frozen=True)
class Found:
    """Balanced accuracy, the same with the offsets that are best in hindsight, and AUC."""

    balanced: float
    hindsight: float
    auc: float

    @classmethod
    def of(cls, outputs: Matrix, labels: Labels) -> Found:
        """Return the figures of outputs (n, k)."""
        powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        columns = {"probabilities": powers / powers.sum(axis=1, keepdims=True), "labels": labels}
        return cls(
            balanced(outputs, labels),
            hindsight(outputs, labels),
            float(auc(columns, np.ones((1, len(labels))))[0]),
        )


def balanced(outputs: Matrix, labels: Labels) -> float:
    """Return the mean over classes of the part that is told right."""
    right = outputs.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def hindsight(outputs: Matrix, labels: Labels) -> float:
    """Return the best balanced accuracy that adding to outputs can make; for more than two classes nearly."""
    k = outputs.shape[1]
    if k == 2:
        difference = outputs[:, 1] - outputs[:, 0]
        order = np.argsort(difference, kind="stable")
        ones = labels[order] == 1
        # after cutting below the i-th patient: of class 0 those before it are right, of class 1 the others
        zeros_right = np.concatenate([[0.0], np.cumsum(~ones) / (~ones).sum()])
        ones_right = 1 - np.concatenate([[0.0], np.cumsum(ones) / ones.sum()])
        ends = np.concatenate([[True], np.diff(difference[order]) > 0, [True]])
        return float(((zeros_right + ones_right) / 2)[ends].max())
    added, best = np.zeros(k), balanced(outputs, labels)
    for label in [*range(k)] * 2:
        for step in np.linspace(-1.5, 1.5, 31) * outputs.std():
            tried = added.copy()
            tried[label] = step
            value = balanced(outputs + tried, labels)
            if value > best:
                added, best = tried, value
    return best


@dataclass(frozen=True)
class Line:
    """What was measured of one way: means over seeds, and the standard deviation of the first."""

    cohort: str
    epsilon: float
    noise: str
    arm: str
    rate: float
    balanced: float
    hindsight: float
    auc: float
    sd: float
    seeds: int


def rehearse(
    run: Callable[[float, int], Found], rates: Sequence[float], rehearsals: Sequence[int], seeds: int
) -> tuple[float, list[Found]]:
    """Return the learning rate that is best on other seeds, and what was found with it."""
    tried = {rate: statistics.fmean(run(rate, seed).balanced for seed in rehearsals) for rate in rates}
    rate = max(tried, key=lambda each: tried[each])
    return rate, [run(rate, seed) for seed in range(seeds)]


def say(cohort: str, epsilon: float, noise: str, arm: str, rate: float, found: list[Found]) -> Line:
    """Print and return a line."""
    values = [each.balanced for each in found]
    line = Line(
        cohort,
        epsilon,
        noise,
        arm,
        rate,
        statistics.fmean(values),
        statistics.fmean(each.hindsight for each in found),
        statistics.fmean(each.auc for each in found),
        statistics.stdev(values) if len(values) > 1 else 0.0,
        len(values),
    )
    said = f"{epsilon:g}" if epsilon else "-"
    print(
        f"{cohort:16} ε {said:>2} {noise:6} {arm:8} {line.balanced:.3f} ± {line.sd:.3f}  in hindsight "
        f"{line.hindsight:.3f}  AUC {line.auc:.3f}  (rate {rate:g})",
        flush=True,
    )
    return line


def measure(said: str, epsilons: Sequence[float], arms: Sequence[str], own: bool, seeds: int) -> list[Line]:
    """Return a line for each way."""
    cohort = Cohort.parse(said)
    deal = lru_cache(maxsize=None)(cohort.deal)
    lines = []
    for epsilon in epsilons:
        for arm in arms:

            def run(rate: float, seed: int) -> Found:
                who = deal(seed)
                return Found.of(outputs_of(cohort, who, arm, epsilon, own, rate, seed), who.test[1])  # noqa: B023

            rates = RATES[:1] if arm == "means" else RATES
            rate, found = rehearse(run, rates, REHEARSALS, seeds)
            lines.append(say(said, epsilon, "own" if own else "shared", arm, rate, found))
    return lines


def by_the_job(said: str, epsilon: float, arm: str, rate: float, seed: int) -> Found:
    """Return what the model and the rounds of ``jobs/mem_dpsgd`` find on lung tiles with a whole budget."""
    cohort = Cohort.parse(said)
    dealt = cohort.deal(seed)
    classes = Classes(class_shares=None if arm in ("before", "no bias") else tuple(dealt.shares))

    def bags(which: tuple[Matrix, Labels], name: str, split: str) -> Bags:
        names = [f"{name}-{number}" for number in range(len(which[1]))]
        slides = [Slide(n, n, int(label), split, 1) for n, label in zip(names, which[1], strict=True)]
        return Bags(
            slides,
            {n: torch.tensor(row[None], dtype=torch.float32) for n, row in zip(names, which[0], strict=True)},
        )

    task = BagTask(
        ("first", "second"),
        "made up",
        MemSettings(2, 8, 16, input_norm="rms", bias=arm in ("before", "shares")),
        classes,
        mpp=None,
        patch_px=None,
        features=dealt.test[0].shape[1],
        optimizer="sgd",
        learning_rate=rate,
        batch_size=max(1, round(0.2 * cohort.patients)),
        max_patches=1,
        seed=seed,
    )
    plan: PrivacyPlan = Open()
    if epsilon:
        plan = DpSgd(
            budget_epsilon=epsilon,
            budget_share=1.0,
            delta=DELTA,
            clip_norm=1.0,
            sample_rate=0.2,
            batch_size=0.2 * cohort.patients,
            steps=2,
            noise_seed=seed,
        ).settled(30, count_sent_by_job(FedAvg(), task))
    sites = {f"site-{i}": bags(site, f"{i}", "train") for i, site in enumerate(dealt.sites)}
    run = run_in_process(task, sites, FedAvg(weighting="uniform"), 30, seed, plan)
    table: Any = predict(task, run.handed_out, bags(dealt.test, "t", "test"), "test")
    return Found.of(np.log(table.probabilities + 1e-300), dealt.test[1])


def measure_mem(said: str, epsilons: Sequence[float], seeds: int) -> list[Line]:
    """Return the lines of ``by_the_job``; without protection the learning rates are smaller."""
    lines = []
    for epsilon in epsilons:
        for arm in ("before", "shares", "no bias", "after"):
            rates = (0.25, 1.0) if epsilon else (0.01, 0.03)
            rate, found = rehearse(partial(by_the_job, said, epsilon, arm), rates, REHEARSALS[:2], seeds)
            lines.append(say(f"MEM {said}", epsilon, "own", arm, rate, found))
    return lines


def measure_preset(name: str, said: str, seeds: int) -> list[Line]:
    """Return what a preset of ``jobs/linear_shared`` leaves, with its noise and learning rate, untuned.

    Its divisor is set to the cohort's, and ε is the part of 8 that it takes for all rounds it reserves.
    """
    job, cohort = try_variant(JOB, read_preset(JOB, name).changes), Cohort.parse(said)
    plan: Any = job.plan
    strategy: Any = job.strategy
    lines = []
    for arm in ("before", "after"):
        found = []
        for seed in range(seeds):
            who = cohort.deal(seed)
            sites = [who.points(site, arm == "before", False) for site in who.sites]
            test = who.points(who.test, arm == "before", False)
            weights = train(
                sites,
                np.zeros((sites[0].inputs.shape[1], who.classes)),
                Protection(
                    plan.sample_rate,
                    plan.clip_norm,
                    plan.sites_noise * math.sqrt(cohort.sites),
                    plan.sample_rate * cohort.patients * cohort.sites,
                ),
                rounds=job.rounds,
                learning_rate=strategy.learning_rate,
                batch_size=1,
                averaged_part=strategy.averaged_part,
                seed=(seed, 5),
                class_shares=None if arm == "before" else list(who.shares),
            )
            found.append(Found.of(test.inputs @ weights, who.test[1]))
        title = f"{name} {said}"
        lines.append(say(title, plan.budget_epsilon, "shared", arm, strategy.learning_rate, found))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cohorts", default=COHORTS)
    parser.add_argument("--epsilons", default="0,8,3,1")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--own", action="store_true", help="each hospital's own noise")
    parser.add_argument("--mem", action="store_true", help="jobs/mem_dpsgd in place of linear: slow")
    parser.add_argument("--preset", help="measure this preset of jobs/linear_shared, at four hospitals")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    epsilons = [float(epsilon) for epsilon in chosen.epsilons.split(",")]
    lines: list[Line] = []
    for said in chosen.cohorts.split(","):
        started = time.perf_counter()
        if chosen.preset:
            lines += measure_preset(chosen.preset, said, chosen.seeds)
        elif chosen.mem:
            lines += measure_mem(said, epsilons, chosen.seeds)
        else:
            lines += measure(said, epsilons, chosen.arms.split(","), chosen.own, chosen.seeds)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
