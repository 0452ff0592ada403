"""``histoflare run``: options that cannot be meant are refused before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from histoflare.commands import run
from histoflare.errors import JobError
from tests.flare.bags_on_disk import write_site

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
        (["--job", "nowhere"], "nowhere: no such job"),
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


def test_a_private_run_closes_with_its_epsilon_and_with_chance(tmp_path: Path, repository: Path) -> None:
    """Two rounds under DP-SGD leave the model where it began."""
    for site in ("a", "b"):
        write_site(tmp_path / "sites", site, slides=20)
    arguments = ["--sites", tmp_path / "sites", "--out", tmp_path / "out", "--set", "rounds=2"]
    options = ["--job", repository / "jobs" / "mem_dpsgd", "--runtime", "inprocess", "--epsilons", ""]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *options)])
    said = " ".join(result.stdout.split())
    assert re.search(r"spends ε = \d\.\d of 8 for each patient", said)
    assert "It holds if no patient is at two sites." in said
    assert "At chance: Guessing gives 0.5, which lies within the federated model's interval." in said


def test_a_patient_at_two_sites_ends_the_run_before_it_begins(tmp_path: Path, repository: Path) -> None:
    for site in ("a", "b", "external"):
        write_site(tmp_path / "sites", site)
    manifest = tmp_path / "sites" / "external" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("external-p3", "b-p3"))
    arguments = ["--sites", tmp_path / "sites", "--out", tmp_path / "out", "--runtime", "inprocess"]
    job = ["--job", repository / "jobs" / "mem_dpsgd"]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *job)])
    assert isinstance(result.exception, JobError) and result.exception.reason == "COHORT_INVALID"
    assert "patient b-p3: b (" in str(result.exception)
