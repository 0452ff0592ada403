"""A federation that is left up, worked with from FLARE's own console programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from histoflare.flare import processes
from histoflare.flare.job import read_job
from histoflare.flare.poc import Federation
from histoflare.synthetic.slides import SyntheticCohort, make_slides

pytestmark = [pytest.mark.flare, pytest.mark.slow]

PROGRAMS = Path(sys.executable).parent
COHORT = SyntheticCohort(hospitals=2, slides_per_hospital=5, slides_external=2, um_field=448.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Path]:
    """A folder with slides, a job for them, and a federation whose sites have not made their bags yet."""
    folder = tmp_path_factory.mktemp("console")
    make_slides(folder / "sites", COHORT)
    job = [repository / "jobs" / "mem_fedavg", "--out", folder / "job", "--set", "rounds=2"]
    run(folder, "histoflare", "job", "make", *job, "--set", "task.patch_px=112")
    arguments = ["--sites", folder / "sites", "--prepare", "--job", folder / "job"]
    facts = json.loads(run(folder, "histoflare", "poc", "start", *arguments, "--json"))
    assert facts["participants"]["hospital-1"] == {"up": True, "registered": True}
    yield folder
    name = Federation.open(folder / "poc-run").kits.name
    try:
        run(folder, "histoflare", "poc", "stop")
        assert not processes.find(name)
    finally:
        processes.end(name)
    assert "no federation" in refused(folder, "histoflare", "poc", "stop")
    assert "no federation" in refused(folder, "histoflare", "poc", "status")
    assert not list((folder / "home").rglob("*")), "nothing is left in the user's home"


def run(folder: Path, program: str, *arguments: object, text: str | None = None) -> str:
    """Run a console program as a user does; return what it prints."""
    ended = call(folder, program, *arguments, text=text)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def refused(folder: Path, program: str, *arguments: object) -> str:
    """Run a console program that ends with 1; return what it says."""
    ended = call(folder, program, *arguments)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return ended.stderr


def call(
    folder: Path, program: str, *arguments: object, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        input=text,
        env=environment,
        timeout=240,
        check=False,
    )


def finished(federation: Federation, job_id: str) -> str:
    until = time.monotonic() + 200
    while time.monotonic() < until:
        status = federation.admin.status(job_id)
        if status.startswith("FINISHED"):
            return status
        time.sleep(1)
    raise AssertionError(f"the job has not ended:\n{processes.tail(federation.log('server'), 40)}")


def test_a_second_start_is_refused_and_the_status_says_who_is_there(workplace: Path) -> None:
    arguments = ["--sites", workplace / "sites", "--prepare", "--job", workplace / "job"]
    said = refused(workplace, "histoflare", "poc", "start", *arguments)
    assert "is running" in said and "histoflare poc stop" in said
    status = call(workplace, "histoflare", "poc", "status")
    assert status.returncode == 0, status.stderr
    assert "hospital-2" in status.stdout and "histoflare job submit" in status.stderr


def test_a_job_submitted_with_nvflare_makes_the_bags_and_runs(workplace: Path) -> None:
    federation = Federation.open(workplace / "poc-run")
    kit = federation.kits.kit(federation.kits.lead)
    said = run(workplace, "nvflare", "job", "submit", "-j", workplace / "job", "--startup-kit", kit)
    job_id = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", said)
    assert job_id, said
    assert finished(federation, job_id[0]) == "FINISHED:COMPLETED"
    result = federation.admin.download(job_id[0], workplace / "result") / "workspace"
    rows = json.loads((result / "rounds.json").read_text())
    assert [row["taking_part"] for row in rows] == [["hospital-1", "hospital-2"]] * 2
    assert [row["refused"] for row in rows] == [{"external": "EVALUATION_ONLY"}] * 2
    bags = sorted(path.parent.parent.name for path in workplace.glob("sites/*/bags/*.h5"))
    assert bags.count("hospital-1") == bags.count("hospital-2") == 5
    assert "preparing bags" in federation.log("hospital-1").read_text(), "the site's own log shows progress"
    assert list(workplace.glob("sites/hospital-1/bags-records/*/tensorboard/events*")), (
        "TensorBoard, at the site"
    )
    federation.admin.disconnect()


def test_the_admin_console_submits_a_job(workplace: Path) -> None:
    """``fl_admin.sh``, as the README has it; it asks for the name of whoever starts it."""
    federation = Federation.open(workplace / "poc-run")
    kit = federation.kits.kit(federation.kits.lead)
    job = read_job(workplace / "job")
    before = len(federation.admin.jobs())
    commands = f"{federation.kits.lead}\nsubmit_job {job.folder}\nlist_jobs\nbye\n"
    said = run(workplace, "bash", kit / "startup" / "fl_admin.sh", text=commands)
    assert "Submitted job" in said, said
    jobs = federation.admin.jobs()
    assert len(jobs) == before + 1
    for entry in jobs:
        assert finished(federation, entry["job_id"]) == "FINISHED:COMPLETED"
    federation.admin.disconnect()
