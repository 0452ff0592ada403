"""Hostile jobs and a changed server in real processes: provisioned kits, TLS both ways, one federation.

The attacker holds the lead's kit (whatever bytes it submits) and the server (whatever messages it sends, see
``hostile/sitecustomize.py``). What happens here:

- every archive of ``hostile/archives.py`` is deployed to both sites by a raw message;
- every tenth one of the same table is submitted, in a job folder, over the lead's own connection;
- a job whose texts look like references, and one whose tasks the server calls by other names;
- raw commands and raw messages to the sites' processes, those of a running job among them;
- objects that FLARE's serializer would make something of (``hostile/objects.py``), in messages of all kinds
  and in tasks.

Server and clients are started in a folder in which modules and configurations lie (``test_strays``).

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
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
from nvflare.apis.fl_constant import ReservedTopic
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.fuel.hci.client import file_transfer
from nvflare.private.admin_defs import MsgHeader, ReturnCode
from nvflare.private.defs import RequestHeader, SysCommandTopic, TrainingTopic

from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement, Kits, kit_environment
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.site.configuration import read_site_file
from histoflare.site.ledgers import open_ledger
from histoflare.storage import write_json

from .bags_on_disk import write_site
from .hostile.archives import Around, Pack, falsely_signed, honest, hostile, inert, other_versions
from .hostile.objects import MAIN, PLANTED, objects, raw_messages, section, too_large
from .test_strays import MODULES, plant

pytestmark = [pytest.mark.flare, pytest.mark.slow]

CHANGED = Path(__file__).parent / "hostile"
TAP = Path(__file__).parent / "tap"
SITES = ("clinic-a", "clinic-b")
MOST_MORE_BYTES = 300 << 20
PATH = "the kit's path"
EACH = 10
"""Of the archives, every tenth is submitted: each takes a connection. All of them are deployed."""
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


JOB = str(uuid.UUID(int=7))
IN_TASKS = (
    *("a planted class", "a planted enumeration", "a planted decomposer of FLARE's list", "a program"),
    *("a file", "a workspace", "any attributes", "a message's class", "many values"),
)
"""What the first tasks of a job have in their cookies, which go back with the answer."""

MORE_FILES = (" more", "link")
"""What is in the names of archives that bring more than a job has."""


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
        found: list[psutil.Process] = []
        looks = 0
        while not self._ended.wait(0.2):
            if looks % 5 == 0:  # to look through all processes of the machine takes a while
                found = processes.find(self._federation)
            looks += 1
            for process in found:
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
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    built_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    job_ids: dict[str, str] = field(default_factory=dict)
    pids: list[dict[str, int]] = field(default_factory=list)
    left: dict[str, set[str]] = field(default_factory=dict)
    usual: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def marks(self) -> Path:
        """Folder in which code that ran leaves a mark."""
        return self.folder / "marks"

    @property
    def datums(self) -> Path:
        """Folder for what FLARE takes for files of messages."""
        return self.folder / "datums"

    @property
    def earlier(self) -> Path:
        """A kit of the first site as it was before kits were issued again."""
        return self.folder / "earlier"

    def start(self, participant: str) -> None:
        """Start a process of the federation in a folder of the attacker's."""
        start_in(self.federation, participant, self.folder / "around", environment_of(self, participant))

    def start_refused(self, site: str) -> tuple[int, str]:
        """Start a client, and return its exit code and what it said."""
        before = self.federation.log(site).stat().st_size
        self.start(site)
        code = self.federation._started[site].wait(60)
        return code, self.federation.log(site).read_text()[before:]

    def note_pids(self) -> None:
        self.pids.append({who: self.federation.pid(who) for who in self.federation.up()})

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

    def deploy(self, archives: dict[str, Any], as_job: str | None = None) -> dict[str, dict[str, Any]]:
        """Have the server deploy applications, each as a job of its own or as one; return what sites say."""
        messages = []
        for body in archives.values():
            job_id = as_job or str(uuid.uuid4())
            meta = {"name": "job", "scope": "open", "min_clients": 1, "deploy_map": {}, "job_id": job_id}
            headers = {
                RequestHeader.JOB_ID: job_id,
                RequestHeader.JOB_META: meta,
                RequestHeader.APP_NAME: "app",
            }
            messages.append(("admin", TrainingTopic.DEPLOY, headers, body))
        return dict(zip(archives, self.order(messages), strict=True))

    def burst(self, messages: dict[str, tuple[Any, ...]]) -> None:
        """Have the server send messages at once; keep of each what was answered, if anything was."""
        (answers,) = self.order([("burst", list(messages.values()))])
        self.objects |= dict(zip(messages, answers, strict=True))

    def await_answers(self) -> None:
        """Wait until every site answers a command again."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            (said,) = self.order([("burst", [("admin", TrainingTopic.CHECK_STATUS, {}, "")])])
            if all(said[0].get(site) for site in SITES):
                return
        raise AssertionError("a site does not answer any more")

    def notes(self, site: str) -> Path:
        """Return a file in a site's kit with a secret in it."""
        return self.federation.kits.kit(site) / "local" / "records" / "notes.txt"

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
        job_id = self.job_ids[name] = self.federation.admin.submit(job)
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
        said = repr((self.deployed, self.versions, self.taken, self.submitted, self.commands, self.objects))
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


