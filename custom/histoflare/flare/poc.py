"""A federation on one workstation, of the processes a provisioned one has: one server, one client per site.

The kits are made by FLARE from the same builders as production's, so that the sites keep their policies here
too. It is for trying out: all sites belong to one user on one machine.

    with Federation.prepare(workspace, sites, Agreement(protocol=job)) as federation:
        federation.start()
        job_id = federation.admin.submit(job)
        federation.follow(job_id)
        result = federation.admin.download(job_id, target)

Everything it makes is below its workspace; the user's ~/.nvflare is neither read nor written.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.admin import LOST_SECONDS, STATUS_SECONDS, WEEK_SECONDS, Admin
from histoflare.flare.kits import Agreement, Kits, kit_environment, make_kits, plan_project
from histoflare.flare.result import read_rounds
from histoflare.site.configuration import SiteConfiguration
from histoflare.storage import write_json

STATE_FILE = "federation.json"
COMPLETED = "FINISHED:COMPLETED"

NO_LOGIN = "RuntimeError: Login failed."
"""In the log of a site whose first message the server has lost."""
REGISTER_SECONDS = 120.0
SHUT_DOWN_SECONDS = 10.0
POLL_SECONDS = 0.3


class Federation:
    """One federation; use it in a ``with`` block, which ends all of it however the block is left.

    Make one with :meth:`prepare`, or find one that another process has left up with :meth:`open`.

    Attributes:
        workspace: Folder of all it makes. kits: The startup kits. admin: The lead's connection to the server.
    """

    def __init__(self, workspace: Path, kits: Kits) -> None:
        self.workspace = workspace
        self.kits = kits
        self.admin = Admin(kits.lead, kits.kit(kits.lead))
        self._own_kits = _kits_below(workspace, kits)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._signals = ExitStack()

    @classmethod
    def prepare(
        cls, workspace: Path, sites: Mapping[str, SiteConfiguration], agreement: Agreement
    ) -> Federation:
        """Make the kits, with a free port for the server; an earlier federation's there are replaced.

        Raises:
            HistoflareError: A federation is running there (FEDERATION_RUNNING), or FLARE cannot make the
                kits (FEDERATION_FAILED).
        """
        workspace = workspace.resolve()
        refuse_running(workspace)
        plan_project(workspace, sites, agreement, port=0)  # what is wrong is said before anything is lost
        workspace.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(workspace / "logs", ignore_errors=True)
        kits = make_kits(workspace, sites, agreement)
        write_json(workspace / STATE_FILE, asdict(kits))
        return cls(workspace, kits)

    @classmethod
    def open(cls, workspace: Path) -> Federation:
        """Find the federation of a workspace, running or not.

        Raises:
            HistoflareError: There is none (FEDERATION_STOPPED).
        """
        kits = _read_state(workspace)
        if kits is None:
            raise HistoflareError(
                f"{workspace}: no federation there, or it was stopped; 'histoflare poc start' starts one.",
                reason="FEDERATION_STOPPED",
            )
        return cls(workspace.resolve(), kits)

    def __enter__(self) -> Federation:
        self._signals.enter_context(processes.ended_by_signals())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._signals.close()

    def log(self, participant: str) -> Path:
        """Return the file with all that a participant's process printed."""
        return self.workspace / "logs" / f"{participant}.txt"

    def up(self) -> set[str]:
        """Return the participants whose process lives: the server, sites."""
        kits = {str(self.kits.kit(name)): name for name in (self.kits.server, *self.kits.sites)}
        found = set()
        for process in processes.find(self.kits.name, self._own_kits):
            with suppress(processes.Gone):
                command = process.cmdline()
                if any(part.endswith((".server_train", ".client_train")) for part in command):
                    found |= {kits[part] for part in command if part in kits}
        return found

    def start(
        self,
        *,
        detached: bool = False,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = REGISTER_SECONDS,
    ) -> None:
        """Start the server and all sites, and wait until the sites are registered with it.

        Args:
            detached: True: they go on when this process ends. False: they die with the thread that called
                this, even if it is killed.
            environment: Variables that the processes get besides this one's.
            timeout_s: Seconds until all must be registered.

        Raises:
            HistoflareError: It runs already (FEDERATION_RUNNING), somebody else has its port (PORT_TAKEN), or
                a process ended or did not register in time (FEDERATION_FAILED). All are ended then.
        """
        refuse_running(self.workspace)
        if processes.port_is_taken(self.kits.port):
            raise self._port_taken()
        with processes.ended_by_signals():
            try:
                for participant in (self.kits.server, *self.kits.sites):
                    self.start_one(participant, detached=detached, environment=environment)
                again = partial(self.start_one, detached=detached, environment=environment)
                self._await_registration(timeout_s, again)
            except BaseException:
                self.stop()
                raise

    def start_one(
        self, participant: str, *, detached: bool = False, environment: Mapping[str, str] | None = None
    ) -> int:
        """Start the server or one site with its kit's own script, and return its process id.

        Waits for nothing. The script does not start again what has ended (FLARE's ``--once``).
        """
        kit = self.kits.kit(participant)
        self._started[participant] = processes.start(
            ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
            self.log(participant),
            kit_environment() | dict(environment or {}),
            kit,
            federation=self.kits.name,
            detached=detached,
        )
        return self._started[participant].pid

    def pid(self, participant: str) -> int:
        """Return the process id of a participant that this process has started."""
        return self._started[participant].pid

    def rounds(self, job_id: str) -> list[dict[str, Any]]:
        """Return the rows of a running job's rounds so far (``flare.record``); none before its first."""
        with suppress(OSError, ValueError):
            return read_rounds(self.kits.kit(self.kits.server) / job_id)
        return []

    def follow(
        self,
        job_id: str,
        on_progress: Callable[[list[dict[str, Any]]], None] | None = None,
        timeout_s: float = WEEK_SECONDS,
    ) -> str:
        """Wait for the end of a job and return its status, e.g. :data:`COMPLETED`.

        Args:
            on_progress: Called with the rows of the rounds whenever they have changed.
            timeout_s: Seconds after which it is given up; the job is not aborted.

        Raises:
            HistoflareError: The server has ended or no longer answers (FEDERATION_STOPPED), or the time is
                over (FEDERATION_FAILED).
        """
        asked = answered = time.monotonic()
        until = asked + timeout_s
        seen: list[dict[str, Any]] = []
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            rows = self.rounds(job_id)
            if rows and rows != seen:
                seen = rows
                if on_progress is not None:
                    on_progress(rows)
            if time.monotonic() - asked < STATUS_SECONDS:
                continue
            asked = time.monotonic()
            self._require_server()
            try:
                status = self.admin.status(job_id)
            except HistoflareError:
                if time.monotonic() - answered > LOST_SECONDS:
                    raise
                continue
            answered = time.monotonic()
            if status.startswith("FINISHED"):
                return status
        raise HistoflareError(
            f"The job {job_id} has not ended after {timeout_s:.0f} s.", reason="FEDERATION_FAILED"
        )

    def stop(self) -> None:
        """End everything: the lead's shutdown first, then SIGTERM, then SIGKILL.

        Signals are held back meanwhile (some seconds). Kits, logs and jobs stay.

        Raises:
            HistoflareError: A process cannot be ended (FEDERATION_RUNNING).
        """
        with processes.undisturbed():
            if processes.find(self.kits.name, self._own_kits):
                self._shut_down()
            self.admin.disconnect()
            processes.end(self.kits.name, kits=self._own_kits)
            for process in self._started.values():
                process.wait()
            self._started.clear()
            with suppress(HistoflareError):
                if _read_state(self.workspace) == self.kits:
                    (self.workspace / STATE_FILE).unlink(missing_ok=True)

    def _shut_down(self) -> None:
        try:
            self.admin.shut_down()
        except HistoflareError:
            return  # signals are next
        until = time.monotonic() + SHUT_DOWN_SECONDS
        while processes.find(self.kits.name, self._own_kits) and time.monotonic() < until:
            for process in self._started.values():
                process.poll()
            time.sleep(POLL_SECONDS)

    def _await_registration(self, timeout_s: float, again: Callable[[str], object] | None = None) -> None:
        """Wait until all sites are registered.

        Args:
            timeout_s: Seconds; as many more once a site was started again.
            again: Starts a site that could not log in once more. FLARE's server loses the first message of
                a connection that it has not noted yet, which happens on a busy machine; the site's process
                then ends after half a minute, and in production its script starts the next.
        """
        until, twice = time.monotonic() + timeout_s, set[str]()
        known: list[str] = []
        while time.monotonic() < until:
            for participant, process in list(self._started.items()):
                if process.poll() is None:
                    continue
                lost = participant not in twice and NO_LOGIN in processes.tail(self.log(participant))
                if again is None or not lost:
                    raise self._ended(participant, process.returncode)
                twice.add(participant)
                again(participant)
                until = time.monotonic() + timeout_s
            with suppress(HistoflareError):
                known = self.admin.registered()
            if set(self.kits.sites) <= set(known):
                return
            time.sleep(POLL_SECONDS)
        late = sorted(set(self.kits.sites) - set(known))
        raise HistoflareError(
            f"Not registered after {timeout_s:.0f} s: {', '.join(late)}. The last lines of the log of "
            f"{late[0]}:\n{processes.tail(self.log(late[0]))}",
            reason="FEDERATION_FAILED",
        )

    def _ended(self, participant: str, code: int) -> HistoflareError:
        if participant == self.kits.server and processes.port_is_taken(self.kits.port):
            return self._port_taken()
        return HistoflareError(
            f"{participant} ended at its start (exit code {code}). The last lines of its log:\n"
            f"{processes.tail(self.log(participant))}",
            reason="FEDERATION_FAILED",
        )

    def _port_taken(self) -> HistoflareError:
        return HistoflareError(
            f"The port {self.kits.port} was free when the federation was prepared; now somebody else has it. "
            "Run the command again: it takes another.",
            reason="PORT_TAKEN",
        )

    def _require_server(self) -> None:
        if self.kits.server not in self.up():
            raise HistoflareError(
                "The server has ended. The last lines of its log:\n"
                f"{processes.tail(self.log(self.kits.server))}",
                reason="FEDERATION_STOPPED",
            )


