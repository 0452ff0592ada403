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
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.spend import Spend
from histoflare.privacy.words import ALL_COLLUDE, IF_CA_IS_HONEST, say_epsilon
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.site_file import write_site_file
from tests.privacy.ledgers import (
    ABOUT,
    BUDGET,
    FILLED,
    ROLES,
    SITE,
    SPEND,
    copied,
    fill,
    new_ledger,
    paths,
    reserve,
)
from tests.refusals import raises_reason

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
    monkeypatch.setattr("histoflare.commands.ledger_tables.out", Console(width=80))
    shown = run("show", *files, *ASKED)
    summary = Ledger(*paths(tmp_path)).summary(BUDGET)
    assert f"ε = {say_epsilon(summary.epsilon)} of 8 at δ = 1e-5" in shown
    assert "RDP" not in shown and "PLD" not in shown and "ρ" not in shown
    how = run("show", *files, *ASKED, "--how")
    assert f"{say_epsilon(summary.epsilon_rdp)} by RDP, {say_epsilon(summary.epsilon_pld)} by PLD" in how
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if "│" in line]
    first, second = (
        [" ".join(cells).strip() for cells in zip(*part, strict=True)] for part in (rows[:4], rows[4:8])
    )
    alone = say_epsilon(BUDGET.spent([SPEND.times(3)]))
    counts = "3 reserved 2 booked 1 released 1 failed"
    assert first[1:5] == [f"run (open) {ABOUT}", "3", counts, alone]
    counts = "2 reserved 0 booked 0 released 0 failed"
    assert second[1:5] == [f"gone (closed) {ABOUT}", "3", counts, "0"]
    assert not any(name in shown for name in ROLES)
    printed = json.loads(run("show", *files, *ASKED, "--json"))
    (found,) = printed["budgets"]
    assert found == summary.to_json() | {"scopes": []}
    assert [(row["about"], row["failed"]) for row in found["runs"]] == [(ABOUT, 1), (ABOUT, 0)]


