"""Tests of what a report says of an evaluation under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.spend import Spend
from histoflare.privacy.tally import Tally
from histoflare.report.beside_updates import say_also_left
from histoflare.report.evaluation_noise import WHY_DROWNED, say_evaluation_noise, state_evaluation
from histoflare.report.page import write_page
from histoflare.report.returned import write_returned_headline
from tests.report.made import full_report

LOCAL = Tally(noise_multiplier=1.5)
SHARED = Tally(noise_multiplier=1.5, noise="shared", honest=3)
FIGURES = {"balanced_accuracy": 0.75, "balanced_accuracy_low": 0.6, "balanced_accuracy_high": 0.9}
TOTAL = {"sites": ["amsterdam", "graz"], "noise_std": 2.1, "figures": FIGURES, "counts": [0.0]}


def stated(tally: Tally = LOCAL, total: Any = TOTAL) -> dict[str, Any]:
    return state_evaluation(tally.to_json(), tally.spend().to_json(), total)


def test_what_it_cost_is_the_ledgers_figure() -> None:
    found = stated()
    assert found["epsilon"] == pytest.approx(Budget(8.0, 1e-5).spent([Spend(1.5)]))
    assert (found["delta"], found["budget_epsilon"]) == (1e-5, 8.0)
    assert found["if_all_collude"] is None
    assert found["together"] == {"sites": ["amsterdam", "graz"], "figures": FIGURES}


def test_of_shared_noise_both_figures_are_stated() -> None:
    found = stated(SHARED)
    alone = epsilon([SHARED.spend().alone()], 1e-5)
    assert found["if_all_collude"]["epsilon"] == pytest.approx(alone) and alone > found["epsilon"]
    assert "3" in say_evaluation_noise(found)


def test_repeatable_noise_is_said_to_protect_nobody() -> None:
    tally = Tally(noise_multiplier=1.5, noise_seed=7)
    said = say_evaluation_noise(state_evaluation(tally.to_json(), tally.spend().to_json(), None))
    assert "protects nobody" in said and "ε" not in said


def test_without_noise_nothing_is_said_of_it() -> None:
    assert say_evaluation_noise(None) == ""


def test_the_consortiums_page_has_all_sites_together_and_the_cost(tmp_path: Path) -> None:
    said = {"graz": {"balanced_accuracy": None}}
    report = full_report(
        evaluated_at_sites=said, evaluation_noise=stated(), pseudonyms={"graz": "river"}, runtime="poc"
    )
    assert report["evaluation_noise"]["together"]["sites"] == ["amsterdam", "river"]
    assert report["evaluated_at_sites"].keys() == {"river"}
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "all sites together" in page and say_evaluation_noise(report["evaluation_noise"]) in page
    assert WHY_DROWNED in page and "their policies let them out" not in page


def test_what_came_back_begins_with_the_figure_of_all_sites() -> None:
    report = full_report(evaluated_at_sites={"graz": {}}, evaluation_noise=stated(), evaluation_refused={})
    report |= {"sites": {}, "federated": None, "evaluated_model": "last"}
    assert "0.750 (0.60–0.90)" in write_returned_headline(report).verdict


@pytest.mark.parametrize("site", ["amsterdam", "graz"])
def test_a_sites_page_says_that_counts_left_with_noise(site: str) -> None:
    report = full_report(evaluated_at_sites={"graz": {}}, evaluation_noise=stated())
    (said,) = say_also_left(report, site)
    assert "without noise" not in said and say_evaluation_noise(report["evaluation_noise"]) in said
    assert say_also_left(full_report(evaluated_at_sites={}, evaluation_noise=stated()), "nijmegen") == []