def refuse_running(workspace: Path) -> None:
    """Raise :class:`HistoflareError` (FEDERATION_RUNNING) if a federation runs in ``workspace``."""
    kits = _read_state(workspace)
    if kits is not None and processes.find(kits.name, _kits_below(workspace, kits)):
        raise HistoflareError(
            f"A federation is running in {workspace}. Stop it first: "
            + shlex.join(["histoflare", "poc", "stop", "--workspace", str(workspace)]),
            reason="FEDERATION_RUNNING",
        )


def _kits_below(workspace: Path, kits: Kits) -> str:
    """Return the folder of the kits; "" if it is not below the workspace, as in a copy of another one."""
    return kits.folder if Path(kits.folder).is_relative_to(workspace.resolve()) else ""


def _read_state(workspace: Path) -> Kits | None:
    path = workspace / STATE_FILE
    try:
        content = json.loads(path.read_text())
        kits = Kits(**{**content, "sites": tuple(content["sites"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(path) from None
    texts = (kits.name, kits.folder, kits.server, kits.lead, *kits.sites)
    if not all(isinstance(text, str) and text for text in texts) or not (
        type(kits.port) is int and isinstance(content["sites"], list)
    ):
        raise _damaged(path)
    return kits


def _damaged(path: Path) -> HistoflareError:
    return HistoflareError(
        f"{path}: damaged. It says which federation this is. If its processes still run "
        "(ps aux | grep nvflare), end them; then remove the file.",
        reason="FEDERATION_FAILED",
    )
