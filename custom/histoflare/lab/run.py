"""A whole experiment on one workstation: a job over prepared sites, its bounds, comparison and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.flare.result import evaluation_noise_of
from histoflare.flare.workstation import Workstation
from histoflare.lab.bounds import plan_bounds_of, rounds_run, train_bounds_of
from histoflare.lab.budgets import EPSILONS, Tried, try_budgets
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.federation import Federated, federate, with_refused
from histoflare.lab.left_out import find_never_took_part, find_unreadable, no_site, said_of, without
from histoflare.lab.loading import Loaded, load_experiment
from histoflare.lab.sites import EXTERNAL
from histoflare.lab.watch import OnProgress, OnWarning, Watch
from histoflare.model_file import MODEL_FILE, save_model
from histoflare.privacy.protocol import hash_protocol
from histoflare.reasons import explain
from histoflare.report.consortium import RunFacts, build_report
from histoflare.report.page import write_page
from histoflare.rounds.comparison import Comparison, compare
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.state import State, hash_state
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import check_device
from histoflare.site.kinds import kind_of
from histoflare.storage import write_json

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        report: The consortium's report.
        cohorts: Site or external cohort → its data.
        federated: What came out of the job.
        refused: Site or external cohort that has no part in the figures → why.
        local: Site → the model of its own data alone, trained as the job's.
        noiseless: What a protected job hands out without noise; None unless it was tried at other budgets.
    """

    report: dict[str, Any]
    cohorts: Mapping[str, Any]
    federated: Federated
    refused: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, State] = field(default_factory=dict)
    noiseless: State | None = None


def run_experiment(
    job: Job,
    sites: Mapping[str, SiteConfiguration],
    out: Path,
    *,
    external: Mapping[str, SiteConfiguration] | None = None,
    runtime: str = Runtime.INPROCESS,
    device: str = "cpu",
    epsilons: Sequence[float] = (),
    on_progress: OnProgress | None = None,
    on_warning: OnWarning | None = None,
) -> Outcome:
    """Run a job and its bounds, compare the models, and write the report, its page and the model to ``out``.

    A site whose data do not fit is left out, with its reason, and ends nobody else's run; nor does one that
    fails after some rounds, or whose data cannot be read when they are over.

    Args:
        job: What to run, see :func:`histoflare.choose_job`.
        sites: Training site → where its manifest and bags, or its images, are.
        out: The folder for what is made; what an earlier run left there is written over.
        external: External cohort → where its data are. They are asked as one and never train.
        runtime: ``"inprocess"``, ``"simulator"`` or ``"poc"`` (real FLARE processes).
        device: Where models run in this process: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
        epsilons: A job with a privacy plan is run in this process at each of these budgets too, and without
            protection; empty: it is not.
        on_progress: Is told of each :class:`histoflare.lab.watch.Step`: what is done, how much, of how much.
        on_warning: Is told what is odd or left out; None: it is one of Python's warnings.

    Raises:
        HistoflareError: There is no such runtime or device, the data of no site fit the job or no site took
            part (every fault at once), two sites share a slide or, in a protected job, a patient, or the job
            failed.

    >>> from pathlib import Path
    >>> from histoflare import SiteConfiguration, choose_job, run_experiment
    >>> from histoflare.shipped import JOBS
    >>> job = choose_job(JOBS / "mem_fedavg", settings=["rounds=2", "task.model.memories=2"]).job
    >>> sites = {
    ...     name: SiteConfiguration({"manifest": Path(name, "manifest.csv"), "bags": Path(name, "bags")})
    ...     for name in ("clinic-a", "clinic-b")
    ... }
    >>> steps = []
    >>> outcome = run_experiment(job, sites, Path("out"), on_progress=steps.append)
    >>> sorted(outcome.report["sites"])
    ['clinic-a', 'clinic-b']
    >>> [(step.done, step.total) for step in steps if step.number == 1]
    [(0, 2), (1, 2), (2, 2)]
    """
    if runtime not in {*Runtime}:
        raise JobError(f"There is no runtime {runtime!r}; there are: {', '.join(Runtime)}.")
    where = check_device(device)
    experiment = Experiment(job, sites, external or {}, Runtime(runtime), where)
    return run_watched(experiment, Path(out), Watch(on_progress, on_warning), epsilons)


def run_watched(
    experiment: Experiment,
    out: Path,
    watch: Watch,
    epsilons: Sequence[float] = EPSILONS,
) -> Outcome:
    """Do what :func:`run_experiment` does, with a watch of the caller's, who may time other phases by it.

    Args and errors are those of :func:`run_experiment`.

    Args:
        watch: Is told how far it is. The seconds of its phases so far stand in the report too.
    """
    outcome = run_loaded(experiment, load_experiment(experiment, watch), out, watch, epsilons)
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
    watch: Watch,
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
    courses = plan_bounds_of(job, cohorts, watch)  # before the rounds: what it has to say must not cost them
    federated = federate(taking_part, cohorts, out, watch, running)
    lost = find_never_took_part(federated, cohorts, watch)
    with watch.phase("local and pooled bounds"):
        there = without(cohorts, lost)
        step = watch.begin(f"reading the sites' {job.task.data} again", len(there) + len(outside))
        lost |= find_unreadable(there, watch, step)
        unread = find_unreadable(outside, watch, step)
        if unread:
            outside, untested = without(outside, unread), untested | unread
            external = kind_of(job.task.data).pool(list(outside.values()), EXTERNAL) if outside else None
        if lost:
            cohorts = without(cohorts, lost)
            if not cohorts:
                raise no_site({site: said_of(site, error) for site, error in lost.items()})
            courses = plan_bounds_of(job, cohorts, watch)
        federated = with_refused(with_refused(federated, refused, asked=True), untested, asked=False)
        bounds = train_bounds_of(experiment, cohorts, courses.until(rounds_run(job, federated)), watch)
    with watch.shown_phase("evaluation"):
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
    tried = Tried([])
    if epsilons and job.plan.protects:
        with watch.phase("other budgets"):
            tried = try_budgets(experiment, cohorts, comparison, epsilons, watch)
    report = _build_report(experiment, federated, comparison, bounds.stated, tried.entries, watch)
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
        protocol_sha256=hash_protocol(job.protocol),
        training=training,
    )
    why = {site: f"{error.reason}: {explain(error.reason)}" for site, error in (refused | untested).items()}
    why |= {site: f"{error.reason}: {error}" for site, error in lost.items()}
    return Outcome(report, {**cohorts, **outside}, federated, why, bounds.protected.local, tried.noiseless)


def _build_report(
    experiment: Experiment,
    federated: Federated,
    comparison: Comparison,
    bounds: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    watch: Watch,
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
        numbers=job.plan.numbers(job.reserved_rounds, count_sent_by_job(job.strategy, job.task)),
        spare_rounds=job.spare_rounds,
        accuracy_against_epsilon=entries,
        seconds=watch.seconds,
        model_sha256=hash_state(federated.state),
        protocol={"sha256": hash_protocol(job.protocol), **job.protocol},
        evaluated_at_sites=federated.evaluated,
        data=job.task.data,
        evaluation_refused=federated.evaluation_refused,
        evaluation_noise=None
        if federated.evaluated is None
        else evaluation_noise_of(job, federated.evaluation_total, federated.evaluation_round),
        pseudonyms=federated.pseudonyms,
        bytes_up=federated.bytes_up,
        bytes_down=federated.bytes_down,
        bounds=bounds,
    )
    return build_report(facts, comparison)
