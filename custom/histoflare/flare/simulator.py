"""A job in FLARE's simulator: one server and one process per site on this machine.

The simulator runs the same job folder and the same classes as a provisioned federation. It does not enforce
site policies; that is for POC and provisioned sites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from histoflare.errors import JobError
from histoflare.flare.allowed import ALLOWED_CLASSES
from histoflare.flare.participation import PARTICIPATION_FILE
from histoflare.flare.persistor import GLOBAL_MODEL_FILE
from histoflare.site.configuration import SITES_VARIABLE, SiteConfiguration, write_site_file

POLL_SECONDS = 0.3
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class FederationResult:
    """What came out of a job.

    Attributes:
        state: The last global model.
        participation: One row per round: ``round``, ``sites``, ``taking_part``, ``unix_time``.
        log: Everything the processes printed.
    """

    state: dict[str, torch.Tensor]
    participation: list[dict[str, Any]]
    log: str


def run_simulation(
    job_folder: Path,
    sites: Mapping[str, SiteConfiguration],
    rounds: int,
    on_round: Callable[[int], None] | None = None,
) -> FederationResult:
    """Run a job over ``sites`` to its end.

    Args:
        job_folder: The job.
        sites: Site names and where each keeps its manifest and bags.
        rounds: How many rounds the job runs; fewer in the result is an error.
        on_round: Called with the number of finished rounds whenever it grows.

    Raises:
        JobError: The job did not finish; the message ends with the last lines of its log.
    """
    # The simulator splits its command lines at blanks and empties its workspace: it gets a folder of its own.
    with tempfile.TemporaryDirectory(prefix="histoflare-") as scratch:
        workspace, configurations = Path(scratch) / "workspace", Path(scratch) / "sites"
        for site, configuration in sites.items():
            write_site_file(configurations / f"{site}.toml", configuration)
        local = workspace / "local"
        local.mkdir(parents=True)
        resources = {"format_version": 2, "class_allow_list": list(ALLOWED_CLASSES)}
        (local / "resources.json").write_text(json.dumps(resources))
        log_path = Path(scratch) / "log.txt"
        code = _run_to_the_end(job_folder, workspace, configurations, sorted(sites), log_path, on_round)
        return _collect(workspace, code, rounds, log_path.read_text(errors="replace"))


def _run_to_the_end(
    job_folder: Path,
    workspace: Path,
    configurations: Path,
    sites: list[str],
    log_path: Path,
    on_round: Callable[[int], None] | None,
) -> int:
    command = [sys.executable, "-m", "nvflare.private.fed.app.simulator.simulator", str(job_folder.resolve())]
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
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if on_round is not None:
                    on_round(len(_participation(workspace)))
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


def _participation(workspace: Path) -> list[dict[str, Any]]:
    for path in workspace.glob(f"server/*/{PARTICIPATION_FILE}"):
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows
    return []


def _collect(workspace: Path, code: int, rounds: int, log: str) -> FederationResult:
    participation = _participation(workspace)
    models = list(workspace.glob(f"server/*/{GLOBAL_MODEL_FILE}"))
    if code != 0 or not models or len(participation) < rounds:
        tail = "\n".join(log.splitlines()[-LOG_TAIL_LINES:])
        raise JobError(
            f"The federation stopped after {len(participation)} of {rounds} rounds (exit code {code}). "
            f"The last lines of its log:\n{tail}",
            reason="JOB_FAILED",
        )
    return FederationResult(load_file(models[0]), participation, log)
