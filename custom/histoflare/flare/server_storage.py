"""Where a FLARE server keeps its jobs: inside its own startup kit, not in the machine's temporary folder.

FLARE takes absolute folders only, and where a kit will be unpacked is not known when it is made. The server
changes into its kit before it builds these, so relative folders start there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import Job, JobMetaKey, RunStatus
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage
from nvflare.private.fed.server import job_cmds
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

from histoflare.errors import JobError
from histoflare.flare.application import check_server_application, check_submission
from histoflare.flare.job_files import CONFIG_FOLDER, EARLIER_ROUNDS_FILE, SERVER_APP
from histoflare.flare.record import SITES_FILE, read_best_row, read_rows
from histoflare.report.outcomes import find_outcomes, say_codes

JOBS_FOLDER = "jobs"
SNAPSHOTS_FOLDER = "snapshots"
LOST = "lost with the server; 'histoflare resume' goes on from its last round"
"""Of a job that an earlier server process left running."""


class CheckedValidator(JobMetaValidator):
    """FLARE's first look at a submission, after one at its bytes."""

    def validate(self, job_name: str, job_data: str | bytes) -> tuple[bool, str, dict[str, Any]]:
        """Return whether a submission can be a job, what is wrong with it, and its meta."""
        try:
            check_submission(job_data)
        except JobError as error:
            if isinstance(job_data, str):
                Path(job_data).unlink(missing_ok=True)  # as it was uploaded
            return False, f"{error.reason}: {error}", {}
        valid: tuple[bool, str, dict[str, Any]] = super().validate(job_name, job_data)
        return valid


