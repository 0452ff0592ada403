"""An attack on one federation of real processes: means to send things, and all that came of them."""

from __future__ import annotations

import os
import pickle
import re
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.private.defs import RequestHeader, TrainingTopic

from histoflare.flare import processes
from histoflare.flare.kits import kit_environment
from histoflare.flare.poc import Federation

from .archives import Around
from .watchers import Listener

CHANGED_SERVER = Path(__file__).parent / "changed_server"
TAP = Path(__file__).parents[1] / "tap"
SITES = ("clinic-a", "clinic-b")
KIT_PATH = "the kit's path"
NOT_OF_A_JOB = {"log", "logs", "audit", "audit.log", "log.txt", "log.json", "log_error.txt", "log_fl.txt"}
"""Files that participants write of themselves, whatever is sent."""


def secret(what: str, site: str) -> str:
    return f"SECRET-{what}-{site}-SECRET"


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
    first_jobs: dict[str, str] = field(default_factory=dict)
    second_jobs: dict[str, str] = field(default_factory=dict)
    left_by_first: dict[str, str] = field(default_factory=dict)
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)
    references: str = ""
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

    def order(self, messages: dict[str, tuple[Any, ...]], timeout_s: float) -> dict[str, dict[str, Any]]:
        """Have the server send messages, several at once; return of each who answered what in that time."""
        name = uuid.uuid4().hex
        folder = self.folder / "orders"
        part = folder / f"{name}.part"
        part.write_bytes(pickle.dumps((list(messages.values()), timeout_s)))
        part.rename(folder / f"order-{name}.pickle")
        answer = folder / f"answer-{name}.pickle"
        until = time.monotonic() + 120
        while not answer.is_file():
            assert time.monotonic() < until, "the server sends nothing"
            time.sleep(0.05)
        return dict(zip(messages, pickle.loads(answer.read_bytes()), strict=True))

    def deploy(self, archives: dict[str, Any], as_job: str | None = None) -> dict[str, dict[str, Any]]:
        """Have the server deploy applications, each as a job of its own or as one; return what sites say."""
        messages = {}
        for name, body in archives.items():
            job_id = as_job or str(uuid.uuid4())
            meta = {"name": "job", "scope": "open", "min_clients": 1, "deploy_map": {}, "job_id": job_id}
            headers = {
                RequestHeader.JOB_ID: job_id,
                RequestHeader.JOB_META: meta,
                RequestHeader.APP_NAME: "app",
            }
            messages[name] = ("admin", TrainingTopic.DEPLOY, headers, body)
        return self.order(messages, 30.0)

    def send_objects(self, messages: dict[str, tuple[Any, ...]]) -> None:
        """Have the server send messages that may have no answer; keep of each what came."""
        self.objects |= self.order(messages, 2.0)

    def await_answers(self) -> None:
        """Wait until every site answers a command again."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            said = self.order({"status": ("admin", TrainingTopic.CHECK_STATUS, {}, "")}, 2.0)
            if all(said["status"].get(site) for site in SITES):
                return
        raise AssertionError("a site does not answer any more")

    def notes(self, site: str) -> Path:
        """Return a file in a site's kit with a secret in it."""
        return self.federation.kits.kit(site) / "local" / "records" / "notes.txt"

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
            found[f"{site}: {KIT_PATH}"] = str(kit).encode()
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
        answers = (self.deployed, self.versions, self.taken, self.built_on, self.commands, self.objects)
        said = repr((answers, self.submitted, self.first_jobs, self.second_jobs))
        return found | {"its log": self.federation.log("server").read_bytes(), "answers": said.encode()}


def environment_of(made: Attack, participant: str) -> dict[str, str]:
    own = {"TMPDIR": str(made.folder / f"tmp-{participant}"), "NVFLARE_DATUM_DIR": str(made.datums)}
    if participant in SITES:
        modules = os.pathsep.join(("", "around", str(made.folder / "modules"), ".", ""))
        return own | {"PLANTED": secret("environment", participant), "PYTHONPATH": modules}
    changed = {
        "PYTHONPATH": os.pathsep.join(map(str, (CHANGED_SERVER, TAP))),
        "WIRE_TAP": str(made.folder / "tap"),
    }
    return own | changed | {"ORDERS": str(made.folder / "orders")}


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
