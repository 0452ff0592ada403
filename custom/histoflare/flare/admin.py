"""What the lead does with a running federation, over FLARE's own connection for administrators."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.api_spec import TargetType
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from histoflare.errors import HistoflareError
from histoflare.flare.closed_messages import close_messages
from histoflare.flare.loaders import close_loaders

CONNECT_SECONDS = 5.0
STATUS_SECONDS = 1.0
LOST_SECONDS = 60.0
"""A server that answers no question for so long is given up."""

WEEK_SECONDS = 7 * 86400.0
"""How long a job may stand in the server's queue before nobody waits for it any more."""


class Admin:
    """An administrator's connection to the server: opened with the first question, and anew when it is lost.

    Before it connects, FLARE's loaders are closed in this process (:mod:`histoflare.flare.loaders`): FLARE
    would take code from a ``comm_config.json`` anywhere below the current folder, a downloaded job's too.

    Every question raises :class:`HistoflareError`: FLARE_CHANGED if FLARE is not the one known here,
    FEDERATION_STOPPED if the server does not answer, FEDERATION_FAILED (JOB_REFUSED for :meth:`submit`) if it
    answers that it will not.

    Args:
        name: The administrator's.
        kit: Its startup kit.
    """

    def __init__(self, name: str, kit: Path) -> None:
        self.name = name
        self.kit = kit
        self._session: Session | None = None

    def registered(self) -> list[str]:
        """Return the sites that the server knows now."""
        info = self._ask(lambda session: session.get_system_info())
        return sorted(client.name for client in info.client_info)

    def jobs(self) -> list[dict[str, Any]]:
        """Return what the server knows of its jobs: ``job_id``, ``job_name``, ``status``, …

        The status of one that has ended has the codes of its sites in brackets (``server_storage.KitJobs``).
        """
        found: list[dict[str, Any]] = self._ask(lambda session: session.list_jobs())
        return found

    def submit(self, job: Path) -> str:
        """Submit a job folder and return the id that the server gave it.

        FLARE signs a job by writing into its folder: it is given a copy. A job with a link in it is not
        submitted: what it leads to would go to the server and to every site.
        """
        if any(path.is_symlink() for path in (job, *job.rglob("*"))):
            raise HistoflareError(f"{job}: a link is in it; a job is plain files.", reason="JOB_REFUSED")
        with tempfile.TemporaryDirectory(prefix="histoflare-") as scratch:
            copy = shutil.copytree(job, Path(scratch) / job.resolve().name)
            return str(self._ask(lambda session: session.submit_job(str(copy)), "JOB_REFUSED"))

    def status(self, job_id: str) -> str:
        """Return FLARE's status of a job, e.g. RUNNING or FINISHED:COMPLETED, without what sites said."""
        return str(self._meta(job_id)["status"]).partition(" ")[0]

    def deployment(self, job_id: str) -> list[str]:
        """Return what FLARE noted when a job was deployed, e.g. ``"clinic-a: OK"``; none before."""
        return list(self._meta(job_id).get("job_deploy_detail") or [])

    def _meta(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(lambda session: session.get_job_meta(job_id))
        return found

    def wait(
        self, job_id: str, longest_seconds: float, on_status: Callable[[str], None] | None = None
    ) -> str:
        """Wait for the end of a job and return FLARE's status of it, e.g. FINISHED:COMPLETED.

        A server that does not answer is asked again for :data:`LOST_SECONDS`, a job in its queue for
        :data:`WEEK_SECONDS`.

        Args:
            longest_seconds: How long the job may run. It is not ended then, only waited for no longer.
            on_status: Called with the status, each time it is asked.

        Raises:
            HistoflareError: As every question; or the time is over (FEDERATION_FAILED).
        """
        answered = time.monotonic()
        until, runs = answered + WEEK_SECONDS, False
        while time.monotonic() < until:
            try:
                status = self.status(job_id)
            except HistoflareError:
                if time.monotonic() - answered > LOST_SECONDS:
                    raise
            else:
                answered = time.monotonic()
                if on_status is not None:
                    on_status(status)
                if status.startswith("FINISHED"):
                    return status
                if status == "RUNNING" and not runs:
                    until, runs = answered + longest_seconds, True
            time.sleep(STATUS_SECONDS)
        what = f"ended in the {longest_seconds:.0f} s that it may take at most" if runs else "begun in a week"
        raise HistoflareError(
            f"The job {job_id} has not {what}, and is not waited for any longer. The server's log says what "
            "it does; 'nvflare job abort' ends it.",
            reason="FEDERATION_FAILED",
        )

    def download(self, job_id: str, target: Path) -> Path:
        """Fetch what a job left into ``target/<job id>``, and return that folder."""
        shutil.rmtree(target / job_id, ignore_errors=True)
        return Path(self._ask(lambda session: session.download_job_result(job_id, str(target.resolve()))))

    def abort(self, job_id: str) -> None:
        """Abort a job."""
        self._ask(lambda session: session.abort_job(job_id))

    def shut_down(self) -> None:
        """Ask the server and all sites to end; they take some seconds for it."""
        self._ask(lambda session: session.shutdown(TargetType.ALL, wait=False))
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception), redirect_stdout(StringIO()):
                session.close()

    def _server(self) -> str:
        """Return where the kit says that the server is."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            admin = json.loads((self.kit / "startup" / "fed_admin.json").read_text())["admin"]
            return f"The server {admin['host']}:{admin['port']}"
        return "The server"

    def _ask(self, question: Callable[[Session], Any], reason: str = "FEDERATION_FAILED") -> Any:
        close_loaders()
        close_messages()
        with redirect_stdout(StringIO()):  # FLARE says there that it connects
            try:
                if self._session is None:
                    self._session = new_secure_session(self.name, str(self.kit), timeout=CONNECT_SECONDS)
            except Exception as error:
                raise HistoflareError(
                    f"{self._server()} does not answer ({error}). See that it is up (startup/start.sh of "
                    "its kit) and reached from here.",
                    reason="FEDERATION_STOPPED",
                ) from None
            try:
                return question(self._session)
            except Exception as error:
                self.disconnect()
                raise HistoflareError(f"The server says: {error}", reason=reason) from None


def read_administrator(kit: Path) -> str:
    """Return whose startup kit it is.

    Raises:
        HistoflareError: It is no administrator's (FEDERATION_FAILED).
    """
    path = kit / "startup" / "fed_admin.json"
    try:
        return str(json.loads(path.read_text())["admin"]["username"])
    except (OSError, ValueError, LookupError, TypeError):
        raise HistoflareError(
            f"{kit}: no startup kit of an administrator; it would have startup/fed_admin.json.",
            reason="FEDERATION_FAILED",
        ) from None
