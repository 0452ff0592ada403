"""``histoflare ledger``: what its steward sees, and that no patient is among it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError, LedgerError
from histoflare.flare.site_policy import write_first_policy
from histoflare.privacy.ledger import Ledger
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.policy import POLICIES
from histoflare.site.configuration import SiteConfiguration, write_site_file
from tests.privacy.ledgers import ABOUT, BUDGET, ROLES, fill, new_ledger, paths, reserve

ASKED = ("--epsilon", BUDGET.epsilon, "--delta", BUDGET.delta)


def invoke(*arguments: object, typed: str = "") -> Result:
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments: object, typed: str = "") -> str:
    result = invoke(*arguments, typed=typed)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    fill(new_ledger(tmp_path))
    path, key = paths(tmp_path)
    return ["--ledger", path, "--key", key]


def test_show_says_what_is_left(files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histoflare.commands.ledger.out", Console(width=80))
    shown = run("show", *files, *ASKED)
    summary = Ledger(*paths(tmp_path)).summary(BUDGET)
    assert f"ε = {summary.epsilon:.4g} as jobs are admitted by" in shown
    assert f"{summary.epsilon_rdp:.4g} by RDP, {summary.epsilon_pld:.4g} by PLD" in shown
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│" in line]
    first, second = (
        [" ".join(cells).strip() for cells in zip(*part, strict=True)] for part in (rows[:4], rows[4:])
    )
    assert first[1:5] == ["run (open)", ABOUT, "3", "3 reserved 2 booked 1 released 1 failed"]
    assert second[1:5] == ["gone (closed)", ABOUT, "3", "2 reserved 0 booked 0 released 0 failed"]
    assert not any(name in shown for name in ROLES)
    printed = json.loads(run("show", *files, *ASKED, "--json"))
    assert printed == summary.to_json()
    assert [(row["about"], row["failed"]) for row in printed["runs"]] == [(ABOUT, 1), (ABOUT, 0)]


def test_the_site_file_says_where_the_ledger_is_and_its_policy_may_lower_the_budget(tmp_path: Path) -> None:
    path, key = paths(tmp_path)
    site = tmp_path / "histoflare.toml"
    configuration = SiteConfiguration(tmp_path / "m.csv", tmp_path / "bags", ledger=path, ledger_key=key)
    write_site_file(site, configuration)
    with pytest.raises(LedgerError) as caught:
        run("verify", "--site", site)
    assert caught.value.reason == "LEDGER_MISSING"
    fill(new_ledger(tmp_path))
    assert "12 entries" in run("verify", "--site", site)
    write_first_policy(tmp_path)
    shown = json.loads(run("show", "--site", site, "--policy", POLICIES / "dp-patient.toml", "--json"))
    assert (shown["budget_epsilon"], shown["delta"]) == (8.0, 1e-5)
    own = tmp_path / OWN_POLICY_FILE
    own.write_text(own.read_text() + "[scope.dp-patient]\nepsilon = 3.0\n")
    shown = json.loads(run("show", "--site", site, "--policy", POLICIES / "dp-patient.toml", "--json"))
    assert shown["budget_epsilon"] == 3.0
    write_first_policy(tmp_path)
    with pytest.raises(JobError, match="no budget"):
        run("show", "--site", site, "--policy", POLICIES / "open.toml")


def test_verify_ends_with_1_where_the_ledger_is_damaged(files: list[object], tmp_path: Path) -> None:
    assert "5 patients, 2 cohorts" in run("verify", *files)
    path, _ = paths(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"validation", b"validatiom"))
    with pytest.raises(LedgerError) as caught:
        run("verify", *files)
    assert caught.value.reason == "LEDGER_DAMAGED"


def test_export_writes_every_entry_and_nobody(files: list[object], tmp_path: Path) -> None:
    target = tmp_path / "ledger.jsonl"
    run("export", *files, "--out", target)
    lines = target.read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(Ledger(*paths(tmp_path)).events())
    assert not any(name in target.read_text() for name in ROLES)
    with pytest.raises(JobError, match="exists already"):
        run("export", *files, "--out", target)


def test_close_asks_first(files: list[object], tmp_path: Path) -> None:
    ledger = Ledger(*paths(tmp_path))
    reserve(ledger, "unfinished", 4)
    assert invoke("close", "unfinished", *files, typed="n\n").exit_code == 1
    assert ledger.summary(BUDGET).runs[-1].is_open
    assert "closed" in run("close", "unfinished", *files, "--yes")
    assert not ledger.summary(BUDGET).runs[-1].is_open
    with pytest.raises(JobError, match="no open run of this ledger; open are: run"):
        run("close", "unfinished", *files)  # it does not ask first


@pytest.mark.parametrize(
    "wrong",
    [
        ["verify"],
        ["verify", "--ledger", "a"],
        ["verify", "--site", "s", "--key", "k"],
        ["show", "--ledger", "a/b", "--key", "k"],
        ["show", "--ledger", "a/b", "--key", "k", "--epsilon", "1"],
        ["show", "--ledger", "a/b", "--key", "k", "--epsilon", "1", "--policy", "p"],
    ],
)
def test_wrong_usage(wrong: list[str]) -> None:
    result = invoke(*wrong)
    assert result.exit_code == 2 and "give" in result.output
