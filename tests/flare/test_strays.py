"""Real processes of a federation with an attacker's files in their kits and around them: none of it runs.

What is planted is what ran in FLARE as it comes: a ``comm_config`` that names a folder of code, a section of
``resources`` that names a module, modules in a kit's root and in the folder that a command is called in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from histoflare.flare import processes
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement, kit_environment
from histoflare.flare.poc import Federation

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b")
PARTICIPANTS = ("server", *SITES)
EARLIER = str(uuid.UUID(int=7))
MODULES = ("msgpack.py", "sitecustomize.py", "nvflare.py", "histoflare/__init__.py")
NAMED = "named_by_a_stray_section"


@dataclass(frozen=True)
class Ran:
    federation: Federation
    marks: Path
    job_id: str

    def said(self) -> list[str]:
        """Return what ran, each with the process that it ran in."""
        return sorted(path.read_text() for path in self.marks.iterdir())


def plant(folder: Path, marks: Path, *modules: str) -> None:
    """Write a comm_config and a section of resources that name code, and code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comm_config.json").write_text(json.dumps({"comm_driver_path": str(folder)}))
    (folder / "resources.json").write_text(json.dumps({"decomposer_module": NAMED}))
    for name in modules:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code(marks, folder / name))


def code(marks: Path, path: Path) -> str:
    return (
        "import pathlib, sys, uuid\n"
        f"mark = pathlib.Path({str(marks)!r}, uuid.uuid4().hex)\n"
        f"mark.write_text({str(path)!r} + ' in ' + ' '.join(sys.argv))\n"
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("strays")
    marks, modules, around = folder / "marks", folder / "modules", folder / "around"
    for each in (marks, modules, around):
        each.mkdir()
    (modules / f"{NAMED}.py").write_text(code(marks, Path(NAMED)))
    job = write_variant(repository / "jobs" / "mem_fedavg", folder / "job", {"rounds": 1})
    sites = {site: write_site(folder / "sites", site) for site in SITES}
    with Federation.prepare(folder / "run", sites, Agreement(job)) as federation:
        federation.start(environment={"PYTHONPATH": str(modules)})
        for participant in PARTICIPANTS:  # now: with these in it none would start
            kit = federation.kits.kit(participant)
            plant(kit, marks, *MODULES)
            plant(kit / EARLIER / f"app_{participant}" / "config", marks, "evil.py")
        plant(around, marks, *MODULES)
        plant(around / "downloads" / "job", marks, "evil.py")
        lead = federation.kits.kit(federation.kits.lead)
        plant(lead / "transfer" / "job", marks, "evil.py")
        submitted = subprocess.run(
            [str(Path(sys.executable).parent / "histoflare"), "job", "submit", str(job), "--kit", str(lead)],
            cwd=around,
            env=kit_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert submitted.returncode == 0, submitted.stderr
        job_id = submitted.stdout.strip()
        federation.follow(job_id, timeout_s=120)
        yield Ran(federation, marks, job_id)


@pytest.mark.parametrize("participant", PARTICIPANTS)
def test_processes_of_the_job_were_there(ran: Ran, participant: str) -> None:
    """Else what follows shows nothing."""
    started = "Runner_process started" if participant == "server" else "Worker_process started"
    assert started in ran.federation.log(participant).read_text()


def test_nothing_ran(ran: Ran) -> None:
    assert ran.said() == []


def test_the_console_of_the_lead_runs_nothing_either(ran: Ran, tmp_path: Path) -> None:
    """FLARE's changes into the kit, below which downloads lie."""
    kits = ran.federation.kits
    done = subprocess.run(
        ["bash", str(kits.kit(kits.lead) / "startup" / "fl_admin.sh")],
        cwd=ran.federation.workspace.parent / "around",
        env=kit_environment(),
        input=f"{kits.lead}\nlist_jobs\nbye\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.job_id in done.stdout, done.stdout + done.stderr
    assert ran.said() == []


@pytest.mark.parametrize("participant", PARTICIPANTS)
def test_none_of_them_starts_again(ran: Ran, participant: str) -> None:
    kit = ran.federation.kits.kit(participant)
    name = uuid.uuid4().hex
    try:
        done = subprocess.run(
            ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
            cwd=kit,
            env={**kit_environment(), processes.FEDERATION_VARIABLE: name, "PYTHONPATH": os.pathsep},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
    finally:
        processes.end(name)
    assert done.returncode == 1, done.stdout
    for module in MODULES:
        assert f"could be run: {module}" in done.stdout
    earlier = f"could be run: {EARLIER}/app_{participant}/config/evil.py"
    assert (earlier in done.stdout) is (participant == "server"), "a site's are removed"
    assert ran.said() == []
