"""A provisioned federation in real processes: a job under the kits' policy, and what no site starts or runs.

The kits are made by ``nvflare provision`` from a project file as a consortium would, and started with the
scripts in them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.apis.workspace import Workspace

from histoflare.errors import HistoflareError, JobError
from histoflare.flare import processes
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CLIENT_FILE, CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kit_check import CHECK_FILE
from histoflare.flare.kit_signature import SIGNATURE_FILE, check_running_kit, verify_kit
from histoflare.flare.kits import Kits, kit_environment
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import read_result
from histoflare.privacy.policy import POLICIES
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of, open_ledger
from histoflare.site.site_file import read_site_file, write_site_file
from histoflare.storage import write_json
from tests.privacy.ledgers import steward_ledger
from tests.refusals import raises_reason

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b")
LEAD = "lead@consortium.example"
METRIC = "balanced_accuracy"
KEPT_BACK = f"validation/{METRIC}"
EXECUTOR = "histoflare.flare.executor.SiteExecutor"
OUTSIDE = "nvflare.app_common.np.np_trainer.NPTrainer"


def write_project(repository: Path, folder: Path, port: int, job: Path) -> Path:
    """Write the repository's project file for two sites and a server on this machine.

    Its policy is not the package's: it keeps a metric back that the package's lets out.
    """
    project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
    server = {"name": "localhost", "type": "server", "org": "consortium"}
    server |= {"fed_learn_port": port, "admin_port": port}
    project["participants"] = [
        server,
        {"name": LEAD, "type": "admin", "org": "consortium", "role": "project_admin"},
        *({"name": site, "type": "client", "org": site.replace("-", "_")} for site in SITES),
    ]
    policy = (POLICIES / "open.toml").read_text()
    assert f'"{KEPT_BACK}", ' in policy
    (folder / "open.toml").write_text(policy.replace(f'"{KEPT_BACK}", ', ""))
    arguments = {"policies": ["open.toml"], "protocol": str(job), "default_scope": "open"}
    arguments |= {"loopback": True, "heart_beat_timeout": 45}
    next(part for part in project["builders"] if part["path"].endswith("SitePolicyBuilder"))["args"] = (
        arguments
    )
    (folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False))
    return folder / "project.yml"


class Provisioned:
    """Kits on disk, and the federation of them once it is started."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.job = write_variant(
            repository / "jobs" / "mem_fedavg", folder / "job", {"rounds": 2, "best_metric": METRIC}
        )
        port = processes.free_port()
        project = write_project(repository, folder, port, self.job)
        command = [
            sys.executable,
            "-m",
            "nvflare.cli",
            "provision",
            "-p",
            str(project),
            "-w",
            str(folder / "made"),
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "HOME": str(folder / "home")},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made = folder / "made" / "histoflare" / "prod_00"
        self.kits = Kits(uuid.uuid4().hex, str(made), "localhost", LEAD, SITES, port)
        self.sites = {}
        for site in SITES:
            where = write_site(folder / "sites", site, validation=True)
            ledger, key = steward_ledger(folder / "stewards" / site, site)
            self.sites[site] = replace(where, ledger=ledger, ledger_key=key)
            self.say(site, self.sites[site])
        self._open_server()
        self.federation = Federation(folder / "run", self.kits)

    def say(self, site: str, where: SiteConfiguration) -> None:
        write_site_file(self.kits.kit(site) / "local" / "histoflare.toml", where)

    def _open_server(self) -> None:
        """Have the server take everything: what is refused below, a site refuses by itself."""
        local = self.kits.kit("localhost") / "local"
        rights = json.loads((local / "authorization.json.default").read_text())
        rights["permissions"]["project_admin"]["byoc"] = "any"
        write_json(local / "authorization.json.default", rights)
        resources = json.loads((local / "resources.json.default").read_text())
        resources["class_list_enforcement_mode"] = "warn"
        manager = next(part for part in resources["components"] if part["id"] == "job_manager")
        manager["path"] = "nvflare.apis.impl.job_def_manager.SimpleJobDefManager"
        manager["args"]["uri_root"] = str(self.folder / "jobs-of-the-server")
        write_json(local / "resources.json.default", resources)
        with pytest.raises(JobError):
            verify_kit(self.kits.kit("localhost"))
        self.kits.sign("localhost")

    def run(self, job: Path) -> str:
        """Run a job to its end; return its status, or what the server says against it."""
        try:
            return self.federation.follow(self.federation.admin.submit(job), timeout_s=60)
        except HistoflareError as error:
            return str(error)

    def refused_before_it_was_unpacked(self) -> None:
        """Hold every site to one fixed code for the jobs that failed to run, and to no folder of them."""
        jobs = self.federation.admin.jobs()
        refused = [job["job_id"] for job in jobs if job["status"] == "FINISHED:FAILED_TO_RUN"]
        assert refused
        said = self.said("localhost")
        for site in SITES:
            assert f"{site}: JOB_INVALID" in said, said[-3000:]
            assert "refused: JOB_INVALID" in (self.kits.kit(site) / "log.txt").read_text()
            assert not [job_id for job_id in refused if (self.kits.kit(site) / job_id).exists()]

    def rows(self, job_id: str) -> list[dict[str, Any]]:
        """Return what the server noted of a finished job's rounds."""
        result = self.federation.admin.download(job_id, self.folder / "results") / "workspace"
        return read_result(result).rounds

    def said(self, participant: str) -> str:
        return self.federation.log(participant).read_text()


