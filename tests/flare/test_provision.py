"""What is in a startup kit, made by FLARE's own command from the project file of this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.apis.workspace import Workspace
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import FLAuthorizer

from histoflare.errors import JobError
from histoflare.flare.allowed import ALLOWED_CLASSES, SITE_CLASSES
from histoflare.flare.job import read_job
from histoflare.flare.kit_signature import SIGNATURE_FILE, read_authority, sign_list, verify_kit
from histoflare.flare.kits import Agreement, _project, plan_project
from histoflare.flare.provision import SitePolicyBuilder, check_names, project_folder, site_configuration
from histoflare.flare.site_policy import known_models, policy_file
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import read_site_policy
from histoflare.privacy.policy import read_policy
from histoflare.privacy.protocol import hash_protocol, read_protocols
from histoflare.rounds.strategies import STRATEGIES
from histoflare.site.site_file import read_site_file
from tests.refusals import raises_reason

SITES = ("hospital-a", "hospital-b", "hospital-c", "hospital-d", "external")


SERVER = "server.consortium.example"
LEAD = "lead@consortium.example"
SCRIPTS = {f"startup/{name}.sh" for name in ("start", "sub_start", "stop_fl")}


def provision(project: Path, folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run ``nvflare provision`` in ``folder``, which is not the project's."""
    return nvflare(folder, home, "provision", "-p", str(project), "-w", "kits", "--force")


