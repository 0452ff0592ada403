"""The bounds of an experiment: each site alone, all data pooled; and without noise beside a protected run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from histoflare.flare.job import Job
from histoflare.lab.experiment import Experiment
from histoflare.lab.federation import Federated
from histoflare.lab.watch import Watch
from histoflare.report.bounds import state_bounds
from histoflare.rounds.bounds import POOLED, Bounds, Courses, plan_bounds, train_bounds, without_noise
from histoflare.site.kinds import kind_of
from histoflare.site.kinds.kind import SiteData


@dataclass(frozen=True)
class Trained:
    """The bounds' models, those without noise beside a protected run, and what the report says of both."""

    protected: Bounds
    unprotected: Bounds | None
    stated: dict[str, Any]


def plan_bounds_of(job: Job, cohorts: Mapping[str, SiteData], watch: Watch) -> Courses:
    """Return how the bounds of a job are trained; says it if the pool cannot be."""
    sites = {site: cohorts[site] for site in sorted(cohorts)}
    courses = plan_bounds(job.task, sites, job.strategy, job.rounds, job.seed, job.plan, job.asked)
    if courses.no_pool is not None:
        watch.warn(f"There will be no model of all data in one place: {courses.no_pool}")
    return courses


def rounds_run(job: Job, federated: Federated) -> int:
    """Return how many rounds were run: patience may have ended the last of them."""
    rows = federated.participation
    return len(rows) if rows and rows[-1].get("stopped") else job.rounds


def train_bounds_of(
    experiment: Experiment, cohorts: Mapping[str, SiteData], own: Courses, watch: Watch
) -> Trained:
    """Return the models of the bounds; one that cannot be trained is left out, with a warning."""
    job = experiment.job
    sites = {site: cohorts[site] for site in sorted(cohorts)}
    pooled = kind_of(job.task.data).pool(list(sites.values()), POOLED)
    noiseless = without_noise(own, job.seed) if job.plan.protects else None
    names = "bounds (each site alone, all pooled)"
    models = len(own.local) + (own.pooled is not None)
    step = watch.begin(names, models * (1 if noiseless is None else 2))

    def train(courses: Courses) -> Bounds:
        bounds = train_bounds(
            job.task,
            sites,
            pooled,
            courses,
            job.strategy,
            job.seed,
            device=experiment.device,
            on_model=step.advance,
        )
        for name, error in bounds.failed.items():
            watch.warn(f"The bound of {name} is left out ({error.reason}): {error}")
        return bounds

    # Under DP-SGD the plan says how large a step's sample is, and a task's batch_size is not used.
    batch_size = getattr(job.task, "batch_size", None)
    protected = train(own)
    unprotected = None if noiseless is None else train(noiseless)
    free = None if noiseless is None or unprotected is None else _of_models(noiseless, unprotected)
    stated = state_bounds(_of_models(own, protected), free, batch_size)
    return Trained(protected, unprotected, stated)


def _of_models(courses: Courses, bounds: Bounds) -> Courses:
    """Return the courses of the models that there are."""
    local = {site: course for site, course in courses.local.items() if site in bounds.local}
    return replace(courses, local=local, pooled=None if bounds.pooled is None else courses.pooled)
