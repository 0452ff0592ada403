"""Hostile jobs and a changed server in real processes: provisioned kits, TLS both ways, one federation.

The attacker holds the lead's kit (whatever bytes it submits) and the server (whatever messages it sends, see
``hostile/sitecustomize.py``). What happens here:

- every archive of ``hostile/archives.py`` is deployed to both sites by a raw message;
- every third one of the same table is submitted, in a job folder, over the lead's own connection;
- a job whose texts look like references, and one whose tasks the server calls by other names;
- raw commands and raw messages to the sites' processes, those of a running job among them.

Each site has secrets wherever it has something; afterwards none of them is anywhere at the server: on the
wire, in its kit with all jobs, logs and results, in its temporary files. ``test_hostile_bytes`` looks at the
same table in one process. What is planted in kits and folders by hand is in ``test_strays``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from nvflare.fuel.hci.client import file_transfer
from nvflare.private.admin_defs import MsgHeader, ReturnCode
from nvflare.private.defs import RequestHeader, SysCommandTopic, TrainingTopic

from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement, Kits
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.storage import write_json

from .bags_on_disk import write_site
from .hostile.archives import Around, Pack, falsely_signed, honest, hostile, inert, other_versions

pytestmark = [pytest.mark.flare, pytest.mark.slow]

CHANGED = Path(__file__).parent / "hostile"
TAP = Path(__file__).parent / "tap"
SITES = ("clinic-a", "clinic-b")
MOST_MORE_BYTES = 300 << 20
PATH = "the kit's path"
EACH = 3
"""Of the archives, every third is submitted: each takes a connection. All of them are deployed."""
NOT_OF_A_JOB = {"log", "logs", "audit", "audit.log", "log.txt", "log.json", "log_error.txt", "log_fl.txt"}
ROLES = ("server_train", "client_train", "runner_process", "worker_process")


REFERENCES = "{$PLANTED} ${PLANTED} {WORKSPACE} {SITE_NAME}"
OTHER_TASKS = {"nonsense": "TASK_UNKNOWN", "evaluate": "REFUSED_TASK_UNEXPECTED"}
"""Task that a training job has not → what a site answers; the first is FLARE's own word."""
RAW = (
    *(("cellnet.channel", topic) for topic in ("process_info", "config_vars", "comm_config", "bulk")),
    *(("cellnet_agent", topic) for topic in ("process_info", "config_vars", "comm_config", "peers", "echo")),
    *(
        ("aux_communication", "x"),
        ("client_command", "show_stats"),
        ("client_main", "x"),
        ("no_channel", "x"),
    ),
)
"""Channel and topic of messages that no job needs."""


def secret(what: str, site: str) -> str:
    return f"SECRET-{what}-{site}-SECRET"


