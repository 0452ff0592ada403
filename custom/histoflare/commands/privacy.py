"""``histoflare privacy``: what noise costs, and how much noise a budget takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json
from histoflare.commands.options import AsJson, How
from histoflare.commands.privacy_advice import show_advice
from histoflare.commands.privacy_plan import show_plan
from histoflare.errors import JobError
from histoflare.privacy.accountant import ACCOUNTANTS
from histoflare.privacy.spend import ADD_OR_REMOVE_ONE, UNIT
from histoflare.privacy.words import say_cost, say_delta, say_epsilon, say_room

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget

app = typer.Typer(no_args_is_help=True)
app.command("plan")(show_plan)
app.command("advise")(show_advice)


class Accountant(StrEnum):
    """The accountants, as ``--accountant`` takes them."""

    RDP = "rdp"
    PLD = "pld"
    GAUSSIAN = "gaussian"


MEANINGS = {
    "rdp": "Rényi DP at its best order; a little too high",
    "pld": "privacy loss distribution; tight",
    "gaussian": "exact; only where nothing is sampled",
}

INSTEAD = {
    "rdp": "RDP's plainer bound: the tight one would take too long here, or is no lower",
    "gaussian": "the exact figure of these steps without sampling",
}
"""Whose figure stands for ``pld``'s → what to say of it."""

GUARANTEE = (
    f"Per {UNIT}, with all slides; neighbouring cohorts: {ADD_OR_REMOVE_ONE}. These are for jobs fixed "
    "beforehand, and admit nothing: a ledger, for jobs chosen after seeing results, counts at one order of "
    "its budget, as above. The sampler takes "
    "(1 + e^epsilon) x 2^-113 of delta for each number drawn (privacy plan counts it for a job)."
)

NoiseMultiplier = Annotated[
    float,
    typer.Option(
        help="Standard deviation of the noise ÷ sensitivity: ÷ the most that one patient can move what is "
        "sent. DP-SGD per patient: the sensitivity is clip_norm. Noise on a site's whole update: it is "
        "2 × clip_norm, for one patient can turn a clipped update round.",
    ),
]
SampleRate = Annotated[
    float,
    typer.Option(
        help="With which probability a patient is drawn into a step, above 0 and at most 1: expected batch ÷ "
        "agreed cohort size. 1: every patient in every step, as with noise on a whole update."
    ),
]
Steps = Annotated[
    int,
    typer.Option(help="How often noise is added, over all rounds: DP-SGD's steps, or a site's updates."),
]
Delta = Annotated[
    float,
    typer.Option(help="With which probability epsilon may fail to hold; well below 1 ÷ number of patients."),
]
BudgetEpsilon = Annotated[float, typer.Option(help="ε of the patient's lifetime budget, above 0.")]
Which = Annotated[
    Accountant | None, typer.Option(help="With --how only this other way of counting; none: all that apply.")
]


@app.callback()
def _group() -> None:
    """Work out what noise costs in privacy (epsilon), or how much noise an epsilon takes.

    Epsilon bounds how much what a hospital sends can betray of one patient: whatever an onlooker sees is at
    most e^epsilon times as likely because that patient took part (2.7 times for epsilon 1, 22,000 times for
    10), but for a chance of delta. It says nothing about how good the model gets.
    """


@app.command("epsilon")
def show_epsilon(
    noise_multiplier: NoiseMultiplier,
    sample_rate: SampleRate,
    steps: Steps,
    delta: Delta,
    budget_epsilon: BudgetEpsilon = 8.0,
    accountant: Which = None,
    how: How = False,
    as_json: AsJson = False,
) -> None:
    """Show what training with noise spends of a patient's lifetime budget, as a site's ledger counts it.

    Example: histoflare privacy epsilon --noise-multiplier 4 --sample-rate 0.0454 --steps 3966 --delta 1e-4
    """
    from histoflare.privacy.accountant import count
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.spend import Spend

    spend = Spend(noise_multiplier, sample_rate, steps)
    _check_delta(delta, sample_rate)
    budget = Budget(budget_epsilon, delta)
    cost = budget.cost(spend)
    if as_json:
        figures = {name: count([spend], delta, name) for name in _asked(accountant, sample_rate)}
        answers: list[dict[str, Any]] = [
            {
                "accountant": name,
                "epsilon": _json(figure),
                "epsilon_is_infinite": math.isinf(figure),
                "bound_of": whose,
            }
            for name, (figure, whose) in figures.items()
        ]
        print_json(_facts(delta) | spend.to_json() | _spent(budget, cost) | {"answers": answers})
        return
    spent = say_cost(budget.epsilon_of(cost), budget.epsilon)
    _say(f"This spends ε = {spent} at δ = {say_delta(delta)}; {say_room(budget, cost, cost)}.")
    if math.isinf(cost):
        _say("∞: this protects nobody.")
    if how or accountant is not None:
        figures = {name: count([spend], delta, name) for name in _asked(accountant, sample_rate)}
        _print_table(
            f"ε at δ = {say_delta(delta)}: noise multiplier {noise_multiplier:g}, sample rate "
            f"{sample_rate:g}, {steps:,} steps",
            ("ε",),
            [(name, say_epsilon(figure), _meaning(name, whose)) for name, (figure, whose) in figures.items()],
        )


