"""A federation of real FLARE processes on this machine: up, at work, and gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, STATE_FILE, Federation
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import on_workstation, open_ledger
from histoflare.site.site_file import read_site_file
from tests.refusals import raises_reason

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b")
AWKWARD = """x/../it's "the" Zürich kit #1 $HOME"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with a FLARE configuration that nobody may touch."""
    folder = tmp_path / "home"
    (folder / ".nvflare").mkdir(parents=True)
    (folder / ".nvflare" / "config.conf").write_text("version = 2\n")
    monkeypatch.setenv("HOME", str(folder))
    before = content_of(folder)
    yield folder
    assert content_of(folder) == before, "the user's home is left alone"


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, SiteConfiguration]:
    return {site: write_site(tmp_path / "sites", site) for site in SITES}


@pytest.fixture
def agreement(repository: Path) -> Agreement:
    return Agreement(repository / "jobs" / "mem_fedavg")


def gone(name: str, seconds: float = 0.0) -> bool:
    until = time.monotonic() + seconds
    while processes.find(name):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_a_job_from_its_submission_to_its_result(
    repository: Path, tmp_path: Path, sites: dict[str, SiteConfiguration], home: Path
) -> None:
    """The workspace's path has what FLARE's own command lines would split."""
    job = write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "job", {"rounds": 2})
    files = content_of(job)
    seen: list[int] = []
    with Federation.prepare(tmp_path / AWKWARD, sites, Agreement(job)) as federation:
        name = federation.kits.name
        for site, configuration in sites.items():
            written = read_site_file(federation.kits.kit(site) / "local" / "histoflare.toml")
            assert written == on_workstation(site, configuration)
            assert open_ledger(written).identity().owner == "workstation"
        federation.start()
        assert federation.up() == {"server", *SITES}
        assert federation.admin.registered() == sorted(SITES)
        assert listening(federation) == {"127.0.0.1"}
        job_id = federation.admin.submit(job)
        status = federation.follow(job_id, lambda rows: seen.append(len(rows)), timeout_s=180)
        assert status == COMPLETED, processes.tail(federation.log("server"), 40)
        assert [row["status"] for row in federation.admin.jobs()] == [COMPLETED]
        result = federation.admin.download(job_id, tmp_path / "result")
    rows = json.loads((result / "workspace" / "rounds.json").read_text())
    assert [row["taking_part"] for row in rows] == [list(SITES)] * 2
    assert (result / "workspace" / "global_model.safetensors").is_file()
    assert seen and seen == sorted(seen)
    assert content_of(job) == files, "FLARE signs jobs by writing into their folder"
    assert gone(name)
    (made,) = ((tmp_path / AWKWARD).resolve() / "kits").glob("*/prod_00/server/jobs")
    assert [path.name for path in made.iterdir()] == [job_id], "the jobs' results stay"