class Listener:
    """An address that nobody is to call."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.2)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                self._socket.accept()[0].close()
            except OSError:
                continue
            self.calls += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


class Memory:
    """The most that a process of each kind had resident, in bytes, since the last question."""

    def __init__(self, federation: str) -> None:
        self._federation = federation
        self._most: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            for process in processes.find(self._federation):
                try:
                    command, size = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                for role in ROLES:
                    if f".{role}" in command:
                        self._most[role] = max(self._most.get(role, 0), size)

    def most(self) -> dict[str, int]:
        found, self._most = self._most, {}
        return found

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@dataclass
class Attack:
    """All that was sent, and all that came of it."""

    folder: Path
    federation: Federation
    listener: Listener
    around: Around
    statuses: dict[str, str] = field(default_factory=dict)
    deployed: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: dict[str, dict[str, Any]] = field(default_factory=dict)
    submitted: dict[str, str] = field(default_factory=dict)
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, set[str]] = field(default_factory=dict)
    usual: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def order(self, messages: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
        """Have the server send messages; return of each who answered what."""
        name = uuid.uuid4().hex
        folder = self.folder / "orders"
        part = folder / f"{name}.part"
        part.write_bytes(pickle.dumps(messages))
        part.rename(folder / f"order-{name}.pickle")
        answer = folder / f"answer-{name}.pickle"
        until = time.monotonic() + 120
        while not answer.is_file():
            assert time.monotonic() < until, "the server sends nothing"
            time.sleep(0.05)
        return pickle.loads(answer.read_bytes())

    def deploy(self, archives: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Have the server deploy applications, each as a job; return of each what the sites say."""
        messages = []
        for body in archives.values():
            job_id = str(uuid.uuid4())
            meta = {"name": "job", "scope": "open", "min_clients": 1, "deploy_map": {}, "job_id": job_id}
            headers = {
                RequestHeader.JOB_ID: job_id,
                RequestHeader.JOB_META: meta,
                RequestHeader.APP_NAME: "app",
            }
            messages.append(("admin", TrainingTopic.DEPLOY, headers, body))
        return dict(zip(archives, self.order(messages), strict=True))

    def submit(
        self, archives: dict[str, bytes], job: Path, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, str]:
        """Upload archives in place of a job folder's; return of each what the server says against it."""
        session = self.federation.admin._session
        assert session is not None
        copy = shutil.copytree(job, self.folder / "submitted" / "job")
        answers = {}
        with monkeypatch.context() as patched, redirect_stdout(StringIO()):
            for name, archive in archives.items():

                def write(root: str, folder: str, target: str, content: bytes = archive) -> None:
                    Path(target).write_bytes(content)

                patched.setattr(file_transfer, "zip_directory_to_file", write)
                try:
                    answers[name] = f"taken as {session.submit_job(str(copy))}"
                except Exception as error:
                    answers[name] = str(error)
        return answers

    def run(self, name: str, job: Path) -> None:
        job_id = self.federation.admin.submit(job)
        self.statuses[name] = self.federation.follow(job_id, timeout_s=90)
        self.federation.admin.download(job_id, self.folder / "results")

    def files(self) -> dict[str, set[str]]:
        """Return participant → every path in its kit and its folder for temporary files, logs apart."""
        found = {}
        for participant in ("server", *SITES):
            places = (self.federation.kits.kit(participant), self.folder / f"tmp-{participant}")
            found[participant] = {
                str(path) for place in places for path in place.rglob("*") if path.name not in NOT_OF_A_JOB
            }
        return found

    def codes(self, task: str) -> dict[str, set[str]]:
        """Return site → what it answered to tasks of a name, as the server's log has it."""
        found: dict[str, set[str]] = {}
        log = self.federation.log("server").read_text(errors="replace")
        for site, code in re.findall(rf"peer=([\w-]+),.*peer_rc=(\w+), task_name={task},", log):
            found.setdefault(site, set()).add(code)
        return found

    def secrets(self) -> dict[str, bytes]:
        """Return what nobody but a site knows: what is planted, and its keys."""
        found = {}
        for site in SITES:
            for what in ("folder", "name", "environment", "records"):
                found[f"{site}: {what}"] = secret(what, site).encode()
            kit = self.federation.kits.kit(site)
            found[f"{site}: {PATH}"] = str(kit).encode()
            found[f"{site}: the kit's key"] = (kit / "startup" / "client.key").read_bytes().splitlines()[5]
            (key,) = self.folder.rglob(f"{secret('folder', site)}/**/ledger.key")
            found[f"{site}: the ledger's key"] = key.read_bytes()
            found[f"{site}: the ledger's head"] = key.with_name("ledger.key.head").read_bytes().split()[1]
        return found

    def found(self, secrets: dict[str, bytes]) -> list[tuple[str, str]]:
        """Return which secrets are where at the server."""
        seen = self.seen()
        assert [place for place, all_ in seen.items() if not all_] in ([], ["temporary files"])
        return [(what, place) for what, value in secrets.items() for place in seen if value in seen[place]]

    def seen(self) -> dict[str, bytes]:
        """Return place → all that the server has there."""
        kits = self.federation.kits
        places = {
            "the wire": self.folder / "tap",
            "the server's kit": kits.kit("server"),
            "temporary files": self.folder / "tmp-server",
            "results": self.folder / "results",
        }
        found = {
            name: b"".join(path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file())
            for name, place in places.items()
        }
        said = repr((self.deployed, self.versions, self.taken, self.submitted, self.commands))
        return found | {"its log": self.federation.log("server").read_bytes(), "answers": said.encode()}


