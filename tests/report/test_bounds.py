"""The report names the bounds: those under the federation's protection with their ε, the others as such."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, Open, PrivacyPlan, UpdateNoise
from histoflare.report.bounds import models_of, name_model, state_bounds
from histoflare.report.budgets import budget_entry
from histoflare.report.consortium import results_table
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.headline import write_headline
from histoflare.rounds.bounds import Course, Courses, without_noise
from histoflare.rounds.comparison import Comparison, SiteComparison
from tests.report.made import HOSTILE, full_report, metrics, protected_report
from tests.report.parsed import assert_loads_nothing
from tests.report.test_page import figures_in, written

SITES = ["amsterdam", "graz", HOSTILE, "nijmegen"]
PLAN = DpSgd(noise_multiplier=1.1, sample_rate=0.2, batch_size=8, steps=2)
QUIET = UpdateNoise(noise_multiplier=60.0)
BUDGET = Budget(8.0, 1e-5)
IN_POOL = DpSgd(noise_multiplier=1.1, sample_rate=0.05, batch_size=8, steps=8)


def courses_of(plan: PrivacyPlan, pooled: PrivacyPlan) -> Courses:
    """Thirty rounds; the first site is asked in half of them."""
    steps = dict.fromkeys(SITES, (2,) * 30) | {SITES[0]: (2, 0) * 15}
    return Courses({site: Course(each, plan) for site, each in steps.items()}, Course((7, 8) * 15, pooled))


def bounded(free: float, **changes: Any) -> dict[str, Any]:
    """A run under noise on the update whose unprotected pooled model reaches ``free``."""
    figures = {
        site: SiteComparison(60, 20, *(metrics(0.6 + 0.01 * n, 10 + n) for n in range(5))) for site in SITES
    }
    courses = courses_of(QUIET, QUIET)
    given = {
        "bounds": state_bounds(courses, without_noise(courses, 1), None),
        "site_figures": figures,
        "pooled_unprotected": metrics(free, 46),
        "local_unprotected": {site: metrics(0.66 + 0.01 * n, 46) for n, site in enumerate(SITES)},
    }
    return protected_report(QUIET, **given | changes)


def test_every_bound_states_what_it_spends() -> None:
    courses = courses_of(PLAN, IN_POOL)
    stated = json.loads(json.dumps(state_bounds(courses, without_noise(courses, 1), None), allow_nan=False))
    assert list(stated) == ["local", "pooled", "local_unprotected", "pooled_unprotected"]
    assert stated["local"]["epsilon"] == BUDGET.spent([PLAN.spend().times(30)]), "the most"
    assert stated["local"]["steps"] == [30, 60]
    assert stated["pooled"]["epsilon"] == pytest.approx(BUDGET.spent(courses.pooled.spends), rel=1e-12)
    assert (stated["pooled"]["steps"], stated["pooled"]["sample_rate"]) == ([225, 225], 0.05)
    for model in ("local_unprotected", "pooled_unprotected"):
        assert (stated[model]["epsilon"], stated[model]["noise_multiplier"]) == (None, 0.0)
        assert stated[model]["clip_norm"] == PLAN.clip_norm
        assert stated[model]["seeded_noise"] is False, "there is no noise to repeat"


def test_an_open_run_has_three_models_and_their_steps() -> None:
    stated = state_bounds(courses_of(Open(), Open()), None, 4)
    assert stated["pooled"]["steps"] == [225, 225]
    assert (stated["pooled"]["batch_size"], stated["pooled"]["epsilon"]) == (4, None)
    report = full_report(bounds=stated)
    assert models_of(report) == ("local", "federated", "pooled")
    assert [name_model(report, model) for model in models_of(report)] == ["local", "federated", "pooled"]


@pytest.mark.parametrize("seed", [None, 3])
def test_the_page_names_every_bound_with_its_epsilon(tmp_path: Path, seed: int | None) -> None:
    plan = UpdateNoise(noise_multiplier=60.0, noise_seed=seed)
    courses = courses_of(plan, plan)
    report = bounded(0.9, bounds=state_bounds(courses, without_noise(courses, 1), 4))
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    void = "" if seed is None else ", void"
    for model in ("local", "pooled"):
        assert f"{model} (ε = {say_epsilon(report['bounds'][model])}{void})" in page.text
        assert f"{model}, unprotected" in page.text
    assert "pooled, unprotected 225 4 1 0 ∞ –" in page.text
    for value, _ in figures_in({key: report[key] for key in report if key != "participation"}):
        assert ("–" if value is None else f"{value:.3f}") in page.text


def test_the_terminal_names_every_bound() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    report = bounded(0.9)
    console.print(results_table(report))
    text = console.export_text()
    said = " ".join(text.split())
    assert "with the same clip and no noise: local, unprotected 0.675 · 0.716; pooled, unprotected 0." in said
    assert f"ε = {say_epsilon(report['bounds']['pooled'])}" in said
    assert max(map(len, text.splitlines())) <= 80


def test_a_reader_learns_whether_noise_is_the_reason() -> None:
    guessing = {"federated": metrics(0.52, 46)}
    reason = "is at chance, too: the settings or the data are the reason, not privacy."
    place = "the model trained on all slides in one place"
    assert f"Without noise {place} {reason}" in write_headline(bounded(0.51, **guessing)).cautions
    headline = write_headline(bounded(0.93, **guessing))
    assert f"Without noise {place} is above chance: there is something to learn." in headline.cautions
    assert "Without noise the model trained on all their slides in one place reaches 0.930" in headline.result
    better = write_headline(bounded(0.93, federated=metrics(0.8, 46)))
    assert "Without noise" not in " ".join(better.cautions)
    assert "Without noise" not in " ".join(write_headline(full_report(**guessing)).cautions)


def test_the_same_job_without_noise_tells_most() -> None:
    """A federation that guesses without noise, too, was not trained long or fast enough."""
    found = Comparison({}, metrics(0.52, 46), None, {}, {})
    entries = [
        budget_entry(QUIET, 30, found, found, is_own=True),
        budget_entry(QUIET.without_noise(1), 30, found, found),
    ]
    report = bounded(0.93, federated=metrics(0.52, 46), accuracy_against_epsilon=entries)
    said = write_headline(report).cautions
    assert (
        "Without noise the federated model is at chance, too: the settings or the data are the reason, not "
        "privacy." in said
    )
    assert any("in one place is above chance" in each for each in said)
    assert entries[1]["seeded_noise"] is False


def test_the_sentence_says_the_epsilon_of_the_bounds() -> None:
    report = bounded(0.9)
    local, pooled = (say_epsilon(report["bounds"][model]) for model in ("local", "pooled"))
    said = write_headline(report).result
    assert f"the sites' own models (ε = {local}) reach" in said
    assert f"in one place (ε = {pooled}) 0.840" in said


def test_the_page_warns_that_pooled_need_not_be_above(tmp_path: Path) -> None:
    said = "pooled need not be above federated"
    assert said in written(bounded(0.9), tmp_path).text
    stated = state_bounds(courses_of(Open(), Open()), None, 4)
    assert said not in written(full_report(bounds=stated), tmp_path).text
