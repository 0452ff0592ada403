"""``histoflare policy``: the two layers side by side, what holds, and how a steward changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.flare.site_policy import known_models, policy_file, write_first_policy
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import read_own_policy
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.rounds.strategies import STRATEGIES
from histoflare.site.site_file import SITE_FILE
from tests.report.parsed import assert_loads_nothing, parse


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the site file of a kit whose steward has not filled it in: the command does not need it."""
    for scope in ("dp-patient", "open"):
        (tmp_path / policy_file(scope)).write_bytes((POLICIES / f"{scope}.toml").read_bytes())
    write_first_policy(tmp_path)
    return tmp_path / SITE_FILE


def add(site: Path, text: str) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    own.write_text(own.read_text() + text)


def shown(site: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["policy", "show", "--site", str(site), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def facts(site: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(site, "--json", *options))
    return found


def test_a_new_kit_takes_part_with_all_that_this_version_has_and_narrows_nothing(site: Path) -> None:
    found = facts(site)
    assert (found["strategies"], found["models"]) == (list(STRATEGIES), known_models())
    assert found["purposes"] == ["research"] and found["unknown_here"] == []
    assert set(found["scopes"]) == {"dp-patient", "open"}
    for name, scope in found["scopes"].items():
        policy = read_policy(POLICIES / f"{name}.toml")
        assert scope["takes_part"] and scope["mechanism"] == policy.mechanism
        assert scope["entries"]["minimum_patients"]["holds"] == policy.minimum_patients
        for entry in scope["entries"].values():
            assert entry["own"] is None and entry["holds"] == entry["signed"]


def test_what_the_steward_narrows_stands_between_the_kit_s_and_what_holds(site: Path) -> None:
    add(site, "[scope.dp-patient]\nepsilon = 2.5\nevaluations = 0\n")
    entries = facts(site, "--scope", "dp-patient")["scopes"]["dp-patient"]["entries"]
    assert entries["epsilon"] == {"signed": 8.0, "own": 2.5, "holds": 2.5}
    assert entries["evaluations"] == {"signed": 10, "own": 0, "holds": 0}
    assert "auc" not in shown(site), "lists of figures only where they are asked for"
    everything = shown(site, "--all")
    rows = [[cell.strip() for cell in line.split("│")] for line in everything.splitlines() if "│" in line]
    assert ["", "epsilon", "8.0", "2.5", "2.5", ""] in rows
    assert ["", "delta", "1e-05", "", "1e-05", ""] in rows
    metrics = "".join(row[2] for row in rows if len(row) == 6)
    assert all(name in metrics for name in read_policy(POLICIES / "dp-patient.toml").metrics), "none is cut"


def test_a_scope_without_the_site_and_names_that_mean_nothing_here_are_said(site: Path) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    changed = own.read_text().replace("# scopes =", "scopes =").replace('"fedavg"', '"fedavg", "fedvag"')
    own.write_text(changed)
    found = facts(site)
    assert found["unknown_here"] == ["fedvag"]
    assert not found["scopes"]["open"]["takes_part"]
    assert found["scopes"]["open"]["entries"]["counts"] == {"signed": True, "own": None, "holds": None}
    text = shown(site)
    assert "not in this version of histoflare: fedvag" in text and "takes no part in it" in text


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("[scope.dp-patient]\nepsilon = 9\n", (), "POLICY_INVALID"),
        ("[scope.dp-patient]\nepsilon = 9\n", ("--scope", "open"), "POLICY_INVALID"),
        ("", ("--scope", "dp"), "SCOPE_UNKNOWN"),
    ],
)
def test_what_closes_the_site_is_an_error(
    site: Path, text: str, options: tuple[str, ...], reason: str
) -> None:
    add(site, text)
    with pytest.raises(JobError) as caught:
        shown(site, *options)
    assert caught.value.reason == reason


def test_a_kit_that_was_changed_is_said_first(site: Path, tmp_path: Path) -> None:
    local = tmp_path / "kit" / "local"
    local.mkdir(parents=True)
    (local.parent / "startup").mkdir()
    for path in (*tmp_path.glob("policy*.toml"),):
        (local / path.name).write_bytes(path.read_bytes())
    with pytest.raises(JobError) as caught:
        shown(local / SITE_FILE)
    assert caught.value.reason == "KIT_CHANGED"