def listening(federation: Federation) -> set[str]:
    """Return the addresses on which the federation's processes listen."""
    found = set()
    for process in processes.find(federation.kits.name):
        sockets = process.net_connections(kind="inet")
        found |= {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def test_a_port_that_somebody_took_meanwhile(
    tmp_path: Path, sites: dict[str, SiteConfiguration], agreement: Agreement
) -> None:
    federation = Federation.prepare(tmp_path / "run", sites, agreement)
    with socket.socket() as other:
        other.bind(("127.0.0.1", federation.kits.port))
        other.listen()
        with pytest.raises(HistoflareError) as caught:
            federation.start()
    assert caught.value.reason == "PORT_TAKEN"
    assert str(federation.kits.port) in str(caught.value)
    assert gone(federation.kits.name)


def test_a_site_that_cannot_start_ends_the_others(
    tmp_path: Path, sites: dict[str, SiteConfiguration], agreement: Agreement
) -> None:
    federation = Federation.prepare(tmp_path / "run", sites, agreement)
    (federation.kits.kit("clinic-b") / "startup" / "fed_client.json").write_text("not JSON")
    with pytest.raises(HistoflareError) as caught:
        federation.start(timeout_s=60)
    assert caught.value.reason == "FEDERATION_FAILED"
    assert "clinic-b" in str(caught.value) and "log" in str(caught.value)
    assert gone(federation.kits.name)


def test_kits_that_flare_refuses_to_make(tmp_path: Path, agreement: Agreement) -> None:
    site = SiteConfiguration({"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"})
    with pytest.raises(HistoflareError) as caught:
        Federation.prepare(tmp_path / "run", {"no site name!": site}, agreement)
    assert caught.value.reason == "FEDERATION_FAILED"
    assert "no site name!" in str(caught.value)


def test_a_mistake_costs_no_earlier_federation(
    tmp_path: Path, sites: dict[str, SiteConfiguration], agreement: Agreement
) -> None:
    kits = tmp_path / "run" / "kits" / "jobs"
    kits.mkdir(parents=True)
    for wrong in (
        (sites, Agreement(tmp_path / "nowhere")),
        ({"server": sites["clinic-a"]}, agreement),
        ({"h.1": sites["clinic-a"]}, agreement),
        (sites, Agreement(agreement.protocol, project=tmp_path / "nowhere.yml")),
    ):
        with pytest.raises(HistoflareError):
            Federation.prepare(tmp_path / "run", *wrong)
    (tmp_path / "run" / "project.yml").write_text("name: mine\n")
    with raises_reason("FEDERATION_FAILED", tmp_path / "run" / "project.yml"):
        Federation.prepare(tmp_path / "run", sites, agreement)
    assert kits.is_dir() and [path.name for path in kits.parent.iterdir()] == ["jobs"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Federation:
    """A federation of which there are kits only; who takes its state file away puts it back."""
    folder = tmp_path_factory.mktemp("prepared")
    sites = {site: write_site(folder / "sites", site) for site in SITES}
    return Federation.prepare(folder / "run", sites, Agreement(repository / "jobs" / "mem_fedavg"))


@pytest.fixture
def state(prepared: Federation) -> Iterator[Path]:
    """Its state file, which is as it was when the test has ended."""
    path = prepared.workspace / STATE_FILE
    before = path.read_bytes()
    yield path
    path.write_bytes(before)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": null}', '{"sites": "abc"}'])
def test_a_damaged_state_is_said_and_ends_nobody(
    prepared: Federation, state: Path, sites: dict[str, SiteConfiguration], agreement: Agreement, text: str
) -> None:
    """A name of null would be that of every process that is in no federation."""
    if text.startswith('{"'):
        text = json.dumps({**json.loads(state.read_text()), **json.loads(text)})
    state.write_text(text)
    for action in (Federation.open, lambda folder: Federation.prepare(folder, sites, agreement)):
        with raises_reason("FEDERATION_FAILED", state):
            action(prepared.workspace)
    assert Path(prepared.kits.folder).is_dir()
    assert processes.find("") == []


def test_what_a_kit_s_own_script_started_is_found_and_an_editor_on_its_files_is_not(tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    commands = {
        "program": [*wait, "nvflare.private.fed.app.server.server_train", "-m", str(kits / "server")],
        "script": [*wait, str(kits / "server" / "startup" / "sub_start.sh")],
        "editor": [*wait, str(kits / "server" / "local" / "policy.toml")],
        "elsewhere": [*wait, "nvflare.private.fed.app.server.server_train", str(tmp_path / "other")],
    }
    started = {name: subprocess.Popen(command) for name, command in commands.items()}
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until and len(processes.find("none", str(kits))) < 2:
            time.sleep(0.05)
        found = {process.pid for process in processes.find("none", str(kits))}
        assert found == {started["program"].pid, started["script"].pid}
        assert processes.find("none") == []
        processes.end("none", kits=str(kits))
        ended = {name for name, process in started.items() if process.poll() is not None}
        assert ended == {"program", "script"}
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("spelling", ["link", "copy", "../run"])
def test_stopping_under_another_name_removes_no_results(
    prepared: Federation, state: Path, tmp_path: Path, spelling: str
) -> None:
    assert state.is_file()
    if spelling == "link":
        (tmp_path / "link").symlink_to(prepared.workspace)
    elif spelling == "copy":
        shutil.copytree(prepared.workspace, tmp_path / "copy")
    Federation.open(
        prepared.workspace / spelling if spelling.startswith("..") else tmp_path / spelling
    ).stop()
    assert Path(prepared.kits.folder).is_dir()


PARENT = """
import sys, time
from pathlib import Path
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import Federation
from histoflare.site.configuration import SiteConfiguration

run, job = Path(sys.argv[1]), Path(sys.argv[2])
sites = {"clinic-a": SiteConfiguration({"manifest": run / "m.csv", "bags": run / "bags"})}
with Federation.prepare(run, sites, Agreement(job)) as federation:
    federation.start()
    print("started", flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_the_process_that_started_it(repository: Path, tmp_path: Path) -> None:
    """Four federations at once, a server and a site each: one for each way to end the process."""
    job = repository / "jobs" / "mem_fedavg"
    with ExitStack() as stack:
        parents = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            command = [sys.executable, "-c", PARENT, str(tmp_path / number.name), str(job)]
            parents[number] = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(parents[number].kill)
        for number, parent in parents.items():
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"started\n", number.name
        for number, parent in parents.items():
            name = json.loads((tmp_path / number.name / STATE_FILE).read_text())["name"]
            assert len(processes.find(name)) == 2
            parent.send_signal(number)
            if number != signal.SIGKILL:
                time.sleep(1)
                parent.send_signal(number)  # an impatient user
            parent.wait(timeout=60)
            assert gone(name, seconds=10 if number == signal.SIGKILL else 0), number.name


def test_what_does_not_listen_to_sigterm_is_killed(tmp_path: Path) -> None:
    """A process, and one that it started in a session of its own and then left alone."""
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) == 1: subprocess.Popen([sys.executable, __file__, 'x'], start_new_session=True)\n"
        "else: print('ready', flush=True)\n"
        "time.sleep(600 if len(sys.argv) > 1 else 0.5)\n"
    )
    name = uuid.uuid4().hex
    script, log = tmp_path / "stubborn.py", tmp_path / "log.txt"
    script.write_text(code)
    started = processes.start(
        [sys.executable, str(script)], log, os.environ, tmp_path, federation=name, detached=True
    )
    started.wait()
    wait(lambda: "ready" in log.read_text())
    assert len(processes.find(name)) == 1
    processes.end(name, grace_s=0.5)
    assert gone(name)


def wait(done: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)
