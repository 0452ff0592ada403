"""Table 4 of Adnan et al. 2022 made true: what its settings cost and leave, if hospitals share the noise.

    python -m tests.benchmarks.bench_adnan_shared [--results FILE] [--models mem,linear] [--seeds 0,1,2]
                                                  [--arms "shared;local"] [--rounds N] [--in-process]

The numbers are those of the preset ``adnan-shared`` (jobs/linear_shared): 32 of 705 patients in a step, noise
4.0, 3,966 rounds of one step, four hospitals of 213, 168, 165 and 159 patients to train on, three of them
counted on. The paper counts slides; here each patient has one. The bags are drawn (``drawn_bags``): four
patches of 128 numbers, neither tissue nor an encoder's features. A thousand patients of the four hospitals
and a thousand of a fifth one are tested on.

How hard the question is was fixed by training without protection alone, on seed 100, which is not shown:
MEM on all patients in one place tells 0.848 ± 0.02 of the hospitals' test patients right, as in the paper,
and on those of one hospital clearly fewer.

    mem      the paper's model with the sizes of the preset; on 128 features it has 267,778 weights (on 1,024:
             1.6 million)
    linear   258 weights

    pooled, open       all patients in one place, no protection
    federated, open    the four hospitals, no protection
    shared             the preset: each hospital adds 4.0/√3, the sum has 4.62; ε is against the server and
                       any one hospital
    local              each adds 4.0 by itself, so the sum has 8; the same ε, against all
    pooled, z          DP-SGD in one place with noise 4.0: what the paper ran
    pooled, louder     the same with the noise of *shared*, 4.62
    alone              each hospital by itself with noise 4.0: the same ε; mean of four

Steps are made for all patients at once (``batched_dpsgd``), with ``--in-process`` by ``run_in_process``,
secure sum and all: the package's own way, some eight times as long. By arithmetic *shared* and *pooled,
louder* are one mechanism; made at once, they are the same numbers, and the latter is left out.

Learning rates are the best of two or three on seed 100: of *pooled, open* for all without protection, of
*shared* for all others but *local* and *alone*, which have their own. On real patients each of these runs
would be an event.

Each run is a line of FILE as soon as it is done, and one that stands there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.models.model import ModelSettings
from histoflare.bags.task import BagTask
from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.flare.job_variant import read_preset, try_variant
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.plan import DpSgd, Open
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum
from tests.benchmarks.bags_in_memory import Bags, pool
from tests.benchmarks.batched_dpsgd import Steps
from tests.benchmarks.drawn_bags import Drawn

JOB = Path(__file__).resolve().parents[2] / "jobs" / "linear_shared"
PATIENTS = (213, 168, 165, 159)
TEST = 1000
EXTERNAL = 99
"""Number of the fifth hospital."""

FEATURES, PATCHES, SEPARATION, SHOWN = 128, 4, 3.3, 0.2
REHEARSAL = 100
OPEN, LOUDER = ("pooled, open", "federated, open"), "pooled, louder"
TUNED = {"pooled, open": OPEN[0], "federated, open": OPEN[0], "local": "local", "alone": "alone"}
"""Arm → whose learning rate it has; all others have that of ``shared``."""

RATES = {
    "mem": {True: (0.01, 0.03), False: (0.003, 0.01)},
    "linear": {True: (0.03, 0.1, 1.0), False: (0.003, 0.01, 0.03)},
}
"""Model → whether without protection → learning rates to choose from."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        noise: In the whole sum, in clip norms; None: no protection.
        pooled: All patients in one place.
        sites: Of which hospitals; several tuples are several models, whose figures are averaged.
    """

    noise: float | None
    pooled: bool = False
    sites: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)


@dataclass(frozen=True)
class Run:
    """A line of the results: one arm, one seed.

    Attributes:
        accuracy, auc: On the test patients of the hospitals. external, external_auc: On those of the fifth.
        seconds: Processor time.
    """

    model: str
    arm: str
    seed: int
    rate: float
    rounds: int
    way: str
    accuracy: float
    auc: float
    external: float
    external_auc: float
    seconds: float


@lru_cache(maxsize=1)
def preset() -> Job:
    """Return the job of the preset."""
    return try_variant(JOB, read_preset(JOB, "adnan-shared").changes)


def plan_of(job: Job) -> DpSgd:
    """Return the job's plan."""
    assert isinstance(job.plan, DpSgd)
    return job.plan


