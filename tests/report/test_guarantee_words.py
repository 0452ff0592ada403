"""What is written of a guarantee is true: bounds are rounded up, and a but is not left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.report.guarantee_words import (
    WEAK,
    say_chance,
    say_delta,
    say_epsilon,
    say_guarantee,
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
        (2.8912, "2.90"),
        (2.9, "2.90"),
        (8.000000000000002, "8.00"),
        (0.9998, "1.00"),
        (0.0012341, "0.00124"),
        (9.991, "10.0"),
        (99.95, "100"),
        (122_087.3, "122\u202f088"),
        (None, "∞"),
    ],
)
def test_an_epsilon_is_rounded_up(value: float | None, written: str) -> None:
    assert said(value) == written


@given(st.floats(1e-6, 1e9))
def test_what_is_written_bounds_what_is_meant(value: float) -> None:
    written = float(said(value).replace("\u202f", ""))
    assert value * (1 - 2e-9) <= written <= value * 1.0101


@pytest.mark.parametrize(("delta", "written"), [(1e-5, "1e-5"), (0.0001, "0.0001"), (2.5e-6, "2.5e-6")])
def test_a_delta_is_short(delta: float, written: str) -> None:
    assert say_delta(delta) == written


def test_the_bottom_line() -> None:
    quiet = protected_report(QUIET)["guarantee"]
    exact, bound = said(quiet["federation"]["gaussian"]["epsilon"]), said(quiet["epsilon"])
    assert say_guarantee(quiet) == (
        f"For each patient ε = {bound} at δ = 1e-5 (RDP; {exact} by exact Gaussian), add or remove one."
    )
    assert say_title(quiet) == f"Privacy: ε = {bound} for each patient at δ = 1e-5"
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
    assert "Against the server ε = ∞." in say_guarantee(served)


def test_a_site_hears_what_its_own_patients_spent() -> None:
    found = protected_report(QUIET)["guarantee"]
    own = say_site(found, "nijmegen")
    assert f"ε = {said(found['sites']['nijmegen']['rdp']['epsilon'])} (RDP; " in own
    assert "in 26 updates" in own
    assert say_site(found, "nobody") == ""
    assert say_site(full_report()["guarantee"], "graz") == ""


def test_a_stated_figure_is_put_beside_the_true_one() -> None:
    reserved: dict[str, Any] = {"rdp": {"epsilon": 6.233}, "pld": {"epsilon": 5.701}}
    assert say_published(None, reserved, 3, 1e-4) is None
    assert say_published(6.24, reserved, 3, 1e-4) is None
    note = say_published(2.90, reserved, 3, 1e-4)
    assert note is not None
    assert "states ε = 2.9;" in note
    assert "over all 3 rounds, at δ = 0.0001, is ε = 6.24 (RDP; 5.71 by PLD)" in note


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
