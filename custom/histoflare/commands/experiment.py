"""A whole experiment on one workstation: a job over prepared sites, its bounds, comparison and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from histoflare.commands.clock import PhaseClock
from histoflare.commands.console import console
from histoflare.commands.runtimes import Experiment, Federated, federate
from histoflare.commands.sites import EXTERNAL
from histoflare.errors import HistoflareError
from histoflare.flare.job import Job
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.privacy.protocol import digest as protocol_digest
from histoflare.report.budgets import budget_entry
from histoflare.report.consortium import RunFacts, build_report
from histoflare.report.page import write_page
from histoflare.report.site_page import write_site_page
from histoflare.rounds.bounds import train_local_only, train_pooled
from histoflare.rounds.comparison import Comparison, compare
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, digest, n_bytes
from histoflare.rounds.strategy import count_sent_by_job
from histoflare.site.data import SiteData, device_of, load_site_data, pool_site_data
from histoflare.site.pictures import build_site_page
from histoflare.storage import write_json

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
MODEL_FILE = "model.safetensors"

EPSILONS = (1.0, 3.0, 8.0)
"""Budgets a job with a privacy plan is tried at besides its own, and beside no protection."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        report: The consortium's report.
        cohorts: Site or external cohort → its data.
        federated: What came out of the job.
    """

    report: dict[str, Any]
    cohorts: Mapping[str, Any]
    federated: Federated


def run_experiment(
    experiment: Experiment,
    out: Path,
    bars: Progress,
    clock: PhaseClock,
    epsilons: Sequence[float] = EPSILONS,
) -> Outcome:
    """Run the job and its bounds, and write the report, its page and the model to ``out``.

    Args:
        epsilons: A job with a privacy plan is run in this process at each of these budgets too, and without
            protection; empty: it is not.

    Raises:
        HistoflareError: A site's data do not fit the job (every fault at once), or the job failed.
    """
    job = experiment.job
    with clock.phase(f"load {job.task.data}"):
        cohorts = {
            site: load_site_data(site, job.task, at, job.split) for site, at in experiment.sites.items()
        }
        outside = {
            name: load_site_data(name, job.task, at, job.split) for name, at in experiment.external.items()
        }
        external = pool_site_data(job.task, list(outside.values()), EXTERNAL) if outside else None
        for site, cohort in cohorts.items():
            for warning in cohort.warnings:
                text = f"{site}: {warning}"
                console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    federated = federate(experiment, cohorts, out, bars, clock)
    if any(isinstance(row, Mapping) and row.get("stopped") for row in federated.participation[-1:]):
        # its patience was over: a bound takes the steps of what it bounds
        job = replace(job, rounds=len(federated.participation))
    with clock.phase("local and pooled bounds"):
        local, pooled = _train_bounds(job, cohorts, bars)
    with clock.phase("evaluation"):
        comparison = compare(
            job.task,
            job.strategy,
            federated.state,
            cohorts,
            site_states=federated.site_states,
            local=local,
            pooled=pooled,
            external=external,
            seed=job.seed,
        )
    entries: list[dict[str, Any]] = []
    if epsilons and not isinstance(job.plan, Open):
        with clock.phase("other budgets"):
            entries = _try_budgets(job, cohorts, comparison, epsilons, bars)
    report = _build_report(experiment, federated, comparison, entries, clock)
    training = {
        "job": job.name,
        "strategy": report["strategy"],
        "rounds": job.rounds,
        "seed": job.seed,
        "sites": sorted(report["sites"]),
    }
    _save_model(out / MODEL_FILE, job, federated.state, cohorts, training)
    write_json(out / REPORT_FILE, report, public=True)
    write_page(report, out / PAGE_FILE)
    return Outcome(report, {**cohorts, **outside}, federated)


def write_site_pages(
    experiment: Experiment, outcome: Outcome, out: Path, bars: Progress, clock: PhaseClock
) -> list[Path]:
    """Write each site's own page, with pictures, to ``site-<name>.html``; return the paths."""
    job, federated = experiment.job, outcome.federated
    everyone = {**experiment.sites, **experiment.external}
    sent = job.strategy.sent_names(federated.state)
    update_bytes = n_bytes({name: federated.state[name] for name in sent})
    bar = bars.add_task("pages of the sites", total=len(everyone))
    paths = []
    with clock.phase("pages"):
        for site, configuration in everyone.items():
            model = job.task.build_model()
            model.load_state_dict(
                job.strategy.personalize(federated.state, federated.site_states.get(site, {}))
            )
            model.eval()
            known: dict[str, Any] = {
                "alias": federated.pseudonyms.get(site, ""),
                "update_bytes": update_bytes,
            }
            data, report = outcome.cohorts[site], outcome.report
            if job.task.data == "images":
                from histoflare.site.image_pictures import build_image_site_page

                model.to(device_of(job.task, configuration))
                page = build_image_site_page(site, data, job.task, model, report, **known)
            else:
                page = build_site_page(site, configuration, data, job.task, model, report, **known)
            paths.append(out / f"site-{site}.html")
            write_site_page(page, paths[-1])
            bars.advance(bar)
    return paths


