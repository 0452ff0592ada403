"""Why a job was refused, in a site's log and audit log."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.reasons import advise_site
from histoflare.site import refusals
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of
from histoflare.site.refusals import list_refusals, note_refusal, say_refusal


@pytest.fixture
def site(tmp_path: Path) -> SiteConfiguration:
    return SiteConfiguration({"manifest": tmp_path / "m.csv", "bags": tmp_path / "bags"})


def test_one_line_has_the_code_what_is_wrong_and_what_to_do() -> None:
    lines: list[str] = []
    for _ in range(3):
        say_refusal(lines.append, "job-of-one-line", JobError("changed:\n  local/x", reason="KIT_CHANGED"))
    first, second, third = lines
    assert "KIT_CHANGED" in first and "changed: local/x" in first and advise_site("KIT_CHANGED") in first
    assert "\n" not in first
    assert second == third and "KIT_CHANGED" in second and "local/x" not in second


def test_another_error_with_the_same_code_is_not_said_to_be_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "MOST_NOTED", 2)
    lines: list[str] = []
    for name in ("first", "second", "first", "third"):
        say_refusal(lines.append, "job-of-two-errors", JobError(f"{name} file", reason="KIT_CHANGED"))
    assert ["file" in line for line in lines] == [True, True, False, False]
    assert "second file" in lines[1] and lines[2] != lines[3]


def test_the_audit_log_has_what_to_do_and_a_job_s_lines_are_found_again(site: SiteConfiguration) -> None:
    note_refusal(site, "run", JobError("of an earlier job", reason="NOT_FINITE"), "earlier")
    begun = audit_log_of(site).size()
    for detail in ("no ledger", "another one", "no ledger"):
        note_refusal(site, "run", JobError(detail, reason="LEDGER_MISSING"), "job")
    note_refusal(site, "another", JobError("of another job", reason="KIT_CHANGED"))
    audit_log_of(site).write("released", run="run", job="job")
    (_, first, *_) = audit_log_of(site).read()
    assert (first["run"], first["job"], first["reason"]) == ("run", "job", "LEDGER_MISSING")
    assert first["do"] == advise_site("LEDGER_MISSING")
    line, other = list_refusals(site, "job", begun)
    assert "LEDGER_MISSING (2 times): no ledger" in line and advise_site("LEDGER_MISSING") in line
    assert "LEDGER_MISSING: another one" in other
    assert len(list(list_refusals(site, "earlier"))) == 1 and not list(list_refusals(site, "earlier", begun))


def test_of_what_a_site_takes_part_in_its_own_policy_decides() -> None:
    for code in ("MODEL_NOT_ALLOWED", "PURPOSE_NOT_ALLOWED", "SCOPE_NOT_ALLOWED", "STRATEGY_NOT_ALLOWED"):
        assert "policy.toml" in refusals.describe_refusal("job", code, "it is not listed")
