"""``histoflare run``: options that cannot be meant are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from histoflare.commands import run
from histoflare.errors import JobError

app = typer.Typer()
app.command()(run.run)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "round=5"], "no variable 'round'"),
        (["--set", "rounds=0"], "stop.rounds"),
        (["--set", "rounds=1.5"], "stop.rounds"),
        (["--set", "rounds=NaN"], "not finite"),
        (["--set", "rounds=many"], "stop.rounds"),
        (["--set", "rounds=null"], "stop.rounds"),
        (["--set", "rounds=true"], "stop.rounds"),
        (["--set", "seed=3"], "given with --seeds"),
        (["--set", "rounds"], "takes name=value"),
        (["--seeds", "1,1"], "a seed twice"),
        (["--seeds", "one"], "whole numbers separated by commas"),
        (["--job", "nowhere"], "nowhere: not a job folder"),
    ],
)
def test_options_that_cannot_be_meant(
    options: list[str], says: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    (tmp_path / "a.csv").touch()
    arguments = ["--sites", tmp_path, "--bags", tmp_path / "bags", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, arguments), *options])
    assert isinstance(result.exception, JobError) and says in str(result.exception)
    assert not (tmp_path / "out").exists()