def _build_report(
    experiment: Experiment,
    federated: Federated,
    comparison: Comparison,
    entries: Sequence[Mapping[str, Any]],
    clock: PhaseClock,
) -> dict[str, Any]:
    job = experiment.job
    facts = RunFacts(
        job=job.name,
        runtime=experiment.runtime.value,
        strategy={"name": job.strategy.name, **asdict(job.strategy)},
        task=job.task.to_json(),
        seed=job.seed,
        rounds=job.rounds,
        participation=federated.participation,
        privacy=job.plan.describe(),
        mechanism=job.plan.mechanism,
        plan=job.plan.to_json(),
        spend=job.plan.spend().to_json(),
        numbers=job.plan.numbers(job.rounds, count_sent_by_job(job.strategy, job.task)),
        accuracy_against_epsilon=entries,
        seconds=clock.seconds,
        model_sha256=digest(federated.state),
        protocol={"sha256": protocol_digest(job.protocol), **job.protocol},
        evaluated_at_sites=federated.evaluated,
        data=job.task.data,
        evaluation_refused=federated.evaluation_refused,
        pseudonyms=federated.pseudonyms,
        bytes_up=federated.bytes_up,
        bytes_down=federated.bytes_down,
    )
    return build_report(facts, comparison)


def _train_bounds(
    job: Job, cohorts: Mapping[str, SiteData], bars: Progress
) -> tuple[dict[str, State], State]:
    bar = bars.add_task("bounds (each site alone, all pooled)", total=len(cohorts) + 1)
    local: dict[str, State] = {}
    for site, cohort in cohorts.items():
        local |= train_local_only(job.task, {site: cohort}, job.rounds, job.seed)
        bars.advance(bar)
    pooled = train_pooled(job.task, pool_site_data(job.task, list(cohorts.values())), job.rounds, job.seed)
    bars.advance(bar)
    return local, pooled


def _try_budgets(
    job: Job, cohorts: Mapping[str, SiteData], own: Comparison, epsilons: Sequence[float], bars: Progress
) -> list[dict[str, Any]]:
    """Return the job's accuracy at its own ε, at others, and without protection, see ``budget_entry``."""
    entries = [budget_entry(job.plan, job.rounds, own, own, is_own=True, data=job.task.data)]
    others = _other_plans(job, epsilons)
    bar = bars.add_task("other budgets", total=len(others) * job.rounds)
    for plan in others:
        run = run_in_process(
            job.task,
            {site: cohorts[site] for site in sorted(cohorts)},
            job.strategy,
            job.rounds,
            job.seed,
            plan,
            on_round=lambda *_: bars.advance(bar),
        )
        found = compare(
            job.task, job.strategy, run.state, cohorts, site_states=run.site_states, seed=job.seed
        )
        entries.append(budget_entry(plan, job.rounds, found, own, data=job.task.data))
    return entries


def _other_plans(job: Job, epsilons: Sequence[float]) -> list[PrivacyPlan]:
    """Return the job's plan at other budgets, settled, and none at all; what no noise reaches is left out."""
    plans: list[PrivacyPlan] = []
    for epsilon in epsilons:
        try:
            asked: Any = replace(job.asked, target_epsilon=epsilon, noise_multiplier=None)  # type: ignore[type-var]
            plan = asked.settled(job.rounds, count_sent_by_job(job.strategy, job.task))
        except HistoflareError as error:
            text = f"ε = {epsilon:g} is left out: {error}"
            console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
            continue
        if plan != job.plan:
            plans.append(plan)
    return [*plans, Open()]


def _save_model(
    path: Path, job: Job, state: State, cohorts: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """Write the model file of a run."""
    whole = job.strategy.personalize(state, {})
    if job.task.data == "images":
        from histoflare.masks.model_file import save_mask_model

        save_mask_model(path, whole, job.task, training=training)
    else:
        from histoflare.bags.model_file import save_model

        save_model(path, whole, job.task, mosaic=_mosaic(cohorts), training=training)


def _mosaic(cohorts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the mosaic parameters of the first bag: a model is used on slides cut as its own were."""
    from histoflare.bags.bag import read_header

    record = next(iter(cohorts.values())).records[0]
    mosaic = read_header(record.path).mosaic
    return None if mosaic is None else dict(mosaic)
