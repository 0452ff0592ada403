"""A whole experiment on one workstation: a job over prepared sites, its bounds, the comparison, the report.

The job runs in FLARE's simulator or in this process; both call the same two halves of a round and end with
the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from histoflare.bags.bag import read_header
from histoflare.bags.cohort import Cohort, load_cohort
from histoflare.bags.cohort import pooled as pool_cohorts
from histoflare.bags.model_file import save_model
from histoflare.commands.console import console
from histoflare.commands.sites import EXTERNAL
from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.flare.simulator import run_simulation
from histoflare.privacy.plan import Open
from histoflare.report.consortium import RunFacts, build_report
from histoflare.rounds.bounds import train_local_only, train_pooled
from histoflare.rounds.comparison import compare
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, digest
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.manifest import read_manifest
from histoflare.storage import write_json

RUNTIMES = ("simulator", "inprocess")
REPORT_FILE = "report.json"
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Attributes:
        job: The job.
        sites: Training sites and where each keeps its manifest and bags.
        external: External cohorts; they are asked as one.
        runtime: One of :data:`RUNTIMES`.
    """

    job: Job
    sites: Mapping[str, SiteConfiguration]
    external: Mapping[str, SiteConfiguration]
    runtime: str


class PhaseClock:
    """Seconds of each named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under ``name``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def run_experiment(experiment: Experiment, out: Path, bars: Progress, clock: PhaseClock) -> dict[str, Any]:
    """Run the job and its bounds, write the report and the model to ``out``, and return the report.

    Raises:
        HistoflareError: A site's data do not fit the job (every fault at once), or the job failed.
    """
    job = experiment.job
    with clock.phase("load bags"):
        cohorts = {site: _load(job, site, where) for site, where in experiment.sites.items()}
        for site, cohort in cohorts.items():
            for warning in cohort.warnings:
                console.print(
                    f"{site}: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True
                )
        outside = [_load(job, name, where) for name, where in experiment.external.items()]
        external = pool_cohorts(outside, EXTERNAL) if outside else None
    with clock.phase("federated rounds"):
        state, site_states, participation = _federate(experiment, cohorts, bars)
    with clock.phase("local and pooled bounds"):
        local, pooled = _train_bounds(job, cohorts, bars)
    with clock.phase("evaluation"):
        comparison = compare(
            job.task,
            job.strategy,
            state,
            cohorts,
            site_states=site_states,
            local=local,
            pooled=pooled,
            external=external,
            seed=job.seed,
        )
    facts = RunFacts(
        job=job.name,
        runtime=experiment.runtime,
        strategy={"name": job.strategy.name, **asdict(job.strategy)},
        task=job.task.to_json(),
        seed=job.seed,
        rounds=job.rounds,
        participation=participation,
        privacy=Open().describe(),
        seconds=clock.seconds,
        model_sha256=digest(state),
    )
    report = build_report(facts, comparison)
    save_model(
        out / MODEL_FILE,
        job.strategy.personalize(state, {}),
        job.task,
        mosaic=_mosaic(cohorts),
        training={
            "job": job.name,
            "strategy": facts.strategy,
            "rounds": job.rounds,
            "seed": job.seed,
            "sites": sorted(cohorts),
        },
    )
    write_json(out / REPORT_FILE, report)
    return report


def _load(job: Job, site: str, where: SiteConfiguration) -> Cohort:
    manifest = read_manifest(where.manifest, labels=job.task.labels, check_files=False)
    return load_cohort(
        site,
        manifest,
        where.bags,
        labels=job.task.labels,
        encoder=job.task.encoder,
        mpp=job.task.mpp,
        patch_px=job.task.patch_px,
    )


def _federate(
    experiment: Experiment, cohorts: Mapping[str, Cohort], bars: Progress
) -> tuple[State, dict[str, State], list[list[str]]]:
    """Return the last global state, what the strategy keeps at each site, and who trained in each round."""
    job = experiment.job
    bar = bars.add_task(f"federated rounds ({experiment.runtime})", total=job.rounds)
    if experiment.runtime == "simulator":
        if job.strategy.share is not None:
            raise JobError(
                "With share = … every site keeps layers of its own, and FLARE's simulator throws them away "
                "at its end: its models could not be evaluated. Use --runtime inprocess."
            )
        result = run_simulation(job, experiment.sites, on_round=lambda done: bars.update(bar, completed=done))
        bars.update(bar, completed=job.rounds)
        return result.state, {}, [row["taking_part"] for row in result.rounds]
    if experiment.runtime == "inprocess":
        run = run_in_process(
            job.task,
            {site: cohorts[site] for site in sorted(cohorts)},
            job.strategy,
            job.rounds,
            job.seed,
            on_round=lambda *_: bars.advance(bar),
        )
        return run.state, run.site_states, [list(sites) for sites in run.participation]
    raise JobError(f"There is no runtime '{experiment.runtime}'; use {' or '.join(RUNTIMES)}.")


def _train_bounds(job: Job, cohorts: Mapping[str, Cohort], bars: Progress) -> tuple[dict[str, State], State]:
    bar = bars.add_task("bounds (each site alone, all pooled)", total=len(cohorts) + 1)
    local: dict[str, State] = {}
    for site, cohort in cohorts.items():
        local |= train_local_only(job.task, {site: cohort}, job.rounds, job.seed)
        bars.advance(bar)
    pooled = train_pooled(job.task, pool_cohorts(list(cohorts.values())), job.rounds, job.seed)
    bars.advance(bar)
    return local, pooled


def _mosaic(cohorts: Mapping[str, Cohort]) -> dict[str, Any] | None:
    """Return the mosaic parameters of the first bag: a model is used on slides cut as its own were."""
    record = next(iter(cohorts.values())).records[0]
    mosaic = read_header(record.path).mosaic
    return None if mosaic is None else dict(mosaic)
