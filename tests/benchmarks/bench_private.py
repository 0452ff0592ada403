"""Accuracy against ε: noise of each hospital's own, or shared by all under a secure sum.

    python -m tests.benchmarks.bench_private [--seeds 20] [--cohorts tiles:4x40,lung:4x40] [--epsilons 8,3,1]
                                             [--in-process] [--json FILE] [--picture FILE]

``private_questions`` says of whom: real features in made-up patients, and drawn ones. The model is
``linear``, one protected step a round (``fedsgd``), 60 rounds, sample rate 0.3, clip 0.5, δ = 1e-5, the model
of a run the mean of its last half. Noise is calibrated to ε by the budget's own filter, and all of it is
booked on one budget.

    local    each hospital adds noise for the whole of ε by itself
    shared   each adds 1/√(n - 1) of it, the server sees the sum: ε is against it and any one hospital; and
             once more with 1/√(n - 2), against any two
    pooled   the noise of one mechanism, all patients in one place; and once more with the noise of shared
    open     no protection
    alone    one hospital by itself, the mean of the first four; protected and not

Steps are made for all patients at once (``linear_steps``), with ``--in-process`` by ``run_in_process``, the
package's own way, secure sum and all; a test holds one to the other. By arithmetic, *shared* and *pooled with
the noise of shared* are one mechanism: what is between them in a table is the luck of the noise.

The learning rate of each row and cohort is the best of five on splits of other seeds (100 and up), which are
not shown, though of the same tiles. Each of these runs, on real patients, would be an event of its own: what
is shown is what a job does that was rehearsed on public data. The last lines say what ε were without such
data.

Beside what was measured stands what ``histoflare privacy advise`` says of it. Its constant is fitted to the
six rows *local* and *shared* of ``tiles:4x40``; it is held to all others.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from histoflare.bags.task import BagTask
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.advice import advise
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan
from histoflare.privacy.spend import Spend
from histoflare.rounds.local import predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.transport import Transport
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum
from tests.benchmarks.accuracy_picture import draw_picture
from tests.benchmarks.bags_in_memory import Bags, pool
from tests.benchmarks.linear_steps import Points, Protection, accuracy, first_weights, see, train
from tests.benchmarks.private_questions import QUESTIONS, Split

ROUNDS, RATE, CLIP, DELTA = 60, 0.3, 0.5, 1e-5
AVERAGED = 0.5
RATES = (0.25, 1.0, 4.0, 16.0, 64.0)
ALONE = 4
"""Hospitals whose own models are trained."""
REHEARSALS = 5
TWO = "shared, against two"
COHORTS = "tiles:4x40,tiles:4x100,tiles:16x40,wide:4x100,fives:4x40,fives:4x100,lung:4x40,drawn:4x500"


@dataclass(frozen=True)
class Row:
    """One way to train: on which sites, under which plan, how its updates travel."""

    sites: tuple[str, ...]
    plan: PrivacyPlan
    transport: Transport = PLAIN
    pooled: bool = False

    def at_once(self, seen: Seen, learning_rate: float, seed: Sequence[int]) -> float:
        """Train and test, all patients of a step at once."""
        sites = [seen.sites[site] for site in self.sites]
        if self.pooled:
            together = Points(np.vstack([s.inputs for s in sites]), np.concatenate([s.labels for s in sites]))
            sites = [together]
        protection = None
        if isinstance(self.plan, DpSgd):
            among = 1 if self.plan.is_shared else len(sites)
            protection = Protection(
                self.plan.sample_rate,
                self.plan.clip_norm,
                self.plan.sites_noise * math.sqrt(len(sites)),
                self.plan.batch_size * among,
            )
        weights = train(
            sites,
            seen.weights,
            protection,
            rounds=ROUNDS,
            learning_rate=learning_rate,
            batch_size=seen.batch_size,
            averaged_part=AVERAGED,
            seed=seed,
        )
        return accuracy(weights, seen.test)

    def in_process(self, split: Split, learning_rate: float, seed: int) -> float:
        """Train and test as the package does."""
        sites: dict[str, Bags] = {site: split.sites[site] for site in self.sites}
        strategy = FedSgd(learning_rate=learning_rate, weighting="uniform", averaged_part=AVERAGED)
        run = run_in_process(
            split.task,
            {"pool": pool(sites)} if self.pooled else sites,
            strategy,
            ROUNDS,
            seed,
            self.plan,
            transport=self.transport,
        )
        table: Any = predict(split.task, run.handed_out, split.test, "test")
        labels = np.array([record.label for record in split.test.records])
        return float(np.mean(np.argmax(table.probabilities, axis=1) == labels))


@dataclass(frozen=True)
class Seen:
    """A split as the weights see it."""

    sites: dict[str, Points]
    test: Points
    weights: Any
    batch_size: int

    @classmethod
    def of(cls, split: Split) -> Seen:
        """Return what the task's model makes of the split."""
        sites = {site: see(split.task, bags, "train") for site, bags in split.sites.items()}
        test = see(split.task, split.test, "test")
        return cls(sites, test, first_weights(split.task), split.task.batch_size)


