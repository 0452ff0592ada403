"""A protected job at other budgets and without noise: what its protection costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from histoflare.errors import HistoflareError
from histoflare.flare.job import Job
from histoflare.lab.experiment import Experiment
from histoflare.lab.watch import Watch
from histoflare.privacy.plan import PrivacyPlan
from histoflare.report.budgets import budget_entry
from histoflare.rounds.comparison import Comparison, compare
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.site.kinds.kind import SiteData

EPSILONS = (1.0, 3.0, 8.0)
"""Budgets a job with a privacy plan is tried at besides its own, and beside no protection."""


@dataclass(frozen=True)
class Tried:
    """What other budgets gave.

    Attributes:
        entries: The job's figures at each budget, see ``report.budgets.budget_entry``.
        noiseless: The model that the job hands out without noise, all other settings its own; None: there is
            none.
    """

    entries: list[dict[str, Any]]
    noiseless: State | None = None


def try_budgets(
    experiment: Experiment,
    cohorts: Mapping[str, SiteData],
    own: Comparison,
    epsilons: Sequence[float],
    watch: Watch,
) -> Tried:
    """Return the job's accuracy at its own ε, at others, and without noise."""
    job, device = experiment.job, experiment.device
    entries = [budget_entry(job.plan, job.rounds, own, own, is_own=True, data=job.task.data)]
    noiseless, without_noise = job.plan.without_noise(job.seed), None
    others = [*_other_plans(job, epsilons, watch), noiseless]
    step = watch.begin("other budgets", len(others) * job.rounds)
    for plan in others:
        try:
            run = run_in_process(
                job.task,
                {site: cohorts[site] for site in sorted(cohorts)},
                job.strategy,
                job.rounds,
                job.seed,
                plan,
                transport=job.transport,
                on_round=lambda *_: step.advance(),
                device=device,
                least=min(job.least_sites, len(cohorts)),
            )
        except HistoflareError as error:
            watch.warn(f"Another budget is left out: {error}")
            continue
        found = compare(
            job.task,
            job.strategy,
            run.handed_out,
            cohorts,
            site_states=run.site_states,
            seed=job.seed,
            device=device,
        )
        entries.append(budget_entry(plan, job.rounds, found, own, data=job.task.data))
        if plan is noiseless:
            without_noise = run.handed_out
    return Tried(entries, without_noise)


def _other_plans(job: Job, epsilons: Sequence[float], watch: Watch) -> list[PrivacyPlan]:
    """Return the job's plan at other budgets, settled; an ε out of reach is left out."""
    plans: list[PrivacyPlan] = []
    for epsilon in epsilons:
        try:
            whole = {"budget_epsilon": epsilon, "budget_share": 1.0, "noise_multiplier": None}
            asked: Any = replace(job.asked, **whole)  # type: ignore[type-var]
            plan = asked.settled(job.rounds, count_sent_by_job(job.strategy, job.task))
        except HistoflareError as error:
            watch.warn(f"ε = {epsilon:g} is left out: {error}")
            continue
        if plan != job.plan:
            plans.append(plan)
    return plans
