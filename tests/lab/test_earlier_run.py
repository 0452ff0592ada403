"""Two runs are not mixed in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.lab.earlier_run import claim_output
from tests.refusals import raises_reason

SITES = {"sites": {"a": "/a.csv"}, "job": {"rounds": 3, "labels": ("x", "y")}}


def test_the_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    claim_output(out, SITES)
    (out / "seed-1" / "job").mkdir(parents=True)
    (out / "bags").mkdir()
    claim_output(out, SITES)
    assert (out / "seed-1").is_dir(), "it may go on"
    claim_output(out, {**SITES, "sites": {"b": "/b.csv"}})  # nothing has come of it yet
    assert sorted(path.name for path in out.iterdir()) == ["bags", "inputs.json"], "half of another run"
    claim_output(out, SITES)
    (out / "seed-1").mkdir()
    (out / "seed-1" / "report.json").touch()
    claim_output(out, SITES)
    with raises_reason("OUTPUT_TAKEN", out, "--out"):
        claim_output(out, {**SITES, "sites": {"b": "/b.csv"}})
    claim_output(out, SITES)


@pytest.mark.parametrize("left", ["seed-1/report.json", "site-a.html", "report.json"])
def test_what_an_earlier_version_left_is_not_ours(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    with raises_reason("OUTPUT_TAKEN", tmp_path, "--out"):
        claim_output(tmp_path, SITES)


def test_a_folder_with_slides_and_bags_only_is_free(tmp_path: Path) -> None:
    for name in ("slides", "bags", "records"):
        (tmp_path / name).mkdir()
    claim_output(tmp_path, SITES)
    assert (tmp_path / "records").is_dir(), "made by nobody known"


def test_a_folder_of_somebody_else_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text('{"my": "pipeline inputs"}')
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "important.txt").touch()
    claim_output(tmp_path, SITES)
    assert (tmp_path / "records" / "important.txt").exists()


def test_ledgers_of_a_run_that_came_to_nothing_stay(tmp_path: Path) -> None:
    claim_output(tmp_path, SITES)
    (tmp_path / "ledgers").mkdir()
    claim_output(tmp_path, {**SITES, "sites": {"b": "/b.csv"}})
    assert (tmp_path / "ledgers").is_dir()
