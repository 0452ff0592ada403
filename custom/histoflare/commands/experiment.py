"""A whole experiment on one workstation: a job over prepared sites, its bounds, comparison and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from histoflare.commands.clock import PhaseClock
from histoflare.commands.console import console
from histoflare.commands.runtimes import Experiment, Federated, federate, shown_phase, with_refused
from histoflare.commands.sites import EXTERNAL
from histoflare.ensemble import split_models
from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job import Job
from histoflare.flare.workstation import Workstation
from histoflare.model_file import MODEL_FILE, save_model
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.protocol import digest as protocol_digest
from histoflare.reasons import explain
from histoflare.report.bounds import state_bounds
from histoflare.report.budgets import budget_entry
from histoflare.report.consortium import RunFacts, build_report
from histoflare.report.page import write_page
from histoflare.report.site_page import write_site_page
from histoflare.rounds.bounds import POOLED, Bounds, Courses, plan_bounds, train_bounds, without_noise
from histoflare.rounds.comparison import Comparison, compare
from histoflare.rounds.local import load_model, predict
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, digest, n_bytes
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import device_of, load_site_data
from histoflare.site.kinds import kind_of
from histoflare.site.kinds.kind import PageParts, SiteData
from histoflare.site.overlap import check_apart
from histoflare.storage import write_json

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

EPSILONS = (1.0, 3.0, 8.0)
"""Budgets a job with a privacy plan is tried at besides its own, and beside no protection."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        report: The consortium's report.
        cohorts: Site or external cohort → its data.
        federated: What came out of the job.
        refused: Site or external cohort that has no part in the figures → why.
        local: Site → the model of its own data alone, trained as the job's.
    """

    report: dict[str, Any]
    cohorts: Mapping[str, Any]
    federated: Federated
    refused: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """The data of an experiment.

    Attributes:
        taking_part: The experiment with the sites and external cohorts whose data fit.
        cohorts, outside: Their data.
        refused, untested: Why those of the others do not fit.
    """

    taking_part: Experiment
    cohorts: dict[str, Any]
    outside: dict[str, Any]
    refused: dict[str, HistoflareError]
    untested: dict[str, HistoflareError]


def load_experiment(experiment: Experiment, clock: PhaseClock) -> Loaded:
    """Return the data of an experiment's sites; one whose data do not fit is left out, with its reason.

    Raises:
        HistoflareError: The data of no site fit the job, or two sites share a slide or, in a protected job, a
            patient.
    """
    job = experiment.job
    with clock.phase(f"load {job.task.data}"):
        cohorts, refused = _load(experiment.sites, job, trains=True)
        outside, untested = _load(experiment.external, job, trains=False)
        if not cohorts:
            raise _no_site(refused)
        taking_part = replace(
            experiment,
            sites={site: experiment.sites[site] for site in cohorts},
            external={name: experiment.external[name] for name in outside},
        )
        kind_of(job.task.data).check_resolutions(job.task, taking_part.sites)
        everyone = {**taking_part.sites, **taking_part.external}
        for warning in check_apart(everyone, job.task.data, protected=job.plan.protects):
            _warn(warning)
        for site, cohort in cohorts.items():
            for warning in cohort.warnings:
                _warn(f"{site}: {warning}")
        for site, error in {**refused, **untested}.items():
            _warn(f"{site} is left out ({error.reason}): {error}")
    return Loaded(taking_part, cohorts, outside, refused, untested)


def run_experiment(
    experiment: Experiment,
    out: Path,
    bars: Progress,
    clock: PhaseClock,
    epsilons: Sequence[float] = EPSILONS,
) -> Outcome:
    """Run the job and its bounds, and write the report, its page and the model to ``out``.

    A site whose data do not fit is left out, with its reason, and ends nobody else's run; nor does one that
    fails after some rounds, or whose data cannot be read when they are over.

    Args:
        epsilons: A job with a privacy plan is run in this process at each of these budgets too, and without
            protection; empty: it is not.

    Raises:
        HistoflareError: The data of no site fit the job or no site took part (every fault at once), two sites
            share a slide or, in a protected job, a patient, or the job failed.
    """
    outcome = run_loaded(experiment, load_experiment(experiment, clock), out, bars, clock, epsilons)
    write_report(outcome.report, out)
    return outcome


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write the report and its page to ``out``."""
    write_json(out / REPORT_FILE, report, public=True)
    write_page(report, out / PAGE_FILE)


