"""``histoflare job``: variants of jobs, and what FLARE would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.flare.job import read_job


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_variant_for_some_sites(tmp_path: Path, repository: Path) -> None:
    job = repository / "jobs" / "mem_fedavg"
    run("job", "make", job, "--out", tmp_path / "job", "--set", "seed=9", "--sites", "b, a")
    assert read_job(tmp_path / "job").seed == 9
    meta = json.loads((tmp_path / "job" / "meta.json").read_text())
    assert meta["deploy_map"] == {"app": ["server", "b", "a"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sites", ","], "names of sites"),
        (["--sites", "a b,c"], "names of sites"),
        (["--sites", "../x,c"], "names of sites"),
        (["--sites", "a,a"], "each once"),
        (["--sites", "server,a"], "names of sites"),
        (["--sites", "a"], "names 1, and the job needs 2"),
        (["--set", "purpose.x=1"], "no table"),
        (["--set", "protocol=5"], "protocol: not a variable"),
        (["--model", "nowhere.safetensors"], "no model file"),
    ],
)
def test_what_flare_would_refuse_is_refused_before(
    tmp_path: Path, repository: Path, options: list[str], says: str
) -> None:
    with pytest.raises(JobError, match=says):
        run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "job", *options)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_job_is_not_made_inside_another(tmp_path: Path, repository: Path) -> None:
    run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "job")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(JobError, match="in the job folder"):
        run("job", "make", tmp_path / "job", "--out", tmp_path / "job" / "app" / "inside")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_folder_is_kept(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(JobError, match="exists already"):
        run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "mine")