def with_objects(made: Attack) -> dict[str, tuple[Any, ...]]:
    """Return name → a message with an object in it that no message needs: in every part of a command."""
    found: dict[str, tuple[Any, ...]] = {}
    job_id = str(uuid.uuid4())
    for what, each in objects(made.notes(SITES[0]), made.federation.kits.kit(SITES[0])).items():
        names = {RequestHeader.JOB_ID: job_id, RequestHeader.APP_NAME: "app"}
        meta = {RequestHeader.JOB_META: {"job_id": job_id, "name": each}}
        found[f"{what}, deployed"] = ("admin", TrainingTopic.DEPLOY, {**names, **meta}, each)
        found[f"{what}, started"] = ("admin", TrainingTopic.START_JOB, {**names, **meta}, "")
        found[f"{what}, in a header"] = ("admin", TrainingTopic.CHECK_STATUS, {"x": each}, "")
        for site in SITES:
            found[f"{what}, to {site}"] = ("cell", site, "admin", "x", each)
            found[f"{what}, to {site} elsewhere"] = ("cell", site, "aux_communication", "x", each)
    return found


def raw(target: str, channel: str) -> dict[str, tuple[Any, ...]]:
    """Return name → bytes for a process of a site, as they are."""
    encoded = {MessageHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
    return {
        f"{what}, {target}": ("cell", target, channel, "x", content, encoded)
        for what, content in raw_messages(Path("/")).items()
    }


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Attack]:
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("tap", "orders", "results", "marks", *(f"tmp-{who}" for who in ("server", *SITES))):
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
    around, modules = made.folder / "around", made.folder / "modules"
    plant(around, made.marks, *MODULES)
    for name in PLANTED:
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_bytes(made.around.code())
    _issue_again(made)
    for participant in ("server", *SITES):
        if participant in SITES:
            made.notes(participant).parent.mkdir(exist_ok=True)
            made.notes(participant).write_text(secret("records", participant))
        made.start(participant)
    made.federation._await_registration(60.0)


def environment_of(made: Attack, participant: str) -> dict[str, str]:
    own = {"TMPDIR": str(made.folder / f"tmp-{participant}"), "NVFLARE_DATUM_DIR": str(made.datums)}
    if participant in SITES:
        modules = os.pathsep.join(("", "around", str(made.folder / "modules"), ".", ""))
        return own | {"PLANTED": secret("environment", participant), "PYTHONPATH": modules}
    changed = {"PYTHONPATH": os.pathsep.join(map(str, (CHANGED, TAP))), "WIRE_TAP": str(made.folder / "tap")}
    return own | changed | {"ORDERS": str(made.folder / "orders")}