def run_loaded(
    experiment: Experiment,
    loaded: Loaded,
    out: Path,
    bars: Progress,
    clock: PhaseClock,
    epsilons: Sequence[float],
    running: Workstation | None = None,
) -> Outcome:
    """Run the job and its bounds on data that are loaded, and write the model to ``out``, but no report.

    Args and errors are those of :func:`run_experiment`.

    Args:
        running: A federation that is up for this job; None starts what the runtime needs.
    """
    job, taking_part = experiment.job, replace(loaded.taking_part, job=experiment.job)
    cohorts, outside = loaded.cohorts, loaded.outside
    refused, untested = loaded.refused, loaded.untested
    external = kind_of(job.task.data).pool(list(outside.values()), EXTERNAL) if outside else None
    courses = _plan_bounds(job, cohorts)  # before the rounds: what it has to say must not cost them
    federated = federate(taking_part, cohorts, out, bars, clock, running)
    lost = _never_took_part(federated, cohorts)
    with clock.phase("local and pooled bounds"):
        there = _without(cohorts, lost)
        bar = bars.add_task(f"reading the sites' {job.task.data} again", total=len(there) + len(outside))
        lost |= _unreadable(experiment, federated, there, lambda: bars.advance(bar))
        unread = _unreadable(experiment, federated, outside, lambda: bars.advance(bar))
        if unread:
            outside, untested = _without(outside, unread), untested | unread
            external = kind_of(job.task.data).pool(list(outside.values()), EXTERNAL) if outside else None
        if lost:
            cohorts = _without(cohorts, lost)
            if not cohorts:
                raise _no_site({site: _said_of(site, error) for site, error in lost.items()})
            courses = _plan_bounds(job, cohorts)
        federated = with_refused(with_refused(federated, refused, asked=True), untested, asked=False)
        bounds = _train_bounds(experiment, cohorts, courses.until(_rounds_run(job, federated)), bars)
    with shown_phase("evaluation", bars, clock):
        comparison = compare(
            job.task,
            job.strategy,
            federated.state,
            cohorts,
            site_states=federated.site_states,
            local=bounds.protected.local,
            pooled=bounds.protected.pooled,
            unprotected=bounds.unprotected,
            external=external,
            seed=job.seed,
            device=experiment.device,
        )
    entries: list[dict[str, Any]] = []
    if epsilons and job.plan.protects:
        with clock.phase("other budgets"):
            entries = _try_budgets(experiment, cohorts, comparison, epsilons, bars)
    report = _build_report(experiment, federated, comparison, bounds.stated, entries, clock)
    training = {
        "job": job.name,
        "strategy": report["strategy"],
        "rounds": job.rounds,
        "seed": job.seed,
        "sites": sorted(report["sites"]),
    }
    save_model(
        out / MODEL_FILE,
        job.strategy.personalize(federated.state, {}),
        job.task,
        mosaic=kind_of(job.task.data).mosaic(list(cohorts.values())),
        protocol_sha256=protocol_digest(job.protocol),
        training=training,
    )
    why = {site: f"{error.reason}: {explain(error.reason)}" for site, error in (refused | untested).items()}
    why |= {site: f"{error.reason}: {error}" for site, error in lost.items()}
    return Outcome(report, {**cohorts, **outside}, federated, why, bounds.protected.local)


def _load(
    sites: Mapping[str, SiteConfiguration], job: Job, *, trains: bool
) -> tuple[dict[str, Any], dict[str, HistoflareError]]:
    """Return the data of the sites that fit a job, and why those of the others do not."""
    found: dict[str, Any] = {}
    refused: dict[str, HistoflareError] = {}
    for site, at in sites.items():
        try:
            data = load_site_data(site, job.task, at, job.split)
            if trains and not data.train:
                raise JobError(
                    f"{site}: no row of its manifest is for training (split). A cohort called '{EXTERNAL}' "
                    "is asked at the end and never trains.",
                    reason="SITE_HAS_NO_TRAINING_DATA",
                )
            found[site] = data
        except HistoflareError as error:
            refused[site] = error
    return found, refused


