"""A job by its name, or by its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.shipped import JOBS, PROVISIONING, find_job, job_names
from tests.refusals import raises_reason


def test_a_checkout_uses_its_own_files(repository: Path) -> None:
    assert repository / "jobs" == JOBS and repository / "provisioning" == PROVISIONING
    assert job_names() == sorted(path.name for path in (repository / "jobs").iterdir() if path.is_dir())


def test_a_name_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_job(Path("mem_fedavg")) == JOBS / "mem_fedavg"
    (tmp_path / "mem_fedavg").mkdir()
    assert find_job(Path("mem_fedavg")) == JOBS / "mem_fedavg", "a folder of results is no job"


def test_a_job_of_that_name_that_is_there_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mem_fedavg").mkdir()
    (tmp_path / "mem_fedavg" / "meta.json").touch()
    assert find_job(Path("mem_fedavg")).resolve() == tmp_path / "mem_fedavg"
    assert find_job(tmp_path) == tmp_path


@pytest.mark.parametrize("job", ["jobs/mem_fedavgs", "mem-fedavg", "/no/such/mem_fedavg"])
def test_what_is_neither_is_said_with_what_was_meant(job: str) -> None:
    with raises_reason("JOB_INVALID", job, "mem_fedavg?", *job_names()) as caught:
        find_job(Path(job))
    assert all(name in str(caught.value) for name in job_names())
    with pytest.raises(JobError) as caught:
        find_job(Path("zzz"))
    assert "Did you mean" not in str(caught.value)
