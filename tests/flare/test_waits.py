"""Nobody waits without limit: not the lead for a job, and not a workstation for FLARE's simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from histoflare.flare import admin, simulator
from histoflare.flare.admin import Admin
from histoflare.flare.job import Job, read_job
from tests.refusals import raises_reason


def wait_for(statuses: list[str], monkeypatch: pytest.MonkeyPatch, longest_seconds: float = 100.0) -> str:
    """Wait for a job that has these statuses, one for each second, the last one for ever."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(admin.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(admin.time, "sleep", sleep)
    asked = Admin("lead", Path("kit"))
    monkeypatch.setattr(asked, "status", lambda _: statuses[min(int(now[0]), len(statuses) - 1)])
    return asked.wait("job", longest_seconds)


def test_a_job_that_ends_is_waited_for_however_long_it_stood_in_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = ["SUBMITTED"] * 500 + ["RUNNING"] * 99 + ["FINISHED:COMPLETED"]
    assert wait_for(said, monkeypatch) == "FINISHED:COMPLETED"


@pytest.mark.parametrize(("status", "says"), [("RUNNING", " 100 s "), ("SUBMITTED", " week")])
def test_one_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, status: str, says: str) -> None:
    with raises_reason("FEDERATION_FAILED", says):
        wait_for([status], monkeypatch)


def test_a_simulator_that_does_not_end_is_ended(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Hanging(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **options)
            started.append(self)
            Path(options["cwd"]).mkdir(exist_ok=True)

    monkeypatch.setattr(simulator.subprocess, "Popen", Hanging)
    monkeypatch.setattr(Job, "longest_seconds", 1)
    with raises_reason("JOB_FAILED", "0 of 30 rounds"):
        simulator.run_simulation(read_job(repository / "jobs" / "mem_fedavg"), {})
    assert started[0].poll() is not None