def raw_commands(job_id: str) -> dict[str, tuple[Any, ...]]:
    """Return name → a message of a changed server that is no deployment."""
    found: dict[str, tuple[Any, ...]] = {}
    topics = {
        value
        for group in (TrainingTopic, SysCommandTopic)
        for name, value in vars(group).items()
        if not name.startswith("_") and isinstance(value, str)
    }
    topics -= {TrainingTopic.SHUTDOWN, TrainingTopic.RESTART, TrainingTopic.DEPLOY}
    ids = {"none": None, "of no job": job_id, "a folder": "local", "a path": "../../etc", "a number": 5}
    for topic in sorted({*topics, "no.such.topic"}):
        for what, id_ in ids.items():
            headers = (
                {} if id_ is None else {RequestHeader.JOB_ID: id_, RequestHeader.JOB_META: {"job_id": id_}}
            )
            found[f"{topic}, job {what}"] = ("admin", topic, headers, "cat local/histoflare.toml")
    for site in SITES:
        for channel, topic in RAW:
            found[f"{site}: {channel}/{topic}"] = ("cell", site, channel, topic, {"x": "PLANTED"})
    return found


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Attack]:
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("tap", "orders", "results", *(f"tmp-{who}" for who in ("server", *SITES))):
        (folder / name).mkdir()
    job = write_variant(repository / "jobs" / "mem_fedavg", folder / "job", {"rounds": 1})
    sites = {
        site: write_site(folder / secret("folder", site), site, mark=secret("name", site)) for site in SITES
    }
    listener = Listener()
    monkeypatch = pytest.MonkeyPatch()
    with Federation.prepare(folder / "run", sites, Agreement(job)) as federation:
        bag = next(sites["clinic-a"].bags.glob("*.h5"))
        made = Attack(folder, federation, listener, Around(folder / "marker", bag, listener.url))
        memory = Memory(federation.kits.name)
        try:
            _start(made)
            _attack(made, memory, job, monkeypatch)
        finally:
            memory.end()
            listener.end()
    yield made
    assert not processes.find(federation.kits.name)


def _start(made: Attack) -> None:
    _take_unsigned_jobs(made.federation.kits, SITES[0])
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (CHANGED, TAP))),
        "WIRE_TAP": str(made.folder / "tap"),
        "ORDERS": str(made.folder / "orders"),
    }
    for participant in ("server", *SITES):
        own = {"TMPDIR": str(made.folder / f"tmp-{participant}")}
        if participant in SITES:
            own |= {"PLANTED": secret("environment", participant)}
            records = made.federation.kits.kit(participant) / "local" / "records"
            records.mkdir(exist_ok=True)
            (records / "notes.txt").write_text(secret("records", participant))
        else:
            own |= environment
        made.federation.start_one(participant, environment=own)
    made.federation._await_registration(60.0)


def _take_unsigned_jobs(kits: Kits, site: str) -> None:
    """Have a site take jobs that nobody signed: what is tested is what stands beside that check of FLARE."""
    path = kits.kit(site) / "startup" / "fed_client.json"
    write_json(path, json.loads(path.read_text()) | {"require_signed_jobs": False})
    kits.sign(site)