def epsilons(job: Job) -> dict[str, float]:
    """Return against whom → ε of one patient of one hospital after all rounds, by Rényi DP."""
    sites, plan = len(PATIENTS), plan_of(job)
    spent = plan.spend().times(job.rounds)
    words = (
        "outsiders, or the server alone",
        "the server and any one hospital",
        "the server and any two",
        "the server and all three others",
    )
    return {
        name: epsilon([spent.against(sites - colluders)], plan.delta) for colluders, name in enumerate(words)
    }


def arms(job: Job) -> dict[str, Arm]:
    """Return the ways to train, by name."""
    plan, n = plan_of(job), len(PATIENTS)
    z = plan.noise_multiplier or 0.0
    return {
        "pooled, open": Arm(None, pooled=True),
        "shared": Arm(plan.sites_noise * math.sqrt(n)),
        "local": Arm(z * math.sqrt(n)),
        "federated, open": Arm(None),
        "pooled, z": Arm(z, pooled=True),
        LOUDER: Arm(plan.sites_noise * math.sqrt(n), pooled=True),
        "alone": Arm(z, sites=tuple((site,) for site in range(n))),
    }


def task_of(model: str, seed: int, batch_size: int) -> BagTask:
    """Return the task: the preset's model, or the one of few weights, on drawn bags."""
    settings: ModelSettings = LinearSettings(directions=0) if model == "linear" else preset().task.model
    assert isinstance(settings, LinearSettings | MemSettings)
    return BagTask(
        ("LUAD", "LUSC"),
        "drawn",
        settings,
        mpp=None,
        patch_px=None,
        features=FEATURES,
        optimizer="sgd",
        batch_size=batch_size,
        max_patches=PATCHES,
        seed=seed,
    )


def train(
    name: str, arm: Arm, model: str, sites: Sequence[Bags], rounds: int, rate: float, seed: int, way: str
) -> State:
    """Return the model of one arm on ``sites``."""
    plan, averaged = plan_of(preset()), preset().strategy.averaged_part
    every = {f"site-{number}": bags for number, bags in enumerate(sites)}
    if arm.pooled:
        every = {"pool": pool(every)}
    divisor = plan.batch_size if len(sites) > 1 else plan.batch_size / len(PATIENTS)
    task = task_of(model, seed, max(1, round(divisor / len(every))))
    if way == "batched":
        steps = Steps(
            rounds,
            round(divisor),
            rate,
            None if arm.noise is None else plan.sample_rate,
            plan.clip_norm,
            arm.noise or 0.0,
            averaged,
        )
        return steps.train(task, list(every.values()), seed)
    strategy = FedSgd(learning_rate=rate, weighting="uniform", averaged_part=averaged)
    protected: DpSgd | Open = Open()
    if name == "shared":
        protected = plan
    elif arm.noise is not None:
        noise = arm.noise / math.sqrt(len(every))
        protected = replace(plan.alone(), noise_multiplier=noise, batch_size=divisor / len(every))
    transport = MaskedSum() if name == "shared" else PLAIN
    return run_in_process(task, every, strategy, rounds, seed, protected, transport=transport).handed_out


def score(task: BagTask, state: State, data: Bags) -> tuple[float, float]:
    """Return accuracy and AUC on the test patients."""
    figures = evaluate(predict(task, state, data, "test"), bootstraps=0)
    accuracy, auc = figures["accuracy"].value, figures["auc"].value
    assert accuracy is not None and auc is not None
    return accuracy, auc