def change(site: Path, *arguments: str) -> None:
    result = CliRunner().invoke(app, ["policy", "set", *arguments, "--site", str(site)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0


def test_a_steward_narrows_it_line_by_line_and_comments_stay(site: Path) -> None:
    own = site.with_name(OWN_POLICY_FILE)
    comments = [line for line in own.read_text().splitlines() if line.startswith("# ") and " = " not in line]
    change(site, "minimum_patients=10", "purposes=research,education", "scopes=dp-patient")
    change(site, "epsilon=4", "job_share=0.25", "--scope", "dp-patient")
    found = facts(site)
    assert found["purposes"] == ["research", "education"]
    assert not found["scopes"]["open"]["takes_part"]
    entries = found["scopes"]["dp-patient"]["entries"]
    assert [entries[name]["holds"] for name in ("minimum_patients", "epsilon", "job_share")] == [10, 4, 0.25]
    assert all(comment in own.read_text() for comment in comments)
    change(site, "epsilon=", "--scope", "dp-patient")
    change(site, "scopes=", "purposes=")
    found = facts(site)
    assert found["scopes"]["dp-patient"]["entries"]["epsilon"]["holds"] == 8.0
    assert found["scopes"]["open"]["takes_part"] and found["purposes"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("epsilon=9", "--scope", "dp-patient"),
        ("epsilon=nothing", "--scope", "dp-patient"),
        ("epsilon=4",),  # open has no budget
        ("minimum_patients=1",),
        ("purposes=research", "--scope", "dp-patient"),
        ("epsilom=4", "--scope", "dp-patient"),
        ("epsilon=4", "--scope", "dp-patent"),
        ("epsilon",),
    ],
)
def test_nothing_is_written_that_would_not_hold(site: Path, arguments: tuple[str, ...]) -> None:
    before = site.with_name(OWN_POLICY_FILE).read_bytes()
    with pytest.raises(JobError) as caught:
        change(site, *arguments)
    assert caught.value.reason == "POLICY_INVALID"
    assert site.with_name(OWN_POLICY_FILE).read_bytes() == before


@pytest.mark.parametrize("value", ["dp-patient", '["dp-patient"]', "[dp-patient]", "dp-patient,"])
def test_a_list_may_be_written_as_it_stands_in_the_file(site: Path, value: str) -> None:
    change(site, f"scopes={value}")
    assert read_own_policy(site.with_name(OWN_POLICY_FILE)).scopes == ("dp-patient",)


def test_a_pin_says_what_it_replaces_and_show_says_whom_the_site_knows(site: Path) -> None:
    def pin(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["policy", "pin", *arguments, "--site", str(site)])
        assert result.exit_code == 0, result.output
        return " ".join(result.stdout.split())

    first, second = "a" * 64, "b" * 64
    assert first not in pin("hospital-b", first)
    assert first in pin("hospital-b", second), "a certificate that changes is what a steward must see"
    assert "hospital-b" in pin("hospital-x", second.upper())
    assert facts(site)["pins"] == {"hospital-b": second, "hospital-x": second}
    assert "hospital-b" in shown(site) and facts(site)["trust_ca"] is False
    before = site.with_name(OWN_POLICY_FILE).read_bytes()
    for wrong in ("8b1", "a" * 63, "g" * 64):
        arguments = ["policy", "pin", "hospital-b", wrong, "--site", str(site)]
        caught = CliRunner().invoke(app, arguments).exception
        assert isinstance(caught, JobError) and caught.reason == "POLICY_INVALID" and wrong in str(caught)
    assert site.with_name(OWN_POLICY_FILE).read_bytes() == before


def test_check_says_every_fault_at_once(site: Path) -> None:
    result = CliRunner().invoke(app, ["policy", "check", "--site", str(site)])
    assert result.exit_code == 0 and "dp-patient" in result.stdout
    add(site, 'minimum_patients = "many"\nfoo = 1\nscopes = ["dp-pacient"]\ncounts = true\n')
    add(site, "[scope.dp-patient]\nepsilon = 9\n[scope.dp-update]\n")
    own = site.with_name(OWN_POLICY_FILE)
    own.write_text(own.read_text().replace('scopes = ["dp-pacient"]\n', ""))
    result = CliRunner().invoke(app, ["policy", "check", "--site", str(site)])
    assert result.exit_code == 1
    for fault in (
        "minimum_patients: must be",
        "foo: no entry",
        "epsilon: 9",
        "scope dp-update: not in",
        "counts",
    ):
        assert fault in result.stdout


def test_the_page_says_what_holds_and_loads_nothing(site: Path, tmp_path: Path) -> None:
    change(site, "epsilon=4", "--scope", "dp-patient")
    change(site, "scopes=dp-patient")
    target = tmp_path / "policy.html"
    shown(site, "--html", str(target))
    assert_loads_nothing(target)
    text = parse(target).text
    assert "the lifetime budget ε of each patient, over all jobs together 4 8 4" in text
    assert "open: off" in text


def test_its_tables_hold_at_80_columns(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histoflare.commands.policy.out", Console(width=80, emoji=False))
    change(site, "epsilon=2.125", "delta=1e-6", "--scope", "dp-patient")
    table = [line for line in shown(site).splitlines() if line[:1] in "│┃┏┡├└"]
    assert max(map(len, table)) <= 80 and "…" not in "".join(table)
    rows = [[cell.strip() for cell in line.split("│")] for line in table]
    assert ["", "epsilon", "8.0", "2.125", "2.125", ""] in rows