@app.command("calibrate")
def show_noise(
    target_epsilon: Annotated[float, typer.Option(help="ε of the patient's lifetime budget, above 0.")],
    sample_rate: SampleRate,
    steps: Steps,
    delta: Delta,
    share: Annotated[float, typer.Option(help="Which part of that budget the job may take.")] = 1.0,
    accountant: Which = None,
    how: How = False,
    as_json: AsJson = False,
) -> None:
    """Show the least noise multiplier with which training fits a budget, and what a ledger books for it.

    The noise itself is the multiplier × the sensitivity. DP-SGD per patient: × clip_norm. Noise on a site's
    whole update, for one patient: × 2 × clip_norm.

    Example: histoflare privacy calibrate --target-epsilon 8 --sample-rate 1 --steps 150 --delta 1e-5
    """
    from histoflare.privacy.accountant import calibrate, count
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.spend import Spend

    _check_delta(delta, sample_rate)
    budget = Budget(target_epsilon, delta)
    noise = budget.calibrate(sample_rate, steps, share)
    cost = budget.cost(Spend(noise, sample_rate, steps))
    others: dict[str, tuple[float, str, float]] = {}
    if how or as_json or accountant is not None:
        for name in _asked(accountant, sample_rate):
            least = calibrate(target_epsilon, delta, sample_rate=sample_rate, steps=steps, accountant=name)
            spend = Spend(least, sample_rate, steps)
            others[name] = least, count([spend], delta, name)[1], budget.spent([spend])
    if as_json:
        answers = [
            {
                "accountant": name,
                "noise_multiplier": least,
                "bound_of": whose,
                "ledger_epsilon": _json(booked),
            }
            for name, (least, whose, booked) in others.items()
        ]
        asked = {"target_epsilon": target_epsilon, "share": share, "sample_rate": sample_rate, "steps": steps}
        found = {"noise_multiplier": noise} | _spent(budget, cost)
        print_json(_facts(delta) | asked | found | {"answers": answers})
        return
    spent = say_cost(budget.epsilon_of(cost), budget.epsilon)
    _say(
        f"Noise multiplier {noise:.5g}: this spends ε = {spent} at δ = {say_delta(delta)}; "
        f"{say_room(budget, cost, cost)}."
    )
    if others:
        _print_table(
            f"Least noise for ε = {target_epsilon:g} at δ = {say_delta(delta)}, had all been fixed before",
            ("noise multiplier", "a ledger books"),
            [
                (name, f"{least:.5g}", say_cost(booked, budget.epsilon), _meaning(name, whose))
                for name, (least, whose, booked) in others.items()
            ],
        )


def _json(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _asked(accountant: Accountant | None, sample_rate: float) -> list[str]:
    """Return the accountant that was asked for, or all that apply."""
    if accountant is not None:
        return [accountant.value]
    return [name for name in ACCOUNTANTS if name != "gaussian" or sample_rate == 1]


def _meaning(name: str, whose: str) -> str:
    """Return what an accountant's figure is, where another's may stand for it."""
    if whose == name:
        return MEANINGS[name]
    return INSTEAD[whose]


def _check_delta(delta: float, sample_rate: float) -> None:
    """Refuse a δ of at least 1 ÷ the number of patients, as far as a sample rate tells how many there are."""
    if 0 < sample_rate < delta < 1:
        raise JobError(
            f"delta: below the sample rate {sample_rate:g}, not {delta:g}: where a step draws a patient or "
            f"more there are at least {1 / sample_rate:,.0f}, and delta is well below 1 ÷ their number.",
            reason="PRIVACY_INVALID",
        )


def _facts(delta: float) -> dict[str, Any]:
    return {"unit": UNIT, "neighboring_relation": ADD_OR_REMOVE_ONE, "delta": delta}


def _print_table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = make_table("accountant", *columns, "what it is", title=title)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    _say(GUARANTEE)


def _spent(budget: Budget, cost: float) -> dict[str, Any]:
    """Return what a ledger books, as JSON."""
    return {
        "budget_epsilon": budget.epsilon,
        "ledger_epsilon": _json(budget.epsilon_of(cost)),
        "further": budget.room_for(cost, cost),
    }


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False)
