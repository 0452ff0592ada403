"""The status of a job that has ended says why, after FLARE's own word."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import RunStatus
from nvflare.private.fed.server import job_cmds

from histoflare.flare.job_files import CONFIG_FOLDER, EARLIER_ROUNDS_FILE, SERVER_APP
from histoflare.flare.record import EVALUATION_ROUND_FILE, ROUNDS_FILE, SITES_FILE
from histoflare.flare.server_storage import KitJobs


class Store:
    """A job store that keeps the metas it is given."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {"start_time": "2026-11-01T00:00:00+00:00"}

    def update_meta(self, uri: str, meta: dict[str, Any], replace: bool) -> None:
        self.meta |= meta

    def get_meta(self, uri: str) -> dict[str, Any]:
        return self.meta

    def update_object(self, uri: str, data: Any, name: str) -> str:
        return uri


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(SimpleJobDefManager, "_get_job_store", lambda *_: made)
    monkeypatch.setattr(job_cmds, "JobMetaValidator", job_cmds.JobMetaValidator)  # put back afterwards
    return made


def ended(store: Store, folder: Path, rows: Any, status: RunStatus, deployed: Any = None) -> str:
    (folder / ROUNDS_FILE).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    jobs, fl_ctx = KitJobs(str(folder / "jobs")), FLContext()
    fl_ctx.set_prop(FLContextKey.JOB_DEPLOY_DETAIL, deployed, private=True, sticky=False)
    jobs.save_workspace("1", [str(folder / "empty"), str(folder)], fl_ctx)
    jobs.set_status("1", status, fl_ctx)
    return str(store.meta["status"])


def job_of(status: RunStatus, name: str = "1") -> Any:
    meta = {"status": status.value, "start_time": "2026-11-01T00:00:00+00:00"}
    return SimpleNamespace(job_id=name, meta=meta)


def test_a_list_of_jobs_says_how_far_one_is(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [job_of(RunStatus.RUNNING), job_of(RunStatus.RUNNING, "new"), job_of(RunStatus.SUBMITTED)]
    monkeypatch.setattr(SimpleJobDefManager, "get_all_jobs", lambda *_: listed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ROUNDS_FILE).write_text(json.dumps([ROW, {**ROW, "round": 1, "finished": False}]))
    found = KitJobs(str(tmp_path / "jobs")).get_all_jobs(FLContext())
    said = [job.meta["status"] for job in found]
    assert said == ["RUNNING (1 round done)", "RUNNING (0 rounds done)", "SUBMITTED"]
    assert "duration" in found[0].meta


def test_what_an_earlier_process_left_running_is_abandoned_and_nothing_later(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimpleJobDefManager, "get_jobs_by_status", lambda *_: [job_of(RunStatus.RUNNING)])
    monkeypatch.setattr(SimpleJobDefManager, "get_jobs_to_schedule", lambda *_: [])
    jobs = KitJobs(str(tmp_path / "jobs"))
    assert jobs.get_jobs_to_schedule(FLContext()) == []
    assert store.meta["status"].startswith("FINISHED:ABANDONED (") and "resume" in store.meta["status"]
    jobs.set_status("1", RunStatus.RUNNING, FLContext())
    jobs.get_jobs_to_schedule(FLContext())
    assert store.meta["status"] == "RUNNING"


FAILED = RunStatus.FINISHED_EXECUTION_EXCEPTION
ROW = {"round": 0, "asked": ["a", "b"], "taking_part": ["a"], "refused": {"b": "KIT_CHANGED"}}


@pytest.mark.parametrize(
    ("rows", "status", "says"),
    [
        ([ROW], FAILED, "FINISHED:EXECUTION_EXCEPTION (KIT_CHANGED: b)"),
        ([ROW], RunStatus.FINISHED_COMPLETED, "FINISHED:COMPLETED (KIT_CHANGED: b)"),
        ([{**ROW, "refused": {}, "given_up": "1 of 2"}], FAILED, "FINISHED:EXECUTION_EXCEPTION (1 of 2)"),
        ([{**ROW, "refused": {"b": "EVALUATION_ONLY"}}], RunStatus.FINISHED_COMPLETED, "FINISHED:COMPLETED"),
        ([{**ROW, "refused": {}}], RunStatus.FINISHED_COMPLETED, "FINISHED:COMPLETED"),
        ([], RunStatus.FINISHED_ABORTED, "FINISHED:ABORTED"),
        ("not JSON", FAILED, "FINISHED:EXECUTION_EXCEPTION"),
    ],
)
def test_codes_stand_in_brackets_after_the_word_that_flare_looks_at(
    tmp_path: Path, store: Store, rows: Any, status: RunStatus, says: str
) -> None:
    assert ended(store, tmp_path, rows, status) == says
    assert "duration" in store.meta, "it is FLARE's status all the same"


def test_what_a_site_said_when_the_job_was_deployed(tmp_path: Path, store: Store) -> None:
    deployed = ["server: OK", "a: JOB_VERSION", "b: OK"]
    said = ended(store, tmp_path, [], RunStatus.FAILED_TO_RUN, deployed)
    assert said == "FINISHED:FAILED_TO_RUN (JOB_VERSION: a)"


def test_a_job_that_runs_has_flare_s_status_alone(tmp_path: Path, store: Store) -> None:
    assert ended(store, tmp_path, [ROW], RunStatus.RUNNING) == "RUNNING"


def test_a_resumed_job_s_status_has_no_codes_of_the_earlier_run(tmp_path: Path, store: Store) -> None:
    config = tmp_path / SERVER_APP / CONFIG_FOLDER.name
    config.mkdir(parents=True)
    (config / EARLIER_ROUNDS_FILE).write_text(json.dumps([ROW]))
    rows = [ROW, {**ROW, "round": 1, "refused": {}}]
    assert ended(store, tmp_path, rows, RunStatus.FINISHED_COMPLETED) == "FINISHED:COMPLETED"


def test_a_site_that_did_not_take_a_job_that_ran_without_it(tmp_path: Path, store: Store) -> None:
    store.meta["job_deploy_detail"] = ["server: OK", "c: JOB_VERSION", "a: OK"]
    rows = [{**ROW, "refused": {}}]
    assert ended(store, tmp_path, rows, RunStatus.FINISHED_COMPLETED) == "FINISHED:COMPLETED (JOB_VERSION: c)"


def test_a_site_with_a_pseudonym_is_named_by_it(tmp_path: Path, store: Store) -> None:
    (tmp_path / SITES_FILE).write_text('{"b": "river"}')
    assert ended(store, tmp_path, [ROW], FAILED) == "FINISHED:EXECUTION_EXCEPTION (KIT_CHANGED: river)"


def test_a_job_that_ended_during_the_question_about_its_model_says_so(tmp_path: Path, store: Store) -> None:
    asked = {"taking_part": ["a"], "refused": {}, "given_up": "all rounds are finished"}
    (tmp_path / EVALUATION_ROUND_FILE).write_text(json.dumps(asked))
    said = ended(store, tmp_path, [{**ROW, "refused": {}}], RunStatus.FINISHED_ABORTED)
    assert said == "FINISHED:ABORTED (all rounds are finished)"