Key = tuple[str, float | None]


def rows_of(
    task: BagTask, names: Sequence[str], patients: int, epsilons: Sequence[float]
) -> Iterator[tuple[Key, list[Row]]]:
    """Yield (name, ε) and what to train; several rows are averaged."""
    weights, n = count_sent_by_job(FedSgd(), task), len(names)
    every, alone = tuple(names), [(site,) for site in names[:ALONE]]
    yield ("open", None), [Row(every, Open())]
    yield ("alone, open", None), [Row(each, Open()) for each in alone]
    for target in epsilons:

        def plan(cohort: int, **more: Any) -> DpSgd:
            asked = DpSgd(
                budget_epsilon=target,  # noqa: B023 (used before the next one)
                budget_share=1.0,
                delta=DELTA,
                clip_norm=CLIP,
                sample_rate=RATE,
                batch_size=RATE * cohort,
                **more,
            )
            return asked.settled(ROUNDS, weights)

        local, shared = plan(patients), plan(n * patients, noise="shared", honest=n - 1)
        pooled = plan(n * patients)
        noise = (shared.noise_multiplier or 0.0) * (n / (n - 1)) ** 0.5
        yield ("local", target), [Row(every, local)]
        yield ("shared", target), [Row(every, shared, MaskedSum())]
        yield (TWO, target), [Row(every, plan(n * patients, noise="shared", honest=n - 2), MaskedSum())]
        yield ("pooled", target), [Row(every, pooled, pooled=True)]
        louder = replace(pooled, noise_multiplier=noise)
        yield ("pooled, noise of shared", target), [Row(every, louder, pooled=True)]
        yield ("alone", target), [Row(each, local) for each in alone]


@dataclass(frozen=True)
class Cohort:
    """Of which question, how many hospitals of how many patients."""

    question: str
    sites: int
    patients: int

    @classmethod
    def parse(cls, said: str) -> Cohort:
        """Read ``tiles:4x40``."""
        question, _, numbers = said.partition(":")
        sites, _, patients = numbers.partition("x")
        return cls(question, int(sites), int(patients))

    @property
    def title(self) -> str:
        """For a heading."""
        return f"{QUESTIONS[self.question].title}, {self.sites} × {self.patients}"

    def split(self, seed: int) -> Split:
        """Return the patients of a seed."""
        batch_size = max(1, round(RATE * self.patients))
        return QUESTIONS[self.question].split(self.sites, self.patients, seed, batch_size)


@dataclass(frozen=True)
class Line:
    """What was measured of one row.

    Attributes:
        weights: How many are trained.
        rate: The learning rate that was chosen.
        mean, sd: Of the accuracy, over seeds. seeds: How many.
        expected: What ``advise`` says is left of what training gains over guessing; None: it says nothing.
        left: What was left of it.
    """

    question: str
    sites: int
    patients: int
    row: str
    epsilon: float | None
    weights: int
    rate: float
    mean: float
    sd: float | None
    seeds: int
    expected: float | None = None
    left: float | None = None

    @property
    def chance(self) -> float:
        """What guessing gives."""
        return 1 / QUESTIONS[self.question].classes


