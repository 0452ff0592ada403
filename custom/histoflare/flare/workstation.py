"""A job from its submission to its result, through real FLARE server and client processes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.flare import processes
from histoflare.flare.job import Job, write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import FederationResult, count_finished, read_result
from histoflare.rounds.state import State
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.records import RunRecords

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a named part of the work."""

Rows = Sequence[Mapping[str, Any]]

CAUSES = 3


@dataclass(frozen=True)
class WorkstationRun:
    """What came out of a job, and of the evaluation after it.

    Attributes:
        training: Of the job. evaluation: What each site said of the last model; None if it was not asked.
        site_states: Site → what the strategy keeps there.
    """

    training: FederationResult
    evaluation: FederationResult | None
    site_states: dict[str, State]


def run_on_workstation(
    job: Job,
    sites: Mapping[str, SiteConfiguration],
    external: Mapping[str, SiteConfiguration],
    workspace: Path,
    evaluation: Path | None,
    phase: Phase,
    on_rounds: Callable[[int], None] | None = None,
) -> WorkstationRun:
    """Provision a federation, start it, run a job in it, ask its sites about the model, and end it.

    Nothing of it is left running, however this ends.

    Args:
        job: The job; the sites agree to its protocol.
        sites: Sites that train. external: Sites that only evaluate (``evaluation_only``).
        workspace: Folder for kits, logs, and under ``results`` what the jobs left.
        evaluation: Job folder with which sites and external ones are asked about the last model.
        phase: Times the parts.
        on_rounds: Called with the number of finished rounds whenever it grows.

    Raises:
        JobError: A job did not finish (JOB_FAILED); the message says who refused and why.
        HistoflareError: The federation could not be started, or its server ended.
    """
    with phase("provision"):
        federation = Federation.prepare(workspace, {**sites, **external}, Agreement(job.folder))
    with federation:
        with phase("start"):
            federation.start()
        with phase("federated rounds"):
            run, training = _run_job(federation, job.folder, sorted(sites), job.rounds, on_rounds)
        asked = None
        if evaluation is not None:
            with phase("evaluation at the sites"):
                everyone = sorted({**sites, **external})
                variant = write_evaluation(evaluation, job, run, federation.workspace, everyone)
                _, asked = _run_job(federation, variant, everyone, 1, None)
        with phase("stop"):
            federation.stop()
    states = {
        site: RunRecords(configuration.records, run, site).load_state()
        for site, configuration in sites.items()
    }
    return WorkstationRun(training, asked, states)


def write_evaluation(evaluation: Path, job: Job, run: str, workspace: Path, sites: Sequence[str]) -> Path:
    """Write the job that asks ``sites`` about the last model of ``run``, under the protocol of ``job``."""
    changes: dict[str, Any] = {"protocol": job.protocol, "run": run, "seed": job.seed}
    changes |= {f"task.{name}": value for name, value in job.task.to_json().items()}
    model = _result_folder(workspace, run) / "workspace" / "global_model.safetensors"
    target = workspace / "jobs" / run / evaluation.name
    return write_variant(evaluation, target, changes, sites=sites, start_model=model)


def _run_job(
    federation: Federation,
    folder: Path,
    sites: Sequence[str],
    rounds: int,
    on_rounds: Callable[[int], None] | None,
) -> tuple[str, FederationResult]:
    """Return the job's id and its result."""
    target = federation.workspace / "jobs" / "submitted" / folder.name
    processes.remove_folder(target)
    job_id = federation.admin.submit(write_variant(folder, target, {}, sites=sites))

    def tell(rows: Rows) -> None:
        if on_rounds is not None:
            on_rounds(count_finished(rows))

    status = federation.follow(job_id, tell)
    federation.admin.download(job_id, federation.workspace / "results")
    result = read_result(_result_folder(federation.workspace, job_id) / "workspace")
    if result.finished_rounds < rounds or result.state is None:
        raise JobError(_describe(federation, job_id, status, result, rounds), reason="JOB_FAILED")
    return job_id, result


def _result_folder(workspace: Path, job_id: str) -> Path:
    return workspace / "results" / job_id


def _describe(
    federation: Federation, job_id: str, status: str, result: FederationResult, rounds: int
) -> str:
    """Return what to tell of a job that did not finish."""
    from histoflare.report.reasons import explain

    text = f"The job stopped after {result.finished_rounds} of {rounds} rounds ({status})."
    for site, code in result.refused.items():
        text += f"\n  {site}: {code}: {explain(code)}"
    log = _result_folder(federation.workspace, job_id) / "workspace" / "log.txt"
    return f"{text}\nThe last lines of the server's log:\n{processes.tail(log)}"