def _attack(made: Attack, memory: Memory, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = honest(job / CONFIG_FOLDER)
    at = time.monotonic()

    def done(step: str) -> None:
        nonlocal at
        made.seconds[step], at = time.monotonic() - at, time.monotonic()

    made.run("before", job)
    made.usual = memory.most()
    before = made.files()
    done("an honest job")
    made.deployed = made.deploy(hostile(good, made.around, Pack()) | falsely_signed(good, made.around))
    made.versions = made.deploy(other_versions(good))
    done("raw deployments")
    meta = (job / "meta.json").read_bytes()
    in_folder = Pack("job/app/", {"job/": b"", "job/meta.json": meta, "job/app/": b""})
    table = list(hostile(good, made.around, in_folder).items())
    made.submitted = made.submit(dict(table[::EACH]), job, monkeypatch)
    done("submissions")
    commands = raw_commands(str(uuid.uuid4()))
    made.commands = dict(zip(commands, made.order(list(commands.values())), strict=True))
    done("raw commands")
    made.left = {who: paths - before[who] for who, paths in made.files().items()}
    made.taken = made.deploy(inert(good, made.around, Pack()))
    done("jobs that mean nothing")
    _replace_tasks(made, job)
    done("jobs that sites refuse while they run")
    made.run("after", job)
    done("an honest job again")
    made.most = memory.most()


def _replace_tasks(made: Attack, job: Path) -> None:
    """Run a job with references in its texts; then one whose tasks the server's process calls otherwise, and
    send the processes that run it whatever comes to mind."""
    references = {"purpose": REFERENCES, "least_sites": 1, "round_seconds": 60}
    made.run("references", write_variant(job, made.folder / "references" / "job", references))
    task = made.folder / "orders" / "task"
    for name in OTHER_TASKS:
        task.write_text(name)
        job_id = made.federation.admin.submit(job)
        until = time.monotonic() + 30
        while time.monotonic() < until and not made.codes(name):
            time.sleep(0.2)
        if name == "evaluate":  # after the other one the server gives the job up
            to_jobs = {
                f"{name}, {site}: {channel}/{topic}": (
                    "cell",
                    f"{site}.{job_id}",
                    channel,
                    topic,
                    {"x": "PLANTED"},
                )
                for site in SITES
                for channel, topic in (*RAW, ("task", name), ("client_command", "check_status"))
            }
            made.commands |= dict(zip(to_jobs, made.order(list(to_jobs.values())), strict=True))
        with suppress(HistoflareError):
            made.federation.admin.abort(job_id)
        task.unlink()


def test_a_task_that_is_none_of_the_job_is_refused_with_a_code(attack: Attack) -> None:
    for name, code in OTHER_TASKS.items():
        assert attack.codes(name), name
        assert all(codes == {code} for codes in attack.codes(name).values()), (name, attack.codes(name))


def test_a_text_that_looks_like_a_reference_is_a_text(attack: Attack) -> None:
    assert attack.statuses["references"].startswith("FINISHED")
    for site in SITES:
        assert REFERENCES in attack.federation.log(site).read_text(), "it says whose purpose it refused"


def test_honest_jobs_run_before_and_after(attack: Attack) -> None:
    print(attack.seconds, attack.usual, attack.most)
    assert [attack.statuses[name] for name in ("before", "after")] == [COMPLETED, COMPLETED]


def test_every_site_says_one_code_of_every_archive(attack: Attack) -> None:
    for codes, answers in (("JOB_INVALID", attack.deployed), ("JOB_VERSION", attack.versions)):
        assert answers
        for name, said in answers.items():
            assert set(said) == set(SITES), (name, said)
            for headers, body in said.values():
                assert headers[MsgHeader.RETURN_CODE] == ReturnCode.ERROR, name
                assert body.removeprefix("NVFLARE_ERROR: ") == codes, name


def test_what_means_nothing_is_taken(attack: Attack) -> None:
    """Else the codes above say nothing of the archives. The other site wants it signed."""
    unsigned, signed = SITES
    for name, said in attack.taken.items():
        assert said[unsigned][0][MsgHeader.RETURN_CODE] == ReturnCode.OK, (name, said)
        headers, body = said[signed]
        assert (headers[MsgHeader.RETURN_CODE], body) == (ReturnCode.ERROR, "JOB_INVALID"), (name, said)


def test_the_server_takes_no_submission(attack: Attack) -> None:
    for name, said in attack.submitted.items():
        assert "JOB_INVALID: " in said, (name, said)


def test_nothing_of_a_refused_job_is_left(attack: Attack) -> None:
    assert attack.left == {who: set() for who in ("server", *SITES)}


def test_nothing_ran_and_nobody_was_called(attack: Attack) -> None:
    assert not attack.around.marker.exists()
    assert attack.listener.calls == 0


def test_no_secret_is_at_the_server(attack: Attack) -> None:
    secrets = {what: value for what, value in attack.secrets().items() if not what.endswith(PATH)}
    assert len(secrets) >= 5 * len(SITES)
    assert attack.found(secrets) == []


def test_nor_where_a_site_keeps_its_kit(attack: Attack) -> None:
    secrets = {what: value for what, value in attack.secrets().items() if what.endswith(PATH)}
    assert len(secrets) == len(SITES)
    assert attack.found(secrets) == []


@pytest.mark.parametrize("role", ROLES)
def test_memory_stays(attack: Attack, role: str) -> None:
    assert attack.most[role] < attack.usual[role] + MOST_MORE_BYTES