def make_run(name: str, model: str, rate: float, seed: int, rounds: int, way: str) -> Run:
    """Train and test one arm; a model that is not finite counts as guessing."""
    drawn = Drawn(FEATURES, PATCHES, SEPARATION, SHOWN, seed)
    sites = list(drawn.sites(PATIENTS, TEST // len(PATIENTS)).values())
    tested = pool({str(number): bags for number, bags in enumerate(sites)})
    external = drawn.site(EXTERNAL, 0, TEST)
    arm, started, found = arms(preset())[name], time.process_time(), []
    task = task_of(model, seed, 1)
    for chosen in arm.sites[:1] if seed == REHEARSAL else arm.sites:
        try:
            state = train(name, arm, model, [sites[site] for site in chosen], rounds, rate, seed, way)
            found.append((*score(task, state, tested), *score(task, state, external)))
        except JobError as error:
            if error.reason not in ("NOT_FINITE", "TRAINING_FAILED"):
                raise
            found.append((0.5, 0.5, 0.5, 0.5))
    means = [statistics.fmean(values) for values in zip(*found, strict=True)]
    seconds = time.process_time() - started
    return Run(model, name, seed, rate, rounds, way, *(round(value, 4) for value in means), round(seconds, 1))


def runs_of(
    results: Path, model: str, names: Sequence[str], seeds: Sequence[int], rounds: int, way: str
) -> Iterator[Run]:
    """Yield the runs of a model, those for the learning rate first; each new one is written at once."""
    there = [Run(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []

    def run(name: str, rate: float, seed: int, way: str) -> Run:
        key = (model, name, seed, rate, rounds, way)
        for old in there:
            if (old.model, old.arm, old.seed, old.rate, old.rounds, old.way) == key:
                return old
        made = make_run(name, model, rate, seed, rounds, way)
        with results.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        return made

    best: dict[str, float] = {}
    for name in dict.fromkeys(TUNED.get(name, "shared") for name in names):
        tried = [run(name, rate, REHEARSAL, "batched") for rate in RATES[model][name in OPEN]]
        best[name] = max(tried, key=lambda each: each.accuracy).rate
    for seed in seeds:
        for name in names:
            yield run(name, best[TUNED.get(name, "shared")], seed, way)


def show(runs: Sequence[Run]) -> None:
    """Print the table of one model."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    print(f"\n{runs[0].model}, {runs[0].rounds} rounds, {runs[0].way}")
    print(f"{'':18} {'rate':>6} {'accuracy':>15} {'AUC':>15} {'external':>15} {'AUC':>15}   seeds")
    for name, of_arm in by_arm.items():
        columns: Mapping[str, list[float]] = {
            field: [getattr(run, field) for run in of_arm]
            for field in ("accuracy", "auc", "external", "external_auc")
        }
        print(
            f"{name:18} {of_arm[0].rate:>6g} "
            + " ".join(f"{_spread(values):>15}" for values in columns.values())
            + f"   {len(of_arm)}; {statistics.fmean(run.seconds for run in of_arm):.0f} s of processor each",
            flush=True,
        )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir(), "adnan_shared.jsonl"))
    parser.add_argument("--models", default="mem,linear")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", help="names with ; between them; all if not said")
    parser.add_argument("--rounds", type=int, default=preset().rounds)
    parser.add_argument("--in-process", action="store_true")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, figure in epsilons(preset()).items():
        print(f"ε = {figure:.3f} at δ = {plan_of(preset()).delta:g} against {name}")
    way = "in process" if chosen.in_process else "batched"
    asked = (
        chosen.arms.split(";")
        if chosen.arms
        else [name for name in arms(preset()) if chosen.in_process or name != LOUDER]
    )
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    for model in chosen.models.split(","):
        runs: list[Any] = list(runs_of(chosen.results, model, asked, seeds, chosen.rounds, way))
        show(runs)


if __name__ == "__main__":
    main()