def weaken(kit: Path) -> None:
    """Change one byte of a site's policy; it can still be read, and lets more out."""
    path = kit / "local" / "policy_open.toml"
    text = path.read_text()
    assert text.count("minimum_patients = 2") == 1
    path.write_text(text.replace("minimum_patients = 2", "minimum_patients = 1"))


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Provisioned:
    return Provisioned(tmp_path_factory.mktemp("Köln's provisioned"), repository)


@pytest.fixture(scope="module")
def running(provisioned: Provisioned) -> Iterator[Provisioned]:
    with provisioned.federation as federation:
        federation.start()
        yield provisioned
    assert not processes.find(provisioned.kits.name)


def test_a_job_runs_under_the_policy_in_the_kits(running: Provisioned) -> None:
    job_id = running.federation.admin.submit(running.job)
    assert running.federation.follow(job_id, timeout_s=120) == COMPLETED, running.said("localhost")[-3000:]
    rows = running.rows(job_id)
    assert [row["taking_part"] for row in rows] == [list(SITES)] * 2
    assert read_job(running.job).best_metric == METRIC
    assert not [row for row in rows if any(row["metrics"].values())], "this policy keeps it back"
    for participant in ("localhost", *SITES):
        verify_kit(running.kits.kit(participant))  # FLARE itself writes nothing in there
    for site in SITES:
        left = [(each.what, each.run, each.times) for each in open_ledger(running.sites[site]).disclosures()]
        assert ("update", job_id, 2) in left, "nothing protects it: it is noted"
        assert {what for what, *_ in left} <= {"update", "evaluation"}, "the job also asks about its model"


def test_a_job_that_brings_code_is_refused_by_the_sites(running: Provisioned, tmp_path: Path) -> None:
    job = shutil.copytree(running.job, tmp_path / "byoc")
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "own.py").write_text("raise SystemExit\n")
    assert running.run(job) == "FINISHED:FAILED_TO_RUN"
    running.refused_before_it_was_unpacked()


def test_a_job_with_a_class_outside_the_list_is_refused_by_the_sites(
    running: Provisioned, tmp_path: Path
) -> None:
    job = shutil.copytree(running.job, tmp_path / "outside")
    configuration = job / CONFIG_FOLDER / CLIENT_FILE
    text = configuration.read_text()
    assert EXECUTOR in text
    configuration.write_text(text.replace(EXECUTOR, OUTSIDE))
    assert running.run(job) == "FINISHED:FAILED_TO_RUN"
    running.refused_before_it_was_unpacked()


@pytest.mark.parametrize(
    "change",
    [
        weaken,
        lambda kit: (kit / SIGNATURE_FILE).unlink(),
    ],
    ids=["policy", "no signature"],
)
def test_a_kit_that_is_changed_while_its_client_runs(
    running: Provisioned, change: Callable[[Path], None]
) -> None:
    """What Admission asks at each job."""
    kit = running.kits.kit("clinic-b")
    kept = {path: (kit / path).read_bytes() for path in ("local/policy_open.toml", SIGNATURE_FILE)}
    change(kit)
    try:
        with pytest.raises(JobError) as caught:
            check_running_kit(Workspace(str(kit), "clinic-b"))
        assert caught.value.reason == "KIT_CHANGED"
    finally:
        for path, content in kept.items():
            (kit / path).write_bytes(content)
    check_running_kit(Workspace(str(kit), "clinic-b"))


