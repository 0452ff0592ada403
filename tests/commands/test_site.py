"""``histoflare site where``: found from the kit's folder, and complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.site.places import find_site_of, kit_of
from histoflare.site.site_file import SITE_FILE


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Return a kit whose steward has said where things are; only the records are there."""
    local = tmp_path / "kit" / "local"
    local.mkdir(parents=True)
    (local.parent / "startup").mkdir()
    (local / "policy_dp-patient.toml").touch()
    (tmp_path / "records").mkdir()
    (local / SITE_FILE).write_text(
        f'manifest = "m.csv"\nbags = "bags"\nrecords = "{tmp_path / "records"}"\n'
        f'ledger = "{tmp_path / "l" / "ledger.sqlite"}"\nledger_key = "{tmp_path / "k" / "ledger.key"}"\n'
    )
    return local.parent


def places(*arguments: str) -> dict[str, tuple[str, bool]]:
    result = CliRunner().invoke(app, ["site", "where", "--json", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return {each["what"]: (each["path"], each["there"]) for each in json.loads(result.stdout)}


def test_a_kit_is_found_from_within_and_from_elsewhere(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = kit / "local" / SITE_FILE
    for given in (file, kit, kit / "local"):
        assert find_site_of(given) == file
    for folder in (kit, kit / "local", kit / "startup"):
        monkeypatch.chdir(folder)
        assert find_site_of() == file
    assert kit_of(file) == kit
    monkeypatch.chdir(tmp_path)
    for given in (None, tmp_path, tmp_path / "no such kit"):
        with pytest.raises(JobError) as caught:
            find_site_of(given)
        assert caught.value.reason == "SITE_NOT_CONFIGURED"


def test_everything_of_a_site_is_listed(kit: Path, tmp_path: Path) -> None:
    (kit / "4c1f").mkdir()
    (kit / "4c1f" / "log.txt").touch()
    found = places("--site", str(kit))
    assert found["records of runs"] == (str(tmp_path / "records"), True)
    assert found["ledger"] == (str(tmp_path / "l" / "ledger.sqlite"), False)
    assert found["ledger's key"] == (str(tmp_path / "k" / "ledger.key"), False)
    assert found["ledger's head"] == (str(tmp_path / "k" / "ledger.key.head"), False)
    assert found["audit log"] == (str(tmp_path / "l" / "ledger.audit.jsonl"), False)
    assert found["bags"] == (str(kit / "local" / "bags"), False)
    assert found["signed policy dp-patient"][1] and not found["own policy"][1]
    assert found["log of a job"] == (str(kit / "4c1f" / "log.txt"), True)
    shown = CliRunner().invoke(app, ["site", "where", "--site", str(kit)]).stdout
    assert "…" not in shown


def test_what_is_known_is_said_where_the_file_has_faults(kit: Path) -> None:
    (kit / "local" / SITE_FILE).write_text("manifest = 1\n")
    result = CliRunner().invoke(app, ["site", "where", "--site", str(kit)])
    assert isinstance(result.exception, JobError) and "own policy" in result.stdout


def test_a_path_stands_in_one_line(kit: Path, tmp_path: Path) -> None:
    long = tmp_path / ("very-long-" * 12)
    text = (kit / "local" / SITE_FILE).read_text()
    (kit / "local" / SITE_FILE).write_text(text.replace(str(tmp_path / "records"), str(long)))
    shown = CliRunner().invoke(app, ["site", "where", "--site", str(kit)]).stdout
    assert any(line.split() == ["records", "of", "runs", "no", str(long)] for line in shown.splitlines())
