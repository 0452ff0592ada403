"""A job in FLARE's simulator: one server and one process per site on this machine.

The simulator runs the same job folder, the same classes and the same site policy as a provisioned federation.
Its sites share one machine and one user: that is no protection, and no place for data of several hospitals.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from histoflare.errors import JobError
from histoflare.flare.allowed import ALLOWED_CLASSES, SITE_CLASSES
from histoflare.flare.job import Job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.record import ROUNDS_FILE
from histoflare.flare.result import (
    FederationResult,
    FederationRun,
    count_finished,
    load_site_states,
    read_mean_loss,
    read_result,
    read_rounds,
)
from histoflare.flare.site_policy import PRIVACY_FILE, policy_file, privacy_configuration, write_first_policy
from histoflare.flare.workstation import OnRounds, for_fewer_sites, write_policy
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import on_workstation
from histoflare.site.site_file import SITES_VARIABLE, write_site_file
from histoflare.storage import write_json

POLL_SECONDS = 0.3
LOG_TAIL_LINES = 15
SIMULATED_SCOPE = "histoflare.flare.simulated_scope.SimulatedScope"


def run_simulation(
    job: Job,
    sites: Mapping[str, SiteConfiguration],
    on_round: OnRounds | None = None,
) -> FederationRun:
    """Run a job over ``sites`` to its end, each under this package's policy for the job's scope.

    Args:
        job: The job; fewer rounds in the result than it says is an error.
        sites: Site names and where each keeps its manifest and bags. Each gets a ledger if it has none.
        on_round: Called while it runs, see :data:`OnRounds`.

    Raises:
        JobError: The job did not finish; the message ends with the last lines of its log.
    """
    # The simulator splits its command lines at blanks and empties its workspace: it gets a folder of its own.
    with tempfile.TemporaryDirectory(prefix="histoflare-") as scratch:
        workspace, configurations = Path(scratch) / "workspace", Path(scratch) / "sites"
        for site, configuration in sites.items():
            write_site_file(configurations / f"{site}.toml", on_workstation(site, configuration))
        _write_policy(workspace / "local", job)
        log_path = Path(scratch) / "log.txt"
        # The simulator gives every job the same id; the sites keep their notes by the run's name.
        run = f"simulation-{uuid.uuid4().hex}"
        changes = {"run": run, **for_fewer_sites(job, len(sites))}
        folder = write_variant(job.folder, Path(scratch) / "job" / job.name, changes)
        until = time.monotonic() + job.longest_seconds

        def tell() -> None:
            if on_round is not None:
                on_round(_finished_rounds(workspace), read_mean_loss(sites, run))

        code = _run_to_the_end(folder, workspace, configurations, sorted(sites), log_path, until, tell)
        result = _collect(workspace, code, job.rounds, log_path.read_text(errors="replace"))
    return FederationRun(result, load_site_states(sites, run))


def _write_policy(local: Path, job: Job) -> None:
    """Write what a startup kit has in its ``local`` folder; the simulator copies it to every site."""
    write_policy(job.scope, local / policy_file(job.scope))
    write_first_policy(local)
    write_protocols(local / PROTOCOL_FILE, [job.protocol])
    privacy = privacy_configuration([job.scope], job.scope)
    privacy["components"].append({"id": "simulated_scope", "path": SIMULATED_SCOPE, "args": {}})
    write_json(local / PRIVACY_FILE, privacy)
    allowed = [*ALLOWED_CLASSES, *SITE_CLASSES, SIMULATED_SCOPE]
    write_json(local / "resources.json", {"format_version": 2, "class_allow_list": allowed})


def _run_to_the_end(
    job_folder: Path,
    workspace: Path,
    configurations: Path,
    sites: list[str],
    log_path: Path,
    until: float,
    tell: Callable[[], None],
) -> int:
    """Return the simulator's exit code; one that has not ended by ``until`` (monotonic) is ended."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "nvflare.private.fed.app.simulator.simulator",
        str(job_folder.resolve()),
    ]
    command += ["-w", str(workspace), "-c", ",".join(sites), "-t", str(len(sites))]
    environment = {**os.environ, SITES_VARIABLE: str(configurations), "OMP_NUM_THREADS": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=workspace,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
                tell()
        finally:
            _stop(process)
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the simulator and everything it started (its sites are in sessions of their own)."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        process.terminate()
    for child in started:
        try:
            child.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(started, timeout=5)
    for child in alive:
        child.kill()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run_folder(workspace: Path) -> Path | None:
    return next((path.parent for path in workspace.glob(f"server/*/{ROUNDS_FILE}")), None)


def _finished_rounds(workspace: Path) -> int:
    folder = _run_folder(workspace)
    return 0 if folder is None else count_finished(read_rounds(folder))


def _collect(workspace: Path, code: int, rounds: int, log: str) -> FederationResult:
    folder = _run_folder(workspace)
    result = None if folder is None else read_result(folder)
    done = 0 if result is None else result.finished_rounds
    if code != 0 or result is None or result.state is None or (done < rounds and not result.stopped):
        tail = "\n".join(log.splitlines()[-LOG_TAIL_LINES:])
        raise JobError(
            f"The federation stopped after {done} of {rounds} rounds (exit code {code}). "
            f"The last lines of its log:\n{tail}",
            reason="JOB_FAILED",
        )
    return result