def nvflare(folder: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nvflare.cli", *arguments]
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def kits(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, home = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("home")
    done = provision(repository / "provisioning" / "project.yml", folder, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(home.iterdir())
    return folder / "kits" / "histoflare" / "prod_00"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_everybody_has_a_kit(kits: Path, repository: Path) -> None:
    project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
    assert {path.name for path in kits.iterdir()} == {part["name"] for part in project["participants"]}
    assert {part["name"] for part in project["participants"] if part["type"] == "client"} == set(SITES)
    for kit in kits.iterdir():
        keys = list(kit.rglob("*.key"))
        assert keys and all(path.stat().st_mode & 0o077 == 0 for path in keys)


def test_the_authority_is_for_this_user_alone(kits: Path) -> None:
    state = kits.parent / "state"
    assert "root_pri_key" in read(state / "cert.json")
    assert {path: path.stat().st_mode & 0o777 for path in (state, *state.iterdir())} == {
        state: 0o700,
        **dict.fromkeys(state.iterdir(), 0o600),
    }


@pytest.mark.parametrize("site", SITES)
class TestSite:
    def test_has_the_policy_it_is_told_of(self, kits: Path, repository: Path, site: str) -> None:
        local = kits / site / "local"
        privacy = read(local / "privacy.json")
        assert [scope["name"] for scope in privacy["scopes"]] == ["dp-patient", "dp-update"]
        assert privacy["default_scope"] == "dp-patient"
        assert not (local / "policy_open.toml").exists(), "a job picks its scope: none that protects nothing"
        for scope in privacy["scopes"]:
            name = scope["name"]
            source = repository / "provisioning" / "policies" / f"{name}.toml"
            assert (local / f"policy_{name}.toml").read_bytes() == source.read_bytes()
            parts = [*scope["task_data_filters"], *scope["task_result_filters"], *privacy["components"]]
            assert {part["path"] for part in parts} == set(SITE_CLASSES)
            for part in scope["task_data_filters"]:
                assert read_policy(local / part["args"]["policy"]).name == name
        assert not (local / "privacy.json.sample").exists(), "its scopes are wider than ours"

    def test_has_an_own_policy_that_its_steward_may_change(self, kits: Path, site: str) -> None:
        local = kits / site / "local"
        for name in ("dp-patient", "dp-update"):
            holds = read_site_policy(local / policy_file(name))
            assert holds == replace(
                read_policy(local / policy_file(name)),
                purposes=("research",),
                strategies=tuple(STRATEGIES),
                models=tuple(known_models()),
            )
        own = local / OWN_POLICY_FILE
        before = own.read_bytes()
        own.write_bytes(before + b"[scope.dp-patient]\nepsilon = 1.0\n")
        try:
            verify_kit(kits / site)
        finally:
            own.write_bytes(before)

    def test_has_the_protocol_of_the_jobs(self, kits: Path, repository: Path, site: str) -> None:
        agreed = set(map(hash_protocol, read_protocols(kits / site / "local" / "protocol.json")))
        assert {hash_protocol(read_job(job).protocol) for job in (repository / "jobs").iterdir()} == agreed

    def test_jobs_may_name_this_package_s_classes_only(self, kits: Path, site: str) -> None:
        local = kits / site / "local"
        assert not (local / "resources.json").exists(), "it would hide the default"
        resources = read(local / "resources.json.default")
        assert resources["class_allow_list"] == list(ALLOWED_CLASSES)
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["allow_log_streaming"] is False
        paths = [part["path"] for part in resources["components"]]
        assert any(path.endswith(".SiteLogStreamer") for path in paths), "it takes streamers out of jobs"
        assert paths[-1] == "histoflare.flare.closed_commands.ClosedCommands"

    def test_what_flare_sends_at_registration_says_nothing_of_the_policy(self, kits: Path, site: str) -> None:
        from nvflare.private.fed.utils.site_config import project_site_config

        resources = read(kits / site / "local" / "resources.json.default")
        assert project_site_config(resources) == {"allow_log_streaming": False}

    @pytest.mark.parametrize(
        ("role", "org", "right", "allowed"),
        [
            ("project_admin", "consortium", "byoc", False),
            ("lead", "consortium", "byoc", False),
            ("org_admin", "own", "byoc", False),
            ("project_admin", "consortium", "submit_job", True),
            ("project_admin", "consortium", "shutdown", True),
            ("project_admin", "consortium", "cat", False),
            ("project_admin", "own", "cat", False),
            ("lead", "consortium", "tail", False),
            ("org_admin", "own", "cat", False),
            ("org_admin", "another", "cat", False),
            ("org_admin", "own", "shutdown", True),
            ("org_admin", "another", "shutdown", False),
        ],
    )
    def test_rights(
        self, kits: Path, repository: Path, site: str, role: str, org: str, right: str, allowed: bool
    ) -> None:
        project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
        own = next(part["org"] for part in project["participants"] if part["name"] == site)
        assert not (kits / site / "local" / "authorization.json").exists(), "it would hide the default"
        authorizer = FLAuthorizer(own, read(kits / site / "local" / "authorization.json.default"))
        person = Person("x", own if org == "own" else org, role)
        assert authorizer.authorize(AuthzContext(right, person, person))[0] is allowed


@pytest.mark.parametrize("participant", [*SITES, SERVER])
class TestSignature:
    def test_is_of_every_file(self, kits: Path, participant: str) -> None:
        kit = kits / participant
        verify_kit(kit)
        signed = set(read(kit / SIGNATURE_FILE)["files"])
        assert signed >= SCRIPTS
        there = {
            path.relative_to(kit).as_posix()
            for folder in ("startup", "local")
            for path in (kit / folder).rglob("*")
            if path.is_file()
        }
        assert there - signed == {SIGNATURE_FILE} | (
            {"local/histoflare.toml", "local/policy.toml"} if participant in SITES else set()
        )

    def test_is_checked_by_the_process_that_starts_jobs(self, kits: Path, participant: str) -> None:
        """A job's process that ends would end the job at all sites; there Admission makes the check."""
        workspace = Workspace(str(kits / participant), participant)
        named = {}
        for for_job in (False, True):
            files = workspace.get_config_files_for_startup(participant == SERVER, for_job)
            named[for_job] = {
                part["path"] for file in files for part in read(Path(file)).get("components", [])
            }
        assert named[False] - named[True] == {"histoflare.flare.kit_check.KitCheck"}
        assert not named[True] - named[False]

    @pytest.mark.parametrize("path", [*sorted(SCRIPTS), "local/resources.json.default", SIGNATURE_FILE])
    def test_tells_a_changed_kit(self, kits: Path, tmp_path: Path, participant: str, path: str) -> None:
        kit = shutil.copytree(kits / participant, tmp_path / participant)
        verify_kit(kit)
        with (kit / path).open("ab") as file:
            file.write(b"x")
        with pytest.raises(JobError) as caught:
            verify_kit(kit)
        assert caught.value.reason == "KIT_CHANGED" and f"changed: {path}" in str(caught.value)


STUB = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SAID"
"""


@pytest.mark.parametrize("name", ["my kit", "it's", 'a"b', "Köln #1", "a\\b", "$HOME;x", "-k"])
@pytest.mark.parametrize(
    ("participant", "script"),
    [
        ("hospital-a", "start.sh"),
        ("hospital-a", "sub_start.sh"),
        (SERVER, "sub_start.sh"),
        (LEAD, "fl_admin.sh"),
    ],
)
def test_the_scripts_work_wherever_the_kit_is(
    kits: Path, tmp_path: Path, participant: str, script: str, name: str
) -> None:
    """Python, or what start.sh goes on with, is called once, with the kit's path in one piece."""
    kit = shutil.copytree(kits / participant, tmp_path / name / "kit")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    for stub in (python, *([kit / "startup" / "sub_start.sh"] if script == "start.sh" else [])):
        stub.write_text(STUB)
        stub.chmod(0o755)
    said = tmp_path / "said"
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "SAID": str(said)}
    arguments = ["--once"] if script == "sub_start.sh" else []
    done = subprocess.run(
        ["bash", str(kit / "startup" / script), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    until = time.monotonic() + 20
    while not said.exists() and time.monotonic() < until:
        time.sleep(0.05)  # start.sh leaves what it starts in the background
    words = said.read_text().split("\n")
    place = {"start.sh": [], "sub_start.sh": [str(kit)], "fl_admin.sh": [f"{kit}/startup/.."]}[script]
    assert words[words.index("-m", 2) + 1 :][:1] == place if place else words == ["", ""]


def test_a_steward_s_own_settings_leave_the_signature_alone(kits: Path, tmp_path: Path) -> None:
    kit = shutil.copytree(kits / "hospital-a", tmp_path / "hospital-a")
    (kit / "local" / "histoflare.toml").write_text('manifest = "manifest.csv"\nbags = "bags"\n')
    (kit / "local" / "manifest.csv").write_text("slide,patient,label\n")
    (kit / "local" / "bags").mkdir()
    verify_kit(kit)


def test_what_a_project_says_of_its_server_is_signed_with_it(repository: Path, tmp_path: Path) -> None:
    project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
    arguments = next(part for part in project["builders"] if part["path"].endswith("SitePolicyBuilder"))[
        "args"
    ]
    assert "loopback" not in arguments, "the hospitals could not reach it"
    provisioning = repository / "provisioning"
    arguments |= {"heart_beat_timeout": 90, "loopback": True, "protocol": str(repository / "jobs/mem_fedavg")}
    arguments["policies"] = [str(provisioning / policy) for policy in arguments["policies"]]
    (tmp_path / "project.yml").write_text(yaml.safe_dump(project))
    done = provision(tmp_path / "project.yml", tmp_path, tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    kit = tmp_path / "kits" / "histoflare" / "prod_00" / SERVER
    resources = read(kit / "local" / "resources.json.default")
    assert resources["servers"][0]["heart_beat_timeout"] == 90
    service = read(kit / "startup" / "fed_server.json")["servers"][0]["service"]
    assert service["target"] == "127.0.0.1:8002"
    verify_kit(kit)


@pytest.mark.parametrize("seconds", [0, "600", 1.5, True])
def test_a_timeout_that_is_none(repository: Path, monkeypatch: pytest.MonkeyPatch, seconds: Any) -> None:
    monkeypatch.chdir(repository)
    policies = ["provisioning/policies/open.toml"]
    with raises_reason("JOB_INVALID", "heart_beat_timeout", repr(seconds)):
        SitePolicyBuilder(policies, "jobs/mem_fedavg", heart_beat_timeout=seconds)


def test_where_the_key_is_not_a_kit_is_listed_and_the_lead_signs_the_list(
    repository: Path, tmp_path: Path
) -> None:
    """FLARE's commands for keys that never leave the hospital, and what is sent to and fro."""
    project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
    project["participants"] = [part for part in project["participants"] if part["name"] == "hospital-a"]
    policy = {
        "policies": [str(repository / "provisioning" / "policies" / "open.toml")],
        "protocol": str(repository / "jobs" / "mem_fedavg"),
    }
    next(part for part in project["builders"] if part["path"].endswith("SitePolicyBuilder"))["args"] = policy
    profile = {"name": "histoflare", "scheme": "tcp", "connection_security": "mtls"}
    profile["server"] = {"host": "localhost", "fed_learn_port": 8002, "admin_port": 8002}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(project))
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    signed = "hospital-a.signed.zip"
    for command in (
        "cert init --profile profile.yaml -o authority",
        "cert request -p site.yaml",
        f"cert approve hospital-a/hospital-a.request.zip -c authority --profile profile.yaml --out {signed}",
        f"package {signed} --request-dir hospital-a -w kit",
    ):
        done = nvflare(tmp_path, tmp_path / "home", *command.split())
        assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "hospital-a: this kit is not signed" in said and said.count("is not signed") == 1
    kit = tmp_path / "kit" / "histoflare" / "prod_00" / "hospital-a"
    with raises_reason("KIT_CHANGED", kit, SIGNATURE_FILE):
        verify_kit(kit)
    sign_list(kit / SIGNATURE_FILE, read_authority(tmp_path / "authority"))
    verify_kit(kit)


def test_a_site_file_is_left_to_its_steward(kits: Path) -> None:
    path = kits / "hospital-a" / "local" / "histoflare.toml"
    with pytest.raises(JobError) as caught:
        read_site_file(path)
    assert caught.value.reason == "SITE_NOT_CONFIGURED"
    assert "manifest: " in str(caught.value) and "bags: " in str(caught.value)
    path = kits / "external" / "local" / "histoflare.toml"
    assert tomllib.loads(path.read_text())["evaluation_only"] is True


def test_a_steward_s_two_lines_make_it_whole(kits: Path, tmp_path: Path) -> None:
    text = (kits / "hospital-a" / "local" / "histoflare.toml").read_text()
    path = tmp_path / "histoflare.toml"
    path.write_text(text.replace("# manifest =", "manifest =").replace("# bags =", "bags ="))
    site = read_site_file(path)
    assert (site.files["manifest"], site.files["bags"], site.records) == tuple(
        tmp_path / name for name in ("manifest.csv", "bags", "records")
    )


def test_the_server_keeps_its_jobs_in_its_kit_and_takes_no_code(kits: Path) -> None:
    local = kits / "server.consortium.example" / "local"
    resources = read(local / "resources.json.default")
    assert "/tmp" not in json.dumps(resources)
    assert resources["class_allow_list"] == list(ALLOWED_CLASSES)
    authorizer = FLAuthorizer("consortium", read(local / "authorization.json.default"))
    lead = Person("x", "consortium", "project_admin")
    allowed = {
        right: authorizer.authorize(AuthzContext(right, lead, lead))[0]
        for right in ("byoc", "cat", "sys_info")
    }
    assert allowed == {"byoc": False, "cat": True, "sys_info": True}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["1", "4194304"]),
        ({"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}, ["2", "65536"]),
    ],
)
def test_a_kit_s_processes_give_back_what_a_round_took(
    kits: Path, environment: dict[str, str], expected: list[str]
) -> None:
    scripts = sorted(kits.glob("*/startup/sub_start.sh"))
    assert len(scripts) > 1
    for script in scripts:
        lines = [line for line in script.read_text().splitlines() if line.startswith("export MALLOC_")]
        shown = [*lines, "echo $MALLOC_ARENA_MAX $MALLOC_MMAP_THRESHOLD_"]
        done = subprocess.run(
            ["sh", "-c", "\n".join(shown)], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.split() == expected


class TestScripts:
    """What a process of a kit can import: the environment's, nothing of the kit or the current folder."""

    def start(self, script: Path, cwd: Path, **environment: str) -> dict[str, Any]:
        """Run a script with a Python in its place that says what it would import from."""
        programs = cwd.parent / "programs"
        programs.mkdir()
        say = "import json, os, sys; print(json.dumps([sys.path, os.environ.get('PYTHONPATH')]))"
        python = programs / "python3"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{say}" "$@"\n')
        python.chmod(0o755)
        done = subprocess.run(
            ["bash", str(script), "--once"],
            cwd=cwd,
            env={"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(cwd), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        path, variable = json.loads(done.stdout.splitlines()[-1])
        return {"path": path, "PYTHONPATH": variable}

    @pytest.mark.parametrize(
        ("variable", "expected"),
        [
            (None, None),
            ("", None),
            (":", None),
            (".:x:../y", None),
            ("/opt/a::/opt/b:", "/opt/a:/opt/b"),
            ("/opt/with blank", "/opt/with blank"),
        ],
    )
    @pytest.mark.parametrize("kit", ["hospital-a", SERVER, "lead@consortium.example"])
    def test_never_from_the_current_folder(
        self, kits: Path, tmp_path: Path, kit: str, variable: str | None, expected: str | None
    ) -> None:
        copy = shutil.copytree(kits / kit, tmp_path / "kit")
        script = "fl_admin.sh" if kit.startswith("lead") else "sub_start.sh"
        environment = {} if variable is None else {"PYTHONPATH": variable}
        (tmp_path / "here").mkdir()
        said = self.start(copy / "startup" / script, tmp_path / "here", **environment)
        assert said["PYTHONPATH"] == expected
        assert not {"", ".", str(copy), str(tmp_path / "here")} & set(said["path"])

    def test_the_console_of_an_administrator_is_pinned(self, kits: Path, tmp_path: Path) -> None:
        """FLARE's own would look for code to run below the kit, where downloads lie."""
        scripts = sorted(kits.glob("*/startup/fl_admin.sh"))
        assert len(scripts) == 6
        for script in scripts:
            text = script.read_text()
            assert "-m histoflare.flare.admin_console " in text and "nvflare.fuel" not in text


@pytest.mark.parametrize("kit", ["hospital-a", SERVER])
def test_loaders_are_closed_before_anything_else_is_built(kits: Path, kit: str) -> None:
    components = read(kits / kit / "local" / "resources.json.default")["components"]
    assert components[0]["path"] == "histoflare.flare.loaders.ClosedLoaders"


def test_a_property_fills_in_the_site_file(tmp_path: Path) -> None:
    given = {"manifest": "/data/m.csv", "bags": "/data/bags", "prepare": True, "pseudonym": "north"}
    site = site_configuration("hospital-a", given)
    assert (site.files["manifest"], site.files["bags"], site.prepare, site.pseudonym) == (
        Path("/data/m.csv"),
        Path("/data/bags"),
        True,
        "north",
    )


@pytest.mark.parametrize("settings", ["/data", {"manifests": "/data/m.csv"}])
def test_a_property_that_is_no_site_file_is_refused(settings: Any) -> None:
    with pytest.raises(JobError) as caught:
        site_configuration("hospital-a", settings)
    assert caught.value.reason == "SITE_NOT_CONFIGURED"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nvflare", "provision", "-p", "there/project.yml"],
        ["nvflare", "provision", "--project-file=there/project.yml"],
        ["nvflare", "poc", "prepare", "-i", "there/project.yml", "--force"],
    ],
)
def test_relative_paths_start_at_the_project_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert project_folder(arguments) == tmp_path / "there"
    assert project_folder(["pytest"]) == tmp_path


@pytest.mark.parametrize(
    ("policies", "protocol", "scope", "reason"),
    [
        (["missing.toml"], "jobs/mem_fedavg", "open", "POLICY_INVALID"),
        (["provisioning/policies/open.toml"], "jobs/mem_fedavg", "closed", "POLICY_INVALID"),
        (["provisioning/policies/open.toml"], "missing.json", "open", "PROTOCOL_MISSING"),
        (["provisioning/policies/open.toml"], "jobs/mem_fedavg/meta.json", "open", "PROTOCOL_INVALID"),
    ],
)
def test_a_builder_without_its_files_makes_nothing(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    policies: list[str],
    protocol: str,
    scope: str,
    reason: str,
) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(JobError) as caught:
        SitePolicyBuilder(policies, protocol, default_scope=scope)
    assert caught.value.reason == reason


def test_trust_picks_the_scope_of_a_job_that_names_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    files = {
        scope: f"provisioning/policies/{scope}.toml" for scope in ("open", "dp-patient", "trusted-server")
    }
    everything = list(files.values())

    def scope(policies: list[str], **arguments: Any) -> str:
        return SitePolicyBuilder(policies, "jobs/mem_dpsgd", **arguments).default_scope

    assert scope(everything) == scope(everything, trust="untrusted") == "dp-patient"
    assert scope(everything, trust="trusted") == "trusted-server"
    assert scope(everything, trust="trusted", default_scope="open") == "open"
    assert scope([files["open"]]) == "open", "there is no other"
    with raises_reason("POLICY_INVALID", "'trusted-server'", "open, dp-patient"):
        scope([files["open"], files["dp-patient"]], trust="trusted")
    with raises_reason("POLICY_INVALID", "untrusted, trusted", "'some'"):
        scope(everything, trust="some")


def test_a_missing_policy_ends_the_command(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "provisioning", tmp_path / "provisioning")
    (tmp_path / "provisioning" / "policies" / "dp-update.toml").unlink()
    done = provision(tmp_path / "provisioning" / "project.yml", tmp_path, tmp_path)
    assert done.returncode != 0
    assert "policies/dp-update.toml: not found" in done.stdout + done.stderr


def test_one_workstation_has_the_builders_of_production(repository: Path) -> None:
    project = yaml.safe_load((repository / "provisioning" / "project.yml").read_text())
    made = _project(Agreement(repository / "jobs" / "mem_fedavg"))
    assert [part["path"] for part in made["builders"]] == [part["path"] for part in project["builders"]]


def test_on_one_workstation_the_server_listens_on_loopback_whosever_project_it_is(
    repository: Path, tmp_path: Path
) -> None:
    job = repository / "jobs" / "mem_fedavg"
    for agreement in (Agreement(job), Agreement(job, project=repository / "provisioning" / "project.yml")):
        content, _, _ = plan_project(tmp_path, {}, agreement, 8002)
        (arguments,) = [
            part["args"] for part in content["builders"] if part["path"].endswith("PolicyBuilder")
        ]
        assert arguments["loopback"] is True


class TestNames:
    """What a certificate can hold, and what a folder can be called."""

    def test_up_to_64_letters(self) -> None:
        check_names([("a" * 64, "b" * 64), ("lead@x.example", "c")])

    @pytest.mark.parametrize(
        "participants",
        [
            [("a" * 65, "b")],
            [("a", "b" * 65)],
            [("a" * 50 + "@consortium.example", "b")],
            [("clinic", "b"), ("Clinic", "b")],
        ],
    )
    def test_others_are_refused_with_one_line(self, participants: list[tuple[str, str]]) -> None:
        with pytest.raises(JobError) as caught:
            check_names(participants)
        assert participants[0][0] in str(caught.value) or participants[0][1] in str(caught.value)
        assert "\n" not in str(caught.value)
