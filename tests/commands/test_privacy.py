"""``histoflare privacy``: what noise costs, and how much an epsilon takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.commands.privacy import Accountant
from histoflare.privacy.accountant import ACCOUNTANTS, calibrate, epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.spend import Spend
from histoflare.privacy.words import say_epsilon, say_further
from tests.refusals import raises_reason

EVENT = ["--sample-rate", 0.2, "--steps", 945, "--delta", 1e-4]
WHOLE = ["--sample-rate", 1, "--steps", 150, "--delta", 1e-5]
FEW = ["--sample-rate", 0.01, "--delta", 0.05]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["privacy", *map(str, arguments)], env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def answers(*arguments: object) -> dict[str, Any]:
    """Return the answers by accountant; ``Infinity`` is no JSON."""
    content = json.loads(run(*arguments, "--json"), parse_constant=pytest.fail)
    assert (content["unit"], content["neighboring_relation"]) == ("patient", "add or remove one")
    return {answer.pop("accountant"): answer for answer in content["answers"]}


def test_every_accountant_can_be_asked_for() -> None:
    assert tuple(Accountant) == ACCOUNTANTS


def test_epsilon_by_every_accountant_that_applies() -> None:
    found = answers("epsilon", "--noise-multiplier", 4, *EVENT)
    assert found == {
        name: {
            "epsilon": epsilon([Spend(4.0, 0.2, 945)], 1e-4, name),
            "epsilon_is_infinite": False,
            "bound_of": name,
        }
        for name in ("rdp", "pld")
    }
    assert list(answers("epsilon", "--noise-multiplier", 4, *WHOLE)) == list(ACCOUNTANTS)
    assert list(answers("epsilon", "--noise-multiplier", 4, *EVENT, "--accountant", "pld")) == ["pld"]


def test_no_noise_is_infinite_and_still_json() -> None:
    found = answers("epsilon", "--noise-multiplier", 0, *WHOLE)
    assert found == {
        name: {"epsilon": None, "epsilon_is_infinite": True, "bound_of": name} for name in ACCOUNTANTS
    }
    said = run("epsilon", "--noise-multiplier", 0, *WHOLE)
    assert "∞" in said and "protects nobody" in said


def test_the_table_says_what_it_promises() -> None:
    said = " ".join(run("epsilon", "--noise-multiplier", 0.05, *WHOLE, "--how").split())
    assert "31 044" in said, "FedDP's noise, over all its rounds, rounded up"
    assert "Per patient" in said and "add or remove one" in said
    assert "gaussian" not in run("epsilon", "--noise-multiplier", 4, *EVENT, "--how")


def test_one_figure_comes_first_and_it_is_the_ledgers() -> None:
    budget, spend = Budget(8.0, 1e-4), Spend(4.0, 0.2, 945)
    said = run("epsilon", "--noise-multiplier", 4, *EVENT)
    assert f"ε = {say_epsilon(budget.spent([spend]))} of 8 at δ = 0.0001" in said
    assert "RDP" not in said and "accountant" not in said
    found = json.loads(run("epsilon", "--noise-multiplier", 4, *EVENT, "--json"))
    assert found["ledger_epsilon"] == budget.spent([spend])


def test_the_noise_for_a_share_is_what_the_ledger_admits_so_often() -> None:
    budget = Budget(8.0, 1e-5)
    found = json.loads(run("calibrate", "--target-epsilon", 8, *WHOLE, "--share", 0.25, "--json"))
    cost = budget.cost(Spend(found["noise_multiplier"], 1, 150))
    assert budget.admits(4 * cost) and not budget.admits(4.01 * cost)
    assert (found["ledger_epsilon"], found["further"]) == (budget.epsilon_of(cost), 3)
    by_rdp = next(each for each in found["answers"] if each["accountant"] == "rdp")
    least = Spend(by_rdp["noise_multiplier"], 1, 150)
    assert by_rdp["ledger_epsilon"] == budget.spent([least]), "what a ledger books for another's noise"
    said = run("calibrate", "--target-epsilon", 8, *WHOLE)
    assert "ε = 8.0 of 8 at δ = 1e-5; nothing is left for a second" in " ".join(said.split())


def test_a_plainer_bound_is_said_to_be_one() -> None:
    def said(*arguments: object) -> str:
        return " ".join(run("epsilon", *arguments, "--accountant", "pld").replace("│", " ").split())

    many = ("--sample-rate", 0.01, "--steps", 10**6, "--delta", 1e-5)
    assert "RDP's plainer bound" in said("--noise-multiplier", 4, *many)
    assert "without sampling" in said("--noise-multiplier", 4, *WHOLE)
    assert "privacy loss distribution; tight" in said("--noise-multiplier", 4, *EVENT)
    assert "RDP's plainer bound" in run("calibrate", "--target-epsilon", 8, *many, "--accountant", "pld")


def test_noise_for_an_epsilon() -> None:
    found = answers("calibrate", "--target-epsilon", 8, *WHOLE)
    assert found == {
        name: {
            "noise_multiplier": calibrate(8, 1e-5, sample_rate=1, steps=150, accountant=name),
            "bound_of": "rdp" if name == "rdp" else "gaussian",
            "ledger_epsilon": Budget(8.0, 1e-5).spent(
                [Spend(calibrate(8, 1e-5, sample_rate=1, steps=150, accountant=name), 1, 150)]
            ),
        }
        for name in ACCOUNTANTS
    }
    assert "7.351" in run("calibrate", "--target-epsilon", 8, *WHOLE, "--accountant", "gaussian")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["epsilon", "--noise-multiplier", -1, *WHOLE], "noise_multiplier: "),
        (["epsilon", "--noise-multiplier", "nan", *WHOLE], "noise_multiplier: "),
        (["epsilon", "--noise-multiplier", 1, *WHOLE, "--delta", 0], "delta: "),
        (["epsilon", "--noise-multiplier", 1, *WHOLE, "--delta", 1], "delta: "),
        (["epsilon", "--noise-multiplier", 1, *WHOLE, "--delta", 0.5], "0.1, not 0.5"),
        (
            ["epsilon", "--noise-multiplier", 1, *WHOLE, "--delta", 0.05, "--sample-rate", 0.01],
            "0.01, not 0.05",
        ),
        (
            ["calibrate", "--target-epsilon", 1, *WHOLE, "--delta", 0.05, "--sample-rate", 0.01],
            "0.01, not 0.05",
        ),
        (["epsilon", "--noise-multiplier", 1, *EVENT, "--accountant", "gaussian"], "sample_rate"),
        (["calibrate", "--target-epsilon", 0, *WHOLE], "epsilon: "),
        (["calibrate", "--target-epsilon", 1e-3, *WHOLE, "--steps", 10**12], "epsilon 0.001 "),
    ],
)
def test_what_cannot_be_answered_is_said(arguments: list[object], says: str) -> None:
    with raises_reason("PRIVACY_INVALID", says):
        run(*arguments)


def test_the_help_says_what_a_patients_sensitivity_is() -> None:
    said = " ".join(run("epsilon", "--help").replace("│", " ").split())
    assert "÷ sensitivity" in said and "2 × clip_norm" in said


def test_a_budget_that_is_used_up_is_not_one_that_was_too_small() -> None:
    said = [
        say_further(0, share, before)
        for share, before in ((1.25, 1.0), (1.25, 0.9), (1.25, 1e-12), (1, 0.75))
    ]
    assert "used up" in said[0] and "is left" in said[1] and "there is" in said[2] and "second" in said[3]


def test_advice_compares_models_with_own_and_with_shared_noise() -> None:
    found = json.loads(run("advise", "--patients", "4x40", "--epsilon", 3, "--json"))
    assert [(row["job"], row["noise"]) for row in found] == [
        ("linear_shared", noise) for noise in ("own", "shared")
    ]
    assert found[0]["outputs"] == 2
    assert all(row["honest"] == (3 if row["noise"] == "shared" else 1) for row in found)
    two = json.loads(run("advise", "--patients", "2x40", "--job", "linear_shared", "--json"))
    assert [row["noise"] for row in two] == ["own"], "noise is shared by two beside one that colludes"
    assert found[0]["preset"] == "private-small" and two[0]["preset"] is None
    said = run("advise", "--patients", "4x200")
    assert "ε holds against" in said and "--preset private;" in said
    with raises_reason("JOB_INVALID", "bags"):
        run("advise", "--patients", "4x40", "--job", "dhunet_dpsgd")


@pytest.mark.parametrize("patients", ["40", "0x40", "4x", "4x40x2", "-4x40"])
def test_advice_asks_for_hospitals_and_patients(patients: str) -> None:
    with raises_reason("JOB_INVALID", "--patients"):
        run("advise", f"--patients={patients}")