def test_its_tables_hold_at_80_columns(
    files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's name is a UUID; no figure is cut, and none is broken over two lines."""
    ledger, run_name = Ledger(*paths(tmp_path)), "0f8b1b1e-52f1-4f6e-9a35-2a6d3c1f0b77"
    reserve(ledger, run_name, 4)
    monkeypatch.setattr("histoflare.commands.ledger_tables.out", Console(width=80))
    shown = run("show", *files, *ASKED)
    table = [line for line in shown.splitlines() if line[:1] in "│┃┏┡├└"]
    assert max(map(len, table)) <= 80 and "…" not in "".join(table)
    assert any(run_name in line for line in table)
    assert any(say_epsilon(BUDGET.spent([SPEND.times(4)])) in line for line in table)


def test_a_steward_sees_how_much_each_patient_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs: anna was in both. By the closed form a job of 20 of 40 events takes half of what 40 take."""
    monkeypatch.setattr("histoflare.commands.ledger_tables.out", Console(width=80))
    ledger = new_ledger(tmp_path)
    path, key = paths(tmp_path)
    asked = ("show", "--ledger", path, "--key", key, *ASKED)
    assert "met no patient" in run(*asked, "--patients")
    reserve(ledger, "first", 3)
    ledger.reserve(run="second", about=ABOUT, spend=SPEND, rounds=5, roles={"anna": "train"}, budget=BUDGET)
    (found,) = json.loads(run(*asked, "--patients", "--json"))["budgets"]
    one = BUDGET.share_of(BUDGET.cost(SPEND))
    rows = [(each["role"], each["patients"], each["names"]) for each in found["patients_left"]]
    assert rows == [("train", 1, []), ("train", 2, []), ("test", 1, []), ("validation", 1, [])]
    for each, rounds in zip(found["patients_left"], (8, 3, 0, 0), strict=True):
        assert 0 <= 1 - rounds * one - each["left"][0] < 1e-3, "never more than there is"
    shown = run(*asked, "--patients")
    assert not any(name in shown for name in ROLES)
    assert "patients_left" not in json.loads(run(*asked, "--json"))["budgets"][0]


def test_names_are_shown_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histoflare.commands.ledger_tables.out", Console(width=80))
    ledger = new_ledger(tmp_path)
    path, key = paths(tmp_path)
    reserve(ledger, "first", 3)
    manifest = tmp_path / "manifest.csv"
    lines = ["slide,patient,label,split"]
    lines += [f"{name}.tif,{name},solid,{ROLES.get(name, 'train')}" for name in ("anna", "emil", "fritz")]
    manifest.write_text("\n".join(lines))
    site = tmp_path / "histoflare.toml"
    site.write_text(
        f'manifest = "{manifest}"\nbags = "{tmp_path}"\nrecords = "{tmp_path / "records"}"\n'
        f'ledger = "{path}"\nledger_key = "{key}"\n'
    )
    asked = ("show", "--site", site, *ASKED, "--patients")
    assert not any(name in run(*asked) for name in (*ROLES, "fritz"))
    shown = run(*asked, "--names")
    assert "anna" in shown and "emil" in shown and "2 not in the manifests" in shown
    assert "bert" not in shown and "fritz" not in shown and "1 patients of the manifests" in shown
    for wrong in (("--names",), ("--patients", "--names")):
        assert invoke("show", "--ledger", path, "--key", key, *ASKED, *wrong).exit_code == 2
    assert invoke("show", "--ledger", path, "--key", key, "--patients").exit_code == 2


def test_shared_noise_has_two_figures_and_says_whom_each_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = new_ledger(tmp_path)
    path, key = paths(tmp_path)
    rules = tmp_path / "policy_dp-shared.toml"
    rules.write_bytes((POLICIES / "dp-shared.toml").read_bytes())
    write_first_policy(tmp_path)
    protection = read_policy(rules).protection
    assert protection is not None
    budget = protection.budget()
    more = {"about": "dp-shared: dp-sgd-shared", "rounds": 9, "roles": ROLES, "budget": budget}
    ledger.reserve(run="0f8b1b1e-52f1-4f6e-9a35-2a6d3c1f0b77", spend=Spend(9.0, honest=3), **more)
    monkeypatch.setattr("histoflare.commands.ledger_tables.out", Console(width=80))
    asked = ("show", "--ledger", path, "--key", key, "--policy", rules)
    shown, summary = run(*asked), ledger.summary(budget)
    assert summary.if_all_collude is not None
    first = f"ε = {say_epsilon(summary.epsilon)} of 8 at δ = 1e-5, against the server and any 1 other site"
    second = f"{ALL_COLLUDE}: ε = {say_epsilon(summary.if_all_collude.epsilon)} of 20"
    assert first in shown and second in shown and IF_CA_IS_HONEST not in shown
    table = [line for line in shown.splitlines() if line[:1] in "│┃┏┡├└"]
    assert max(map(len, table)) <= 80 and "…" not in "".join(table)
    own = say_epsilon(summary.runs[0].epsilon_if_all_collude)
    assert any(line.split("│")[-2].strip() == own for line in table if "│" in line)
    assert "this one adds 5.196" in run(*asked, "--how")
    (found,) = json.loads(run(*asked, "--json"))["budgets"]
    assert found["if_all_collude"]["budget_epsilon"] == 20.0 and found["colluders"] == 1
    ledger.reserve(run="b", spend=Spend(90.0, honest=3), trusts_ca=True, **more)
    assert f"any 1 other site, {IF_CA_IS_HONEST}" in run(*asked)


def test_from_the_kits_folder_everything_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(new_ledger(tmp_path))
    path, key = paths(tmp_path)
    local = tmp_path / "kit" / "local"
    local.mkdir(parents=True)
    write_site_file(
        local / "histoflare.toml",
        SiteConfiguration(
            {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"},
            ledger=path,
            ledger_key=key,
        ),
    )
    for scope in ("dp-patient", "dp-update", "open"):
        (local / f"policy_{scope}.toml").write_bytes((POLICIES / f"{scope}.toml").read_bytes())
    write_first_policy(local)
    own = local / OWN_POLICY_FILE
    asked = ("show", "--json")
    for folder in (local.parent, local):
        monkeypatch.chdir(folder)
        (found,) = json.loads(run(*asked))["budgets"]
        assert (found["budget_epsilon"], found["scopes"]) == (8.0, ["dp-patient", "dp-update"])
        assert "whole" in run("verify")
    own.write_text(own.read_text() + "[scope.dp-patient]\nepsilon = 3.0\n")
    monkeypatch.chdir(tmp_path)
    budgets = json.loads(run(*asked, "--site", local.parent))["budgets"]
    assert [(each["budget_epsilon"], each["scopes"]) for each in budgets] == [
        (3.0, ["dp-patient"]),
        (8.0, ["dp-update"]),
    ]
    assert "Spent of the lifetime budget (dp-patient): ε = " in run("show", "--site", local)
    with pytest.raises(JobError) as caught:
        run("show")
    assert caught.value.reason == "SITE_NOT_CONFIGURED"


def test_show_says_whose_it_is_and_what_left_unprotected(files: list[object], tmp_path: Path) -> None:
    shown = run("show", *files)
    identity = Ledger(*paths(tmp_path)).identity()
    for text in (f"'{SITE}'", "workstation", identity.place.ledger, identity.place.host, "bound there"):
        assert text in shown
    assert "open run" in shown and "train/loss" in shown
    assert not any(name in shown for name in ROLES)
    printed = json.loads(run("show", *files, "--json"))
    assert (printed["ledger"]["site"], printed["ledger"]["is_here"]) == (SITE, True)
    assert [(each["what"], each["run"], each["times"]) for each in printed["unprotected"]] == [
        ("evaluation", "run", 1),
        ("update", "open run", 1),
    ]
    assert printed["budgets"] == [], "a budget was not named"
    copy = paths(copied(tmp_path / "data", tmp_path / "copy" / "data").parent)
    copied(tmp_path / "keys", tmp_path / "copy" / "keys")
    assert "bound there, not here" in run("show", "--ledger", copy[0], "--key", copy[1])


def test_a_steward_makes_a_ledger_and_the_sites_file_names_it(tmp_path: Path) -> None:
    site, (path, key) = tmp_path / "kit" / "local" / "histoflare.toml", paths(tmp_path / "srv")
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    site.parent.mkdir()
    site.write_text('# manifest = "m.csv"\n# ledger = ""\n\n# ledger_key = ""\n')  # as provisioned
    asked = ("create", SITE, "--ledger", path, "--key", key, "--site", site)
    assert str(path) in run(*asked)
    assert Ledger(path, key).identity().owner == "steward"
    assert site.read_text() == (f'# manifest = "m.csv"\nledger = "{path}"\n\nledger_key = "{key}"\n'), (
        "and nothing else has changed"
    )
    with pytest.raises(LedgerError) as caught:
        run(*asked)
    assert caught.value.reason == "LEDGER_UNUSABLE"
    with raises_reason("SITE_NOT_CONFIGURED", site):
        run("create", SITE, "--ledger", tmp_path / "b" / "l", "--key", tmp_path / "c" / "k", "--site", site)
    site.write_text(f'manifest = "m.csv"\nbags = "b"\n{site.read_text()}')
    assert SITE in run("show", "--site", site)


def test_where_the_project_names_the_place_it_is_made_there(tmp_path: Path) -> None:
    site, (path, key) = tmp_path / "histoflare.toml", paths(tmp_path / "srv")
    site.write_text(f'ledger = "{path}"\nledger_key = "{key}"\n')
    run("create", SITE, "--site", site)
    assert Ledger(path, key).identity().site == SITE
    assert invoke("create", SITE).exit_code == 2


@pytest.mark.parametrize("inside", ["ledger", "key"])
def test_no_ledger_is_made_or_moved_into_a_kit(tmp_path: Path, inside: str) -> None:
    kit = tmp_path / "kit"
    for name in ("startup", "local"):
        (kit / name).mkdir(parents=True)
    path = (kit / "local" if inside == "ledger" else tmp_path) / "a" / "ledger.sqlite"
    key = (kit if inside == "key" else tmp_path) / "b" / "ledger.key"
    with raises_reason("LEDGER_UNUSABLE", path if inside == "ledger" else key, f"{kit}."):
        run("create", SITE, "--ledger", path, "--key", key)
    assert not path.exists() and not key.exists()
    with raises_reason("LEDGER_UNUSABLE", path if inside == "ledger" else key, f"{kit}."):
        run("move", "--ledger", path, "--key", key)


def test_move_asks_where_it_cannot_see_and_names_the_new_place(tmp_path: Path) -> None:
    fill(new_ledger(tmp_path / "a"))
    old, new = paths(tmp_path / "a"), paths(tmp_path / "b")
    site = tmp_path / "histoflare.toml"
    site.write_text(f'manifest = "m.csv"\nbags = "bags"\nledger = "{old[0]}"\nledger_key = "{old[1]}"\n')
    assert "was already bound" in run("move", "--site", site)
    assert "closed" in run("move", "--away", "--site", site)
    copied(tmp_path / "a", tmp_path / "b")
    assert "bound to" in run("move", "--site", site, "--ledger", new[0], "--key", new[1])
    assert str(new[0]) in site.read_text() and str(old[0]) not in site.read_text()
    assert "15" not in run("verify", "--site", site).split("entries")[0][-4:]
    back = ["--ledger", old[0], "--key", old[1]]
    with pytest.raises(LedgerError) as caught:
        run("move", *back, "--yes")
    assert caught.value.reason == "LEDGER_DAMAGED" and str(new[0]) in str(caught.value)
    reserve(Ledger(*new), "there")
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    assert invoke("move", *back, typed="n\n").exit_code == 1
    with pytest.raises(LedgerError) as caught:
        reserve(Ledger(*old), "further")
    assert caught.value.reason == "LEDGER_MOVED"
    assert "bound to" in run("move", *back, typed="y\n")
    reserve(Ledger(*old), "further")


def test_the_site_file_says_where_the_ledger_is_and_its_policy_may_lower_the_budget(tmp_path: Path) -> None:
    path, key = paths(tmp_path)
    site = tmp_path / "histoflare.toml"
    configuration = SiteConfiguration(
        {"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}, ledger=path, ledger_key=key
    )
    write_site_file(site, configuration)
    with pytest.raises(LedgerError) as caught:
        run("verify", "--site", site)
    assert caught.value.reason == "LEDGER_MISSING"
    fill(new_ledger(tmp_path))
    assert f"{FILLED} entries" in run("verify", "--site", site)
    write_first_policy(tmp_path)
    shown = json.loads(run("show", "--site", site, "--policy", POLICIES / "dp-patient.toml", "--json"))
    (shown,) = shown["budgets"]
    assert (shown["budget_epsilon"], shown["delta"]) == (8.0, 1e-5)
    own = tmp_path / OWN_POLICY_FILE
    own.write_text(own.read_text() + "[scope.dp-patient]\nepsilon = 3.0\n")
    shown = json.loads(run("show", "--site", site, "--policy", POLICIES / "dp-patient.toml", "--json"))
    assert shown["budgets"][0]["budget_epsilon"] == 3.0
    write_first_policy(tmp_path)
    shown = json.loads(run("show", "--site", site, "--policy", POLICIES / "open.toml", "--json"))
    assert shown["budgets"] == [], "a policy without a budget: what left, and no ε"
    write_site_file(site, SiteConfiguration({"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"}))
    with pytest.raises(LedgerError) as caught:
        run("show", "--site", site)
    assert caught.value.reason == "LEDGER_MISSING"


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
    with raises_reason("JOB_INVALID", target):
        run("export", *files, "--out", target)


def test_close_asks_first(files: list[object], tmp_path: Path) -> None:
    ledger = Ledger(*paths(tmp_path))
    reserve(ledger, "unfinished", 4)
    assert invoke("close", "unfinished", *files, typed="n\n").exit_code == 1
    assert ledger.summary(BUDGET).runs[-1].is_open
    assert "closed" in run("close", "unfinished", *files, "--yes")
    assert not ledger.summary(BUDGET).runs[-1].is_open
    with raises_reason("RUN_INVALID", "unfinished: ", ": run."):
        run("close", "unfinished", *files)  # it does not ask first
    assert "ledger close" in run("show", *files, *ASKED), "one is open, with a round that is not booked"
    run("close", "run", *files, "--yes")
    assert "ledger close" not in run("show", *files, *ASKED)


@pytest.mark.parametrize(
    "wrong",
    [
        ["verify", "--ledger", "a"],
        ["verify", "--site", "s", "--key", "k"],
        ["show", "--ledger", "a/b", "--key", "k", "--epsilon", "1"],
        ["show", "--ledger", "a/b", "--key", "k", "--epsilon", "1", "--policy", "p"],
    ],
)
def test_wrong_usage(wrong: list[str]) -> None:
    result = invoke(*wrong)
    assert result.exit_code == 2 and "give" in result.output
