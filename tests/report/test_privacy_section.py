"""The page's section on privacy says what the guarantee says, and marks what is void."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.privacy.plan import DpSgd, Open, UpdateNoise
from histoflare.report.budgets import budget_entry
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.privacy_section import make_privacy_section
from histoflare.report.site_page import SitePage, write_site_page
from histoflare.rounds.comparison import Comparison
from tests.report.made import full_report, metrics, protected_report, row
from tests.report.parsed import assert_loads_nothing, parse
from tests.report.test_page import written

SAMPLED = DpSgd(noise_multiplier=1.1, sample_rate=0.2, steps=2, published_epsilon=2.9)
QUIET = UpdateNoise(noise_multiplier=60.0)
NOBODY = Comparison({}, None, None, {}, {})


def at_budgets(plan: Any, own: float, half: float = 0.09) -> list[dict[str, Any]]:
    """The job's own ε, and no protection."""
    found = replace(NOBODY, federated=metrics(own, half=half))
    unprotected = replace(NOBODY, federated=metrics(0.9))
    return [
        budget_entry(plan, 30, found, NOBODY, is_own=True),
        budget_entry(Open(), 30, unprotected, NOBODY),
    ]


@pytest.mark.parametrize("plan", [SAMPLED, QUIET])
def test_every_site_has_one_figure_and_others_behind_a_click(plan: Any, tmp_path: Path) -> None:
    report = protected_report(plan)
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    found = report["guarantee"]
    first, _, how = page.text.partition("How it was computed")
    tight = found["accountants"][-1]
    for site, spent in found["sites"].items():
        one, *others = (say_epsilon(spent[name]) for name in ("filter", "rdp", tight))
        assert f"{site} {spent['updates']} {one} " in first
        assert f"{site} {one} {' '.join(others)} 1e-5" in how
    assert f"federation (the greatest) {say_epsilon(found['federation']['filter'])} " in first
    assert not any(word in first for word in ("RDP", "PLD", "Gaussian"))
    assert "only if no patient is at two sites" in page.text
    assert "Not covered" in page.text
    assert f"ε = {say_epsilon(found)} of 8 at δ = 1e-5" in page.text, "in the headline"
    assert "void" not in page.text.lower()
    assert "Balanced accuracy against ε" not in page.text, "it was not run at other budgets"
    lines = [line["class"] for line in page.named("line")]
    assert "limit" in lines
    assert "series s0" in lines


def test_the_stated_figure_stands_beside_the_true_one(tmp_path: Path) -> None:
    page = written(protected_report(SAMPLED), tmp_path)
    assert "stated by the source of these settings 2.9, not the figure of this job, see below" in page.text
    assert "Stated and true. The source of these settings states ε = 2.9;" in page.text
    assert "Stated" not in written(protected_report(replace(SAMPLED, published_epsilon=None)), tmp_path).text


def test_a_void_figure_is_marked_wherever_it_stands(tmp_path: Path) -> None:
    plan = replace(SAMPLED, noise_seed=3)
    report = protected_report(plan, accuracy_against_epsilon=at_budgets(plan, 0.56))
    page = written(report, tmp_path)
    assert "No guarantee: the noise was drawn from a known seed." in page.text
    assert "Privacy: void" in page.text
    rows = [*report["guarantee"]["sites"].values(), report["guarantee"]["federation"]]
    for spent in [*rows, report["guarantee"]["reserved"]]:
        for accountant in ("filter", "rdp", "pld"):
            assert f"{say_epsilon(spent[accountant])} void" in page.text
    assert "ε over the rounds void" in page.text
    assert "Balanced accuracy against ε void" in page.text
    marked = [found for found in page.named("strong") if found.get("class") == "void"]
    sites, others, titles, entry = 4, 2, 2, 1
    assert len(marked) == sites + others + 3 * (sites + others - 1) + titles + entry
    style = (tmp_path / "report.html").read_text()
    assert re.search(r"\.void[^{]*\{ color: var\(--refused\)", style), "red in light and dark"


def test_noise_at_the_server_is_said(tmp_path: Path) -> None:
    page = written(protected_report(replace(QUIET, noise_location="server")), tmp_path)
    assert "Against the server itself ε = ∞." in page.text
    assert "gainst the server" not in written(protected_report(QUIET), tmp_path).text


def test_an_open_run_is_as_plain_as_before(tmp_path: Path) -> None:
    page = written(full_report(), tmp_path)
    assert "Privacy: none guaranteed (ε = ∞)" in page.text
    assert "Nothing protects the updates: ε = ∞ for every patient." in page.text
    assert "RDP" not in page.text
    assert "delta" not in page.text


def test_an_infinite_epsilon_has_no_curve(tmp_path: Path) -> None:
    report = protected_report(UpdateNoise(noise_multiplier=0.0))
    page = written(report, tmp_path)
    assert "There is no curve to draw" in page.text
    assert " 30 ∞ " in page.text and "∞ ∞ ∞ 1e-5" in page.text
    assert make_privacy_section(report).chart == ""


def test_sites_of_one_curve_share_a_line_and_many_curves_become_two() -> None:
    section = make_privacy_section(protected_report(QUIET))
    assert [label.startswith("amsterdam, ") for label in section.legend] == [True, False, False]
    sites = [f"s{number:02}" for number in range(12)]
    apart = [row(index, sites, asked=sites[index:], taking_part=sites[index:]) for index in range(12)]
    section = make_privacy_section(protected_report(QUIET, participation=apart))
    assert section.legend == ["the site that spent most", "the site that spent least"]
    together = [row(0, sites)]
    assert make_privacy_section(protected_report(QUIET, participation=together)).legend == ["12 sites"]


@pytest.mark.parametrize(
    ("own", "said"), [(0.56, "includes 0.5: not distinguishable from chance."), (0.7, "above 0.5")]
)
def test_accuracy_against_epsilon(own: float, said: str, tmp_path: Path) -> None:
    report = protected_report(QUIET, accuracy_against_epsilon=at_budgets(QUIET, own))
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    assert said in page.text
    mine = say_epsilon(report["accuracy_against_epsilon"][0])
    assert f"{mine} this job 60 {own:.3f} {own - 0.09:.2f}–{own + 0.09:.2f}" in page.text
    assert "∞ no noise 0.900" in page.text
    assert "the same job runs with its clip and without noise" in page.text
    assert [line for line in page.named("line") if line["class"] == "level m-local"]


def test_a_job_that_could_not_be_tested_is_no_fault(tmp_path: Path) -> None:
    entries = [budget_entry(QUIET, 30, NOBODY, NOBODY, is_own=True)]
    page = written(protected_report(QUIET, accuracy_against_epsilon=entries), tmp_path)
    assert "cannot be said: there is no interval" in page.text


def test_a_sites_own_page_says_what_its_patients_spent(tmp_path: Path) -> None:
    for plan, said in ((QUIET, "in 26 updates"), (replace(QUIET, noise_seed=1), "void")):
        report = protected_report(plan)
        write_site_page(SitePage("nijmegen", report, [], [], []), tmp_path / "site.html")
        page = parse(tmp_path / "site.html")
        assert said in page.text
        assert say_epsilon(report["guarantee"]["sites"]["nijmegen"]["filter"]) in page.text
