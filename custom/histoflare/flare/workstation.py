"""A job from its submission to its result, through real FLARE server and client processes on this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.flare import processes
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import Federation
from histoflare.flare.result import (
    FederationResult,
    FederationRun,
    count_finished,
    load_site_states,
    read_mean_loss,
    read_result,
)
from histoflare.flare.site_policy import policy_file
from histoflare.privacy.policy import POLICIES
from histoflare.privacy.protocol import hash_protocol
from histoflare.report.outcomes import say_sites
from histoflare.site.configuration import SiteConfiguration
from histoflare.storage import write_text

RESULTS_FOLDER = "results"
MINIMUM_PATIENTS = 1
"""Of a policy on one workstation, whose user sees every patient anyway. A hospital's own asks for more."""

JOB_SHARE = 1.0
"""Of such a policy: what is tried out in a throw-away workspace may be tried at the whole budget."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a named part of the work."""

OnRounds = Callable[[int, float | None], None]
"""Called with the number of finished rounds and the sites' mean training loss, as far as it is known."""


class Workstation:
    """A running federation on this machine; its jobs run one after the other. Made by :func:`federation_up`.

    Args:
        federation: Started. sites: Sites that train. external: Sites that only evaluate.
        phase: Times the parts.
    """

    def __init__(
        self,
        federation: Federation,
        sites: Mapping[str, SiteConfiguration],
        external: Mapping[str, SiteConfiguration],
        phase: Phase,
    ) -> None:
        self._federation = federation
        self._sites, self._external, self._phase = sites, external, phase

    def run(self, job: Job, on_rounds: OnRounds | None = None) -> FederationRun:
        """Run a job; its sites are asked about the model after its last round, also the external ones.

        Args:
            job: One of those that the federation was started for.

        Raises:
            JobError: The job did not finish (JOB_FAILED); the message says who refused and why.
            HistoflareError: The federation's server ended.
        """
        federation, sites = self._federation, self._sites
        with self._phase("federated rounds"), _scratch() as scratch:
            changes = for_fewer_sites(job, len(sites)) | evaluated_by(self._external)
            everyone = sorted({**sites, **self._external})
            variant = write_variant(job.folder, scratch / job.name, changes, sites=everyone)

            def tell(job_id: str, finished: int) -> None:
                if on_rounds is not None:
                    on_rounds(finished, read_mean_loss(sites, job_id))

            run, training = _run_job(federation, variant, job.rounds, tell)
        return FederationRun(training, load_site_states(sites, run))


@contextmanager
def federation_up(
    jobs: Sequence[Job],
    sites: Mapping[str, SiteConfiguration],
    external: Mapping[str, SiteConfiguration],
    workspace: Path,
    phase: Phase,
) -> Iterator[Workstation]:
    """Provision a federation and start it; end it when the block is left.

    Nothing of it is left running, however this ends.

    Args:
        jobs: Those that will run in it; the sites agree to their protocols and have policies of their scopes.
        sites: Sites that train. external: Sites that only evaluate (``evaluation_only``).
        workspace: Folder for kits, logs, and under ``results`` what the jobs left.
        phase: Times the parts.

    Raises:
        HistoflareError: The federation could not be started.
    """
    with phase("provision"):
        federation = Federation.prepare(
            workspace, {**sites, **external}, agreement_of(jobs, workspace / "policies")
        )
    with federation:
        with phase("start"):
            federation.start()
        yield Workstation(federation, sites, external, phase)
        with phase("stop"):
            federation.stop()


def for_fewer_sites(job: Job, sites: int) -> dict[str, Any]:
    """Return the change with which a job runs although fewer sites are there than it says must answer."""
    return {"least_sites": sites} if sites < job.least_sites else {}


def evaluated_by(external: Iterable[str]) -> dict[str, Any]:
    """Return the change with which a job's sites and external ones are asked about its model at the end."""
    return {"evaluate": True, "evaluation_only": sorted(external) or None}


def agreement_of(jobs: Sequence[Job], folder: Path) -> Agreement:
    """Return what sites on one workstation agree to; their policies are written into ``folder``.

    Raises:
        JobError: This package has no policy of a job's scope (SCOPE_UNKNOWN).
    """
    policies = {policy_file(job.scope): job.scope for job in jobs}
    for name, scope in policies.items():
        write_policy(scope, folder / name)
    protocols = {hash_protocol(job.protocol): job.folder for job in jobs}
    first, *more = protocols.values()
    return Agreement(
        first,
        policies=tuple(folder / name for name in sorted(policies)),
        default_scope=jobs[0].scope,
        more=tuple(more),
    )


def write_policy(scope: str, path: Path) -> None:
    """Write this package's policy of a scope, for sites that all belong to one user.

    It lets figures of few patients out, for they leave nobody's house, and one job take a whole budget.

    Raises:
        JobError: There is no such policy (SCOPE_UNKNOWN).
    """
    source = POLICIES / f"{scope}.toml"
    if not source.is_file():
        raise JobError(f"This package has no policy for the scope '{scope}'.", reason="SCOPE_UNKNOWN")
    text = source.read_text()
    for name, own in (("minimum_patients", MINIMUM_PATIENTS), ("job_share", JOB_SHARE)):
        text = re.sub(rf"^{name} = [\d.]+$", f"{name} = {own}", text, flags=re.MULTILINE)
    write_text(path, text)


def _run_job(
    federation: Federation,
    folder: Path,
    rounds: int,
    on_rounds: Callable[[str, int], None] = lambda *_: None,
) -> tuple[str, FederationResult]:
    """Return the job's id and its result.

    Args:
        on_rounds: Called with the job's id and the number of finished rounds.
    """
    longest_seconds = read_job(folder).longest_seconds
    job_id = federation.admin.submit(folder)

    def tell(rows: Sequence[Mapping[str, Any]]) -> None:
        on_rounds(job_id, count_finished(rows))

    status = federation.follow(job_id, tell, longest_seconds)
    federation.admin.download(job_id, federation.workspace / RESULTS_FOLDER)
    result = read_result(_result_folder(federation, job_id))
    if (result.finished_rounds < rounds and not result.stopped) or result.state is None:
        raise JobError(_describe(federation, job_id, status, result, rounds), reason="JOB_FAILED")
    return job_id, result


def _result_folder(federation: Federation, job_id: str) -> Path:
    """Return what was the server's run folder, in the download."""
    return federation.workspace / RESULTS_FOLDER / job_id / "workspace"


def _describe(federation: Federation, job_id: str, status: str, result: FederationResult, rounds: int) -> str:
    """Return what to tell of a job that did not finish."""
    text = f"The job stopped after {result.finished_rounds} of {rounds} rounds ({status})."
    if result.given_up:
        text += f"\n  It was given up in round {result.rounds[-1]['round'] + 1}: {result.given_up}."
    for line in say_sites(result.outcomes(federation.admin.deployment(job_id)), rounds):
        text += f"\n  {line}"
    log = _result_folder(federation, job_id) / "log.txt"
    if not log.is_file():  # it never began
        log = federation.log(federation.kits.server)
    return f"{text}\nThe last lines of the server's log:\n{processes.tail(log)}"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="histoflare-") as folder:
        yield Path(folder)