def _issue_again(made: Attack) -> None:
    """Have the consortium issue its kits once more; the first site takes the new one and keeps the other."""
    run, kit = made.federation.workspace, made.federation.kits.kit(SITES[0])
    flare = [sys.executable, "-P", "-m", "nvflare.cli", "provision"]
    done = subprocess.run(
        [*flare, "-p", str(run / "project.yml"), "-w", str(run / "kits"), "--force"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=kit_environment() | {"HOME": str(run / "home")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kit.rename(made.earlier)
    shutil.move(kit.parent.with_name("prod_01") / kit.name, kit)
    for name in ("local/histoflare.toml", "startup/fed_client.json"):  # the server is on this machine
        shutil.copyfile(made.earlier / name, kit / name)
    _take_unsigned_jobs(made.federation.kits, SITES[0])


def start_in(federation: Federation, participant: str, folder: Path, environment: dict[str, str]) -> None:
    """Start a process of a federation as ``Federation.start_one`` does, in another folder."""
    federation._started[participant] = processes.start(
        ["bash", str(federation.kits.kit(participant) / "startup" / "sub_start.sh"), "--once"],
        federation.log(participant),
        kit_environment() | environment,
        folder,
        federation=federation.kits.name,
        detached=True,  # by the kit's script alone
    )


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
    made.note_pids()
    made.burst(with_objects(made))
    for site in SITES:
        made.burst(raw(site, "admin"))
    made.await_answers()
    made.note_pids()
    done("objects")
    made.left = {who: paths - before[who] for who, paths in made.files().items()}
    made.taken = made.deploy(inert(good, made.around, Pack()))
    done("jobs that mean nothing")
    _replace_tasks(made, job)
    done("jobs that sites refuse while they run")
    _build_on_earlier_jobs(made, good)
    _restart(made, memory)
    done("clients that are started again")
    made.run("after", job)
    done("an honest job again")
    made.most = memory.most()


def _build_on_earlier_jobs(made: Attack, good: dict[str, bytes]) -> None:
    """Deploy archives as jobs that were here before: one that ran, one that was taken and never started."""
    (taken,) = made.deploy({"first": Pack()(good)}, JOB).values()
    assert taken[SITES[0]][0][MsgHeader.RETURN_CODE] == ReturnCode.OK
    before = made.files()
    for job_id in (JOB, made.job_ids["before"]):
        more = hostile(good, made.around, Pack())
        few = {name: archive for name, archive in more.items() if any(part in name for part in MORE_FILES)}
        made.built_on |= {f"{name}, {job_id}": said for name, said in made.deploy(few, job_id).items()}
    now = made.files()
    made.left |= {site: made.left[site] | (now[site] - before[site]) for site in SITES}


def _restart(made: Attack, memory: Memory) -> None:
    """Start the clients again: with an earlier kit, with another site's ledger, with files of two names.

    In each kit is what an older version would have left of a job (``test_kit_signature`` has more of it).
    """
    kits, (a, b) = made.federation.kits, SITES
    encoded = {MessageHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
    large = {f"too large, {site}": ("cell", site, "admin", "x", too_large(), encoded) for site in SITES}
    made.burst(large)  # now: the connection that it comes on is closed
    for site in SITES:
        process = made.federation._started[site]
        assert process.poll() is None, "it goes on"
        process.terminate()
        process.wait(20)
    for site, kit in ((a, made.earlier), (b, kits.kit(b))):
        old = kit / str(uuid.UUID(int=9)) / f"app_{site}"
        plant(old / "config", made.marks, "evil.py", "custom/own.py")
        (old / "config" / "link").symlink_to(made.notes(site))
    shutil.copytree(kits.kit(a) / "local" / "records", made.earlier / "local" / "records", dirs_exist_ok=True)
    kits.kit(a).rename(made.folder / "issued again")
    made.earlier.rename(kits.kit(a))
    made.start(a)
    own = kits.kit(b) / "local" / "histoflare.toml"
    kept = own.read_bytes()
    shutil.copyfile(kits.kit(a) / "local" / "histoflare.toml", own)
    made.refused["another site's ledger"] = made.start_refused(b)
    own.write_bytes(kept)
    policy, other = kits.kit(b) / "local" / "policy_open.toml", made.folder / "policy of two names"
    text = policy.read_bytes()
    other.hardlink_to(policy)
    other.write_bytes(text.replace(b"minimum_patients = 2", b"minimum_patients = 1"))
    made.refused["a file that has changed under its other name"] = made.start_refused(b)
    other.write_bytes(text)
    for path in [path for folder in ("startup", "local") for path in (kits.kit(b) / folder).iterdir()]:
        if path.is_file():
            path.chmod(0o777)
    made.start(b)
    made.await_answers()


def _replace_tasks(made: Attack, job: Path) -> None:
    """Run a job with references in its texts; then one whose tasks the server's process calls otherwise, and
    send the processes that run it whatever comes to mind."""
    references = {"purpose": REFERENCES, "least_sites": 1, "round_seconds": 60}
    made.run("references", write_variant(job, made.folder / "references" / "job", references))
    task = made.folder / "orders" / "task"
    each = objects(Path("local/records/notes.txt"), Path())  # seen from a kit: full paths are secrets
    in_tasks = [each[name] for name in IN_TASKS]
    (made.folder / "orders" / "in-task.pickle").write_bytes(pickle.dumps(in_tasks))
    for name in OTHER_TASKS:
        task.write_text(name)
        job_id = made.federation.admin.submit(job)
        until = time.monotonic() + 45
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
            made.burst(to_a_job(made, job_id))
        with suppress(HistoflareError):
            made.federation.admin.abort(job_id)
        task.unlink()


def to_a_job(made: Attack, job_id: str) -> dict[str, tuple[Any, ...]]:
    """Return name → a message for a job's processes with an object in it that no message needs."""
    found: dict[str, tuple[Any, ...]] = {}
    channel, topic = "aux_communication", ReservedTopic.END_RUN
    for site in SITES:
        target = f"{site}.{job_id}"
        found |= raw(target, channel)
        for what, each in objects(made.notes(site), made.federation.kits.kit(site)).items():
            found[f"{what}, to a job of {site}"] = ("cell", target, channel, "x", each)
            encoded = {StreamHeaderKey.PAYLOAD_ENCODING: Encoding.FOBS}
            content = section(MAIN, msgpack.packb(each))
            found[f"{what}, streamed to a job of {site}"] = (
                "stream",
                target,
                channel,
                topic,
                content,
                encoded,
            )
    return found


def test_a_task_that_is_none_of_the_job_is_refused_with_a_code(attack: Attack) -> None:
    for name, code in OTHER_TASKS.items():
        assert attack.codes(name), name
        assert all(codes == {code} for codes in attack.codes(name).values()), (name, attack.codes(name))


def test_a_task_with_an_object_is_asked_for_again(attack: Attack) -> None:
    """And not one byte of it is used: the one after all of them is answered."""
    for site in SITES:
        assert attack.federation.log(site).read_text().count("Failed to get_task") >= len(IN_TASKS)
    assert attack.codes("nonsense"), "who answers first ends the job"


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


def test_no_job_builds_on_another(attack: Attack) -> None:
    assert len(attack.built_on) > 20
    for name, said in attack.built_on.items():
        assert {body.removeprefix("NVFLARE_ERROR: ") for _, body in said.values()} == {"JOB_INVALID"}, name


def test_a_kit_that_is_not_the_site_s_own_is_not_started(attack: Attack) -> None:
    """It ends before it calls the server."""
    reasons = {"another site's ledger": "LEDGER_FOREIGN"}
    reasons["a file that has changed under its other name"] = "KIT_CHANGED"
    assert {name: code for name, (code, _) in attack.refused.items()} == dict.fromkeys(reasons, 1)
    for name, reason in reasons.items():
        assert f"{reason}: " in attack.refused[name][1] and "Traceback" not in attack.refused[name][1], name


def test_an_earlier_kit_goes_on_with_the_same_ledger(attack: Attack) -> None:
    for site in SITES:
        file = attack.federation.kits.kit(site) / "local" / "histoflare.toml"
        disclosures = open_ledger(read_site_file(file, site)).disclosures()
        runs = [(each.run, each.times) for each in disclosures if each.run in attack.job_ids.values()]
        assert runs == [(attack.job_ids[name], 1) for name in ("before", "after")]


def test_what_earlier_jobs_left_is_gone(attack: Attack) -> None:
    for site in SITES:
        left = attack.federation.kits.kit(site) / str(uuid.UUID(int=9))
        assert list(left.iterdir()) == []
        assert attack.notes(site).exists()


FIXED = ("JOB_INVALID", "NVFLARE_ERROR: JOB_INVALID", "ERROR", "OK", "None")


def test_of_an_object_nobody_says_anything(attack: Attack) -> None:
    """A message that is not understood has no answer; of what can be read, the fixed ones."""
    assert len(attack.objects) > 300
    for name, said in attack.objects.items():
        for who, answer in said.items():
            if answer is None or who == "the server's own":
                continue
            headers, body = answer
            assert body in FIXED or json.loads(body)["running_jobs"] is not None, (name, said)
            assert not headers.get(MessageHeaderKey.ERROR), (name, said)


def test_nor_is_any_made_or_kept(attack: Attack) -> None:
    assert not attack.datums.exists()
    assert attack.pids[0] == attack.pids[1] and set(attack.pids[0]) == {"server", *SITES}


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
    assert [path.read_text() for path in attack.marks.iterdir()] == []
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