def measure(cohort: Cohort, seeds: int, epsilons: Sequence[float], in_process: bool = False) -> list[Line]:
    """Return a line for each row of the table."""
    rehearsed: dict[Key, dict[float, list[float]]] = {}
    shown: dict[Key, list[float]] = {}
    chosen: dict[Key, float] = {}
    weights = 0
    for seed in [*range(100, 100 + REHEARSALS), *range(seeds)]:
        split = cohort.split(seed)
        seen, weights = Seen.of(split), count_sent_by_job(FedSgd(), split.task)
        for index, (key, rows) in enumerate(
            rows_of(split.task, list(split.sites), cohort.patients, epsilons)
        ):
            if seed >= 100:
                of_row = rehearsed.setdefault(key, {})
                for rate in RATES:
                    of_row.setdefault(rate, []).append(rows[0].at_once(seen, rate, (seed, index)))
                continue
            if key not in chosen:
                of_rates = rehearsed[key]
                chosen[key] = max(RATES, key=lambda rate: statistics.fmean(of_rates[rate]))
            found = [
                row.in_process(split, chosen[key], seed)
                if in_process
                else row.at_once(seen, chosen[key], (seed, index, number))
                for number, row in enumerate(rows)
            ]
            shown.setdefault(key, []).append(statistics.fmean(found))
    lines = []
    for (name, target), values in shown.items():
        line = Line(
            cohort.question,
            cohort.sites,
            cohort.patients,
            name,
            target,
            weights,
            chosen[name, target],
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )
        lines.append(_beside_advice(line, statistics.fmean(shown["open", None])))
    return lines


def _beside_advice(line: Line, without: float) -> Line:
    """Return the line with what ``privacy advise`` says of it, if it does.

    Args:
        without: The accuracy without protection.
    """
    if line.row not in ("local", "shared", TWO) or line.epsilon is None:
        return line
    advice = advise(
        line.sites,
        line.patients,
        QUESTIONS[line.question].classes,
        Budget(line.epsilon, DELTA),
        colluders={"shared": 1, TWO: 2}.get(line.row),
        rounds=ROUNDS,
        sample_rate=RATE,
    )
    left = (line.mean - line.chance) / (without - line.chance)
    return replace(line, expected=advice.part_left, left=left)


def tuned(target: float) -> float:
    """Return ε at δ of a run of ``target`` and of one run at each learning rate with as much noise."""
    noise = Budget(target, DELTA).calibrate(RATE, ROUNDS, 1.0)
    return epsilon([Spend(noise, RATE, ROUNDS * (len(RATES) + 1))], DELTA)


def is_fitted(line: Line) -> bool:
    """Return whether the constant of ``advise`` is fitted to this row."""
    return (line.question, line.sites, line.patients) == ("tiles", 4, 40) and line.row != TWO


def show_advice(lines: Sequence[Line]) -> None:
    """Print how far ``advise`` is off, in parts of what training gains over guessing."""
    for name, fitted in (("those it is fitted to", True), ("all others", False)):
        rows = [line for line in lines if line.expected is not None and is_fitted(line) is fitted]
        if rows:
            off = [(row.expected or 0.0) - (row.left or 0.0) for row in rows]
            print(
                f"advise on {name}: {len(rows)} rows, off by {statistics.fmean(map(abs, off)):.3f} on "
                f"average, {max(map(abs, off)):.3f} at most, {statistics.fmean(off):+.3f} in the mean"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cohorts", default=COHORTS)
    parser.add_argument("--epsilons", default="8,3,1")
    parser.add_argument("--in-process", action="store_true", help="by the package's own rounds: minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[Line] = []
    epsilons = [float(target) for target in chosen.epsilons.split(",")]
    for cohort in map(Cohort.parse, chosen.cohorts.split(",")):
        started = time.perf_counter()
        of_cohort = measure(cohort, chosen.seeds, epsilons, chosen.in_process)
        lines += of_cohort
        print(f"\n{cohort.title}: {of_cohort[0].weights} weights, {chosen.seeds} seeds")
        for line in of_cohort:
            said = "-" if line.epsilon is None else f"{line.epsilon:g}"
            spread = "" if line.sd is None else f" ± {line.sd:.3f}"
            advice = (
                "" if line.expected is None else f"  left {line.left:.2f}, advise says {line.expected:.2f}"
            )
            print(f"  {line.row:26} ε {said:>3}  {line.mean:.3f}{spread}  (rate {line.rate:g}){advice}")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    show_advice(lines)
    for target in epsilons:
        print(
            f"ε {target:g}: with a run at each of {len(RATES)} learning rates on the patients themselves "
            f"{tuned(target):.2f}"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    if chosen.picture is not None:
        chosen.picture.write_text(draw_picture(lines))


if __name__ == "__main__":
    main()
