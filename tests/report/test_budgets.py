"""A point of accuracy against ε says what it cost and what it gave."""

from __future__ import annotations

import json

import pytest

from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import Open, UpdateNoise
from histoflare.report.budgets import budget_entry
from histoflare.rounds.comparison import Comparison, SiteComparison
from tests.report.made import metrics

FOUND = Comparison(
    {
        "a": SiteComparison(10, 5, None, metrics(0.6), None),
        "b": SiteComparison(10, 5, None, metrics(0.8), None),
        "untested": SiteComparison(10, 0, None, None, None),
    },
    metrics(0.65, sex={"F": None}),
    None,
    {},
    {},
)
BOUNDS = Comparison(
    {
        "a": SiteComparison(10, 5, metrics(0.5), None, None),
        "b": SiteComparison(10, 5, metrics(0.54), None, None),
    },
    None,
    None,
    {},
    {},
)


def test_an_entry_of_a_noisy_plan() -> None:
    plan = UpdateNoise(noise_multiplier=20.0)
    entry = json.loads(json.dumps(budget_entry(plan, 7, FOUND, BOUNDS, is_own=True), allow_nan=False))
    assert entry["epsilon"] == Budget(8.0, 1e-5).spent([plan.spend().times(7)])
    assert entry["epsilon_is_infinite"] is False
    assert (entry["mechanism"], entry["rounds"], entry["is_own"]) == ("update-noise", 7, True)
    assert (entry["delta"], entry["noise_multiplier"], entry["seeded_noise"]) == (1e-5, 20.0, False)
    assert entry["balanced_accuracy"] == 0.65
    assert entry["balanced_accuracy_ci95"] == pytest.approx([0.59, 0.71])
    assert entry["auc"] == pytest.approx(0.691)
    assert entry["site_mean"] == pytest.approx(0.7), "a site without test patients does not count"
    assert entry["local_mean"] == 0.52
    assert "subgroups" not in entry


def test_an_entry_without_protection_and_without_figures() -> None:
    entry = budget_entry(Open(), 7, Comparison({}, None, None, {}, {}), Comparison({}, None, None, {}, {}))
    assert (entry["epsilon"], entry["epsilon_is_infinite"]) == (None, True)
    assert (entry["balanced_accuracy"], entry["site_mean"], entry["local_mean"]) == (None, None, None)
    assert entry["is_own"] is False


def test_repeatable_noise_is_said() -> None:
    plan = UpdateNoise(noise_multiplier=20.0, noise_seed=1)
    assert budget_entry(plan, 1, FOUND, BOUNDS)["seeded_noise"] is True