def _no_site(refused: Mapping[str, HistoflareError]) -> HistoflareError:
    """Return the error of a run in which no site can take part."""
    errors = list(refused.values())
    if len(errors) == 1:
        return errors[0]
    listed = "\n".join(str(error) for error in errors)
    return JobError(f"No site can take part:\n{listed}", reason=errors[0].reason)


def _without(cohorts: Mapping[str, Any], lost: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the sites that were not lost."""
    return {site: cohort for site, cohort in cohorts.items() if site not in lost}


def _said_of(site: str, error: HistoflareError) -> HistoflareError:
    return JobError(f"{site}: {error}", reason=error.reason)


def _unreadable(
    experiment: Experiment, federated: Federated, cohorts: Mapping[str, Any], on_site: Callable[[], object]
) -> dict[str, HistoflareError]:
    """Return the sites whose data cannot be read any more, with the reason: the model is asked about all.

    Args:
        on_site: Told after each site.
    """
    job = experiment.job
    state = job.strategy.personalize(federated.state, {})
    unread: dict[str, HistoflareError] = {}
    for site, cohort in cohorts.items():
        try:
            again = kind_of(job.task.data).pool([cohort], site)  # from disk: the pool has nothing in memory
            predict(job.task, state, again, "all", experiment.device)
        except (HistoflareError, OSError) as error:
            unread[site] = error if isinstance(error, HistoflareError) else JobError(str(error))
            _warn(f"{site} is left out of the figures ({unread[site].reason}): {error}")
        on_site()
    return unread


def _never_took_part(federated: Federated, cohorts: Mapping[str, Any]) -> dict[str, HistoflareError]:
    """Return the sites whose updates were refused and never used, with the last reason."""
    took = {site for row in federated.participation for site in row["taking_part"]}
    codes = {site: code for row in federated.participation for site, code in row["refused"].items()}
    never: dict[str, HistoflareError] = {}
    for site, code in codes.items():
        if site in cohorts and site not in took:
            never[site] = JobError(federated.failures.get(site) or explain(code), reason=code)
            _warn(f"{site} took part in no round ({code}: {never[site]})")
    return never


def _warn(text: str) -> None:
    console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def write_site_pages(
    experiment: Experiment, outcome: Outcome, out: Path, bars: Progress, clock: PhaseClock
) -> list[Path]:
    """Write each site's own page, with pictures, to ``site-<name>.html``; return the paths.

    A site whose data cannot be read any more gets none, and ends nothing.
    """
    job, federated = experiment.job, outcome.federated
    everyone = {
        site: at
        for site, at in {**experiment.sites, **experiment.external}.items()
        if site in outcome.cohorts
    }
    update_bytes = n_bytes(job.transport.pack(job.strategy.sent(split_models(federated.state)[0])))
    bar = bars.add_task("pages of the sites", total=len(everyone))
    paths = []
    with clock.phase("pages"):
        for site, configuration in everyone.items():
            own = job.strategy.personalize(federated.state, federated.site_states.get(site, {}))
            model = load_model(job.task, own, device_of(configuration))
            local = outcome.local.get(site)
            parts = PageParts(
                site,
                configuration,
                outcome.cohorts[site],
                job.task,
                model,
                outcome.report,
                alone=None if local is None else load_model(job.task, local, device_of(configuration)),
                alias=federated.pseudonyms.get(site, ""),
                update_bytes=update_bytes,
            )
            try:
                page = kind_of(job.task.data).build_page(parts)
            except HistoflareError as error:
                _warn(f"{site} gets no page ({error.reason}): {error}")
                continue
            finally:
                bars.advance(bar)
            paths.append(out / f"site-{site}.html")
            write_site_page(page, paths[-1])
    return paths


def _build_report(
    experiment: Experiment,
    federated: Federated,
    comparison: Comparison,
    bounds: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    clock: PhaseClock,
) -> dict[str, Any]:
    job = experiment.job
    facts = RunFacts(
        job=job.name,
        runtime=experiment.runtime.value,
        strategy={"name": job.strategy.name, **asdict(job.strategy), "transport": job.transport.name},
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
        bounds=bounds,
    )
    return build_report(facts, comparison)


@dataclass(frozen=True)
class _Trained:
    """The bounds' models, those without noise beside a protected run, and what the report says of both."""

    protected: Bounds
    unprotected: Bounds | None
    stated: dict[str, Any]


def _rounds_run(job: Job, federated: Federated) -> int:
    """Return how many rounds were run: patience may have ended the last of them."""
    rows = federated.participation
    return len(rows) if rows and rows[-1].get("stopped") else job.rounds


def _plan_bounds(job: Job, cohorts: Mapping[str, SiteData]) -> Courses:
    sites = {site: cohorts[site] for site in sorted(cohorts)}
    courses = plan_bounds(job.task, sites, job.strategy, job.rounds, job.seed, job.plan, job.asked)
    if courses.no_pool is not None:
        _warn(f"There will be no model of all data in one place: {courses.no_pool}")
    return courses


def _train_bounds(
    experiment: Experiment, cohorts: Mapping[str, SiteData], own: Courses, bars: Progress
) -> _Trained:
    job = experiment.job
    sites = {site: cohorts[site] for site in sorted(cohorts)}
    pooled = kind_of(job.task.data).pool(list(sites.values()), POOLED)
    noiseless = without_noise(own, job.seed) if job.plan.protects else None
    names = "bounds (each site alone, all pooled)"
    models = len(own.local) + (own.pooled is not None)
    bar = bars.add_task(names, total=models * (1 if noiseless is None else 2))

    def train(courses: Courses) -> Bounds:
        bounds = train_bounds(
            job.task,
            sites,
            pooled,
            courses,
            job.strategy,
            job.seed,
            device=experiment.device,
            on_model=lambda: bars.advance(bar),
        )
        for name, error in bounds.failed.items():
            _warn(f"The bound of {name} is left out ({error.reason}): {error}")
        return bounds

    # Under DP-SGD the plan says how large a step's sample is, and a task's batch_size is not used.
    batch_size = getattr(job.task, "batch_size", None)
    protected = train(own)
    unprotected = None if noiseless is None else train(noiseless)
    free = None if noiseless is None or unprotected is None else _of_models(noiseless, unprotected)
    stated = state_bounds(_of_models(own, protected), free, batch_size)
    return _Trained(protected, unprotected, stated)


def _of_models(courses: Courses, bounds: Bounds) -> Courses:
    """Return the courses of the models that there are."""
    local = {site: course for site, course in courses.local.items() if site in bounds.local}
    return replace(courses, local=local, pooled=None if bounds.pooled is None else courses.pooled)


def _try_budgets(
    experiment: Experiment,
    cohorts: Mapping[str, SiteData],
    own: Comparison,
    epsilons: Sequence[float],
    bars: Progress,
) -> list[dict[str, Any]]:
    """Return the job's accuracy at its own ε, at others, and without noise, see ``budget_entry``."""
    job, device = experiment.job, experiment.device
    entries = [budget_entry(job.plan, job.rounds, own, own, is_own=True, data=job.task.data)]
    others = _other_plans(job, epsilons)
    bar = bars.add_task("other budgets", total=len(others) * job.rounds)
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
                on_round=lambda *_: bars.advance(bar),
                device=device,
                least=min(job.least_sites, len(cohorts)),
            )
        except HistoflareError as error:
            _warn(f"Another budget is left out: {error}")
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
    return entries


def _other_plans(job: Job, epsilons: Sequence[float]) -> list[PrivacyPlan]:
    """Return the job's plan at other budgets, settled, and without noise; an ε out of reach is left out."""
    plans: list[PrivacyPlan] = []
    for epsilon in epsilons:
        try:
            whole = {"budget_epsilon": epsilon, "budget_share": 1.0, "noise_multiplier": None}
            asked: Any = replace(job.asked, **whole)  # type: ignore[type-var]
            plan = asked.settled(job.rounds, count_sent_by_job(job.strategy, job.task))
        except HistoflareError as error:
            _warn(f"ε = {epsilon:g} is left out: {error}")
            continue
        if plan != job.plan:
            plans.append(plan)
    return [*plans, job.plan.without_noise(job.seed)]