def test_a_site_whose_kit_was_changed_refuses_the_next_job(running: Provisioned) -> None:
    job = write_variant(running.job, running.folder / "one-is-enough", {"least_sites": 1})
    policy = running.kits.kit("clinic-b") / "local" / "policy_open.toml"
    kept = policy.read_bytes()
    weaken(running.kits.kit("clinic-b"))
    try:
        job_id = running.federation.admin.submit(job)
        assert running.federation.follow(job_id, timeout_s=120) == COMPLETED
    finally:
        policy.write_bytes(kept)
    rows = running.rows(job_id)
    assert [row["taking_part"] for row in rows] == [["clinic-a"]] * 2
    assert [row["refused"] for row in rows] == [{"clinic-b": "KIT_CHANGED"}] * 2
    # The log of the process that starts the jobs has it too, where else it says that RC is 0.
    said = (running.kits.kit("clinic-b") / "log.txt").read_text()
    (line,) = [line for line in said.splitlines() if f"job {job_id}: refused: KIT_CHANGED" in line]
    assert "changed: local/policy_open.toml" in line and "histoflare kit check" in line


def test_a_site_that_names_no_ledger_takes_no_job_and_is_told_what_to_do(running: Provisioned) -> None:
    job = write_variant(running.job, running.folder / "no-ledger", {"least_sites": 1})
    file = running.kits.kit("clinic-b") / "local" / "histoflare.toml"
    kept, where = file.read_text(), read_site_file(file, "clinic-b")
    file.write_text(re.sub(r"^ledger.*\n", "", kept, flags=re.MULTILINE))
    try:
        job_id = running.federation.admin.submit(job)
        assert running.federation.follow(job_id, timeout_s=120) == COMPLETED
    finally:
        file.write_text(kept)
    rows = running.rows(job_id)
    assert [row["taking_part"] for row in rows] == [["clinic-a"]] * 2
    assert [row["refused"] for row in rows] == [{"clinic-b": "LEDGER_MISSING"}] * 2
    (first, *_) = audit_log_of(replace(where, ledger=None, ledger_key=None)).read()
    assert first["reason"] == "LEDGER_MISSING" and "ledger create" in first["detail"]


def replace_resources(kit: Path) -> None:
    """What a site would do that wants other classes: FLARE takes this file in place of the default."""
    shutil.copyfile(kit / "local" / "resources.json.default", kit / "local" / "resources.json")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "policy": (weaken, "changed: local/policy_open.toml"),
    "no signature": (lambda kit: (kit / SIGNATURE_FILE).unlink(), f"missing: {SIGNATURE_FILE}"),
    "script": (
        lambda kit: (kit / "startup" / "start.sh").write_text("#!/bin/sh\n"),
        "changed: startup/start.sh",
    ),
    "other resources": (replace_resources, "not signed: local/resources.json"),
}


class TestStart:
    """No server is needed: a changed kit ends the client before it calls anybody."""

    def copy(self, provisioned: Provisioned, tmp_path: Path, site: str = "clinic-a") -> Path:
        kit = tmp_path / site
        return shutil.copytree(provisioned.kits.kit(site), kit)

    def start(self, kit: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        name = uuid.uuid4().hex
        environment = {**kit_environment(), processes.FEDERATION_VARIABLE: name}
        try:
            return subprocess.run(
                ["bash", str(kit / "startup" / script), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=kit,
                timeout=60,
            )
        finally:
            processes.end(name)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_changed_kit_is_not_started(
        self, provisioned: Provisioned, tmp_path: Path, change: str
    ) -> None:
        kit = self.copy(provisioned, tmp_path)
        act, says = CHANGES[change]
        act(kit)
        done = self.start(kit, "sub_start.sh", "--once")
        assert done.returncode == 1, done.stdout
        assert "KIT_CHANGED" in done.stdout and says in done.stdout
        assert "Traceback" not in done.stdout

    def test_nor_a_changed_server(self, provisioned: Provisioned, tmp_path: Path) -> None:
        kit = self.copy(provisioned, tmp_path, "localhost")
        (kit / "local" / "authorization.json.default").write_text("{}")
        done = self.start(kit, "sub_start.sh", "--once")
        assert done.returncode == 1 and "changed: local/authorization.json.default" in done.stdout

    def test_the_script_does_not_try_again(self, provisioned: Provisioned, tmp_path: Path) -> None:
        """As a hospital starts it: the script goes on in the background and starts again what has ended."""
        kit = self.copy(provisioned, tmp_path)
        weaken(kit)
        done = self.start(kit, "start.sh")  # returns when nothing has its output any more
        assert done.stdout.count("new pid") == 1 and done.stdout.count("KIT_CHANGED") == 1
        assert "Gracefully shutdown" in done.stdout
        assert not list(kit.glob("*.fl"))

    def test_the_check_is_a_file_of_the_kit(self, provisioned: Provisioned, tmp_path: Path) -> None:
        """The limit: without it the client starts. Then Admission is what refuses its jobs."""
        kit = self.copy(provisioned, tmp_path)
        (kit / "startup" / CHECK_FILE).unlink()
        with raises_reason("KIT_CHANGED", CHECK_FILE):
            check_running_kit(Workspace(str(kit), "clinic-a"))
