"""What is written of a guarantee is true: bounds are rounded up, and a but is not left out."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.privacy.words import say_delta
from histoflare.report.guarantee_words import (
    WEAK,
    say_chance,
    say_epsilon,
    say_guarantee,
    say_how,
    say_not_covered,
    say_published,
    say_site,
    say_title,
)
from tests.report.made import full_report, protected_report

QUIET = UpdateNoise(noise_multiplier=60.0)


def said(value: float | None) -> str:
    return say_epsilon({"epsilon": value, "epsilon_is_infinite": value is None})


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (2.8912, "2.9"),
        (2.9, "2.9"),
        (8.000000000000002, "8.0"),
        (0.9998, "1.00"),
        (0.0012341, "0.01"),
        (7.769, "7.8"),
        (4.4000001, "4.5"),
        (9.991, "10.0"),
        (99.95, "100.0"),
        (122_087.3, "122\u202f088"),
        (None, "∞"),
    ],
)
def test_an_epsilon_is_rounded_up(value: float | None, written: str) -> None:
    assert said(value) == written


@given(st.floats(1e-6, 1e9))
def test_what_is_written_bounds_what_is_meant(value: float) -> None:
    written = float(said(value).replace("\u202f", ""))
    exact = Decimal(value) * (1 - Decimal("1e-9"))
    assert exact <= Decimal(said(value).replace("\u202f", "")), "never below, but for what a budget lets pass"
    assert written <= value + (0.01 if value < 1 else 0.1 if value < 1000 else 1)


@pytest.mark.parametrize(("delta", "written"), [(1e-5, "1e-5"), (0.0001, "0.0001"), (2.5e-6, "2.5e-6")])
def test_a_delta_is_short(delta: float, written: str) -> None:
    assert say_delta(delta) == written


def test_the_bottom_line() -> None:
    quiet = protected_report(QUIET)["guarantee"]
    bound = said(quiet["epsilon"])
    budget = Budget(8.0, 1e-5)
    assert bound == said(budget.spent([QUIET.spend().times(30)])), "the ledger's figure"
    more = budget.room_for(*[budget.cost(QUIET.spend().times(30))] * 2)
    assert say_guarantee(quiet) == (
        f"This job spends ε = {bound} of 8 for each patient, at δ = 1e-5; {more} more like it fit where "
        "nothing else was spent (shares of a budget add up, ε does not)."
    )
    assert say_title(quiet) == f"Privacy: spends ε = {bound} of 8 at δ = 1e-5"
    how = " ".join(say_how(quiet))
    assert said(quiet["federation"]["gaussian"]["epsilon"]) in how and "add or remove one" in how
    whole = UpdateNoise(budget_share=1.0).settled(30, 100)
    assert "ε = 8.0 of 8 for each patient, at δ = 1e-5; nothing is left for a second." in say_guarantee(
        protected_report(whole)["guarantee"]
    )
    loud = protected_report(UpdateNoise(noise_multiplier=0.05))["guarantee"]
    assert say_guarantee(loud).endswith(WEAK)
    open_report = full_report()["guarantee"]
    assert say_guarantee(open_report) == "Nothing protects the updates: ε = ∞ for every patient."
    assert say_title(open_report) == "Privacy: none guaranteed (ε = ∞)"
    bare = protected_report(UpdateNoise(noise_multiplier=0.0))["guarantee"]
    assert "nothing protects the updates" in say_guarantee(bare)
    assert say_title(bare) == "Privacy: none (ε = ∞)"


def test_a_guarantee_with_a_but_says_it() -> None:
    seeded = protected_report(UpdateNoise(noise_multiplier=60.0, noise_seed=1))["guarantee"]
    assert say_guarantee(seeded).startswith("There is no guarantee")
    assert "∞" in say_title(seeded)
    assert "void" in say_site(seeded, "graz")
    served = protected_report(UpdateNoise(noise_multiplier=60.0, noise_location="server"))["guarantee"]
    assert "against the server ε = ∞." in say_guarantee(served)


def test_a_site_hears_what_its_own_patients_spent() -> None:
    found = protected_report(QUIET)["guarantee"]
    own = say_site(found, "nijmegen")
    spent = said(Budget(8.0, 1e-5).spent([QUIET.spend().times(26)]))
    assert f"spent ε = {spent} of 8 in 26 updates" in own
    assert say_site(found, "nobody") == ""
    assert say_site(full_report()["guarantee"], "graz") == ""


def test_a_stated_figure_is_put_beside_the_true_one() -> None:
    reserved: dict[str, Any] = {
        "filter": {"epsilon": 6.411},
        "rdp": {"epsilon": 6.233},
        "pld": {"epsilon": 5.701},
    }
    assert say_published(None, reserved, 3, 1e-4) is None
    assert say_published(6.23, reserved, 3, 1e-4) is None
    note = say_published(2.90, reserved, 3, 1e-4)
    assert note is not None
    assert "states ε = 2.9;" in note
    assert "over all 3 rounds, at δ = 0.0001, is ε = 6.5 (6.3 by RDP at its best order" in note
    assert "5.8 by PLD)" in note


def test_what_is_not_covered() -> None:
    found = protected_report(DpSgd(noise_multiplier=2.0, sample_rate=0.2))["guarantee"]
    assert "1 evaluation of the last model" in say_not_covered(found)
    assert "metrics that sites sent in the rounds, 120 in all" in say_not_covered(found)
    bare = protected_report(QUIET, evaluated_at_sites=None)["guarantee"]
    assert "evaluation" not in say_not_covered(bare)
    assert "the bounds (local, pooled) and at other budgets" in say_not_covered(bare)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.45, 0.61], "which includes 0.5: not distinguishable from chance."),
        ([0.5, 0.61], "not distinguishable"),
        ([0.51, 0.61], "above 0.5"),
        ([0.31, 0.41], "below 0.5"),
        (None, "cannot be said"),
    ],
)
def test_chance(interval: list[float] | None, expected: str) -> None:
    entry = {"epsilon": 8.0, "epsilon_is_infinite": False, "balanced_accuracy_ci95": interval}
    assert expected in say_chance(entry, "balanced_accuracy", 0.5)
    assert "cannot be said" in say_chance(entry, "balanced_accuracy", None)