class KitJobs(SimpleJobDefManager):
    """FLARE's job manager, for jobs of this project: it looks at what is submitted and what is started.

    FLARE parses parts of a submission before it asks its job manager, so that step is replaced, too.

    The status of a job that has ended also has the codes that sites gave, in brackets after FLARE's own word:
    ``FINISHED:EXECUTION_EXCEPTION (BUDGET_EXHAUSTED: clinic-a)``. FLARE's tools look at how it begins.

    In a list of jobs the status of one that runs has how many rounds are done: ``RUNNING (3 rounds done)``.
    One that an earlier server process left running is lost with it, and ``FINISHED:ABANDONED``; FLARE itself
    would go on calling it RUNNING.

    Its folder is below the server's kit; an absolute one is taken as it is.
    """

    def __init__(self, uri_root: str = JOBS_FOLDER, job_store_id: str = "job_store") -> None:
        super().__init__(str(Path.cwd() / uri_root), job_store_id)
        if not issubclass(job_cmds.JobMetaValidator, JobMetaValidator):
            raise SystemExit("The installed FLARE is not the one of constraints.txt: job_cmds is another.")
        job_cmds.JobMetaValidator = CheckedValidator
        self._left: dict[str, _Record] = {}
        self._kit = Path.cwd()
        self._has_begun = False

    def create(
        self, meta: dict[str, Any], uploaded_content: str | bytes, fl_ctx: FLContext
    ) -> dict[str, Any]:
        """Keep a submitted job.

        Raises:
            JobError: It is no job of this project (JOB_INVALID, JOB_VERSION); FLARE passes that on.
        """
        try:
            check_submission(uploaded_content)
        except JobError as error:
            raise JobError(f"{error.reason}: {error}", reason=error.reason) from None
        made: dict[str, Any] = super().create(meta, uploaded_content, fl_ctx)
        if isinstance(uploaded_content, str):
            Path(uploaded_content).unlink(missing_ok=True)  # as it was uploaded
        return made

    def save_workspace(self, jid: str, data: Any, fl_ctx: FLContext) -> Any:
        """Keep what a job has left, and look in it for what its sites said."""
        with suppress(Exception):  # a record that cannot be read costs the status its codes, and no more
            self._left[jid] = _Record.read([data] if isinstance(data, str) else data)
        return super().save_workspace(jid, data, fl_ctx)

    def set_status(self, jid: str, status: RunStatus, fl_ctx: FLContext) -> None:
        """Note a job's status; of one that has ended with the codes of its sites."""
        why = ""
        if status is RunStatus.FAILED_TO_RUN:
            why = _Record().say(fl_ctx.get_prop(FLContextKey.JOB_DEPLOY_DETAIL) or [])
        elif status.value.startswith("FINISHED"):
            record = self._left.pop(jid, None) or _Record()
            with suppress(Exception):
                why = record.say(self._deployment(jid, fl_ctx))
        if why:
            self.logger.info("job %s ended: %s (%s)", jid, status.value, why)
        super().set_status(jid, _Said(status, why) if why else status, fl_ctx)

    def get_all_jobs(self, fl_ctx: FLContext) -> list[Job]:
        """Return all jobs, for a list of them."""
        jobs: list[Job] = super().get_all_jobs(fl_ctx)
        for job in jobs:
            if job.meta.get(JobMetaKey.STATUS.value) == RunStatus.RUNNING.value:
                with suppress(Exception):  # what cannot be read costs the list the figure, and no more
                    rows, _ = read_rows(self._kit / job.job_id)
                    done = sum(row.get("finished", True) for row in rows)
                    job_cmds.JobCommandModule._set_duration(job)  # FLARE does so of a plain RUNNING alone
                    said = f"{RunStatus.RUNNING.value} ({done} round{'' if done == 1 else 's'} done)"
                    job.meta[JobMetaKey.STATUS.value] = said
        return jobs

    def get_jobs_to_schedule(self, fl_ctx: FLContext) -> list[Job]:
        """Return the jobs that may start; before it is asked first, none can run yet."""
        if not self._has_begun:
            self._has_begun = True
            for job in self.get_jobs_by_status([RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx):
                self.logger.info("job %s was lost with an earlier server process", job.job_id)
                super().set_status(job.job_id, _Said(RunStatus.ABANDONED, LOST), fl_ctx)
        jobs: list[Job] = super().get_jobs_to_schedule(fl_ctx)
        return jobs

    def _deployment(self, jid: str, fl_ctx: FLContext) -> list[str]:
        """Return what FLARE noted when the job was deployed: it runs without sites that did not take it."""
        meta = self._get_job_store(fl_ctx).get_meta(self.job_uri(jid)) or {}
        return list(meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or [])

    def get_app(self, job: Job, app_name: str, fl_ctx: FLContext) -> bytes:
        """Return an application that is to be started.

        Raises:
            JobError: It is none of this project; an earlier version kept it.
        """
        application: bytes = super().get_app(job, app_name, fl_ctx)
        check_server_application(application, app_name)
        return application


class _Said(str):
    """A status of FLARE that compares as it does, and is written with more."""

    value: str

    def __new__(cls, status: RunStatus, why: str) -> _Said:
        said = super().__new__(cls, status.value)
        said.value = f"{status.value} ({why})"
        return said


@dataclass(frozen=True)
class _Record:
    """What a job that has ended has left of how its sites fared.

    Attributes:
        rows: Of its own rounds, without those of a run that it went on from.
        evaluation, best: The rows of the questions about the last and the best model.
        pseudonyms: Site → the name under which others may see it, of those that have one.
    """

    rows: Sequence[dict[str, Any]] = ()
    evaluation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    pseudonyms: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folders: Sequence[str]) -> _Record:
        """Read the first of the folders that has a record."""
        for folder in map(Path, folders):
            rows, evaluation = read_rows(folder)
            if rows or evaluation:
                earlier = folder / SERVER_APP / CONFIG_FOLDER.name / EARLIER_ROUNDS_FILE
                before = len(json.loads(earlier.read_text())) if earlier.is_file() else 0
                names = folder / SITES_FILE
                pseudonyms = json.loads(names.read_text()) if names.is_file() else {}
                return cls(rows[before:], evaluation, read_best_row(folder), pseudonyms)
        return cls()

    def say(self, deployment: Sequence[str]) -> str:
        """Return the codes of the sites, or else why the last round was given up."""
        given_up = str(self.rows[-1].get("given_up", "")) if self.rows else ""
        outcomes = find_outcomes(self.rows, self.evaluation, deployment, self.best)
        named = {self.pseudonyms.get(site, site): outcome for site, outcome in outcomes.items()}
        codes = say_codes(dict(sorted(named.items())), given_up, completed=not given_up)
        questions = (row for row in (self.evaluation, self.best) if row is not None)
        ended = next((str(row["given_up"]) for row in questions if row.get("given_up")), "")
        return "; ".join(filter(None, (ended, codes)))


class KitStorage(FilesystemStorage):
    """FLARE's storage with a folder below the server's kit; an absolute folder is taken as it is."""

    def __init__(self, root_dir: str = SNAPSHOTS_FOLDER, uri_root: str = "/") -> None:
        super().__init__(str(Path.cwd() / root_dir), uri_root)
