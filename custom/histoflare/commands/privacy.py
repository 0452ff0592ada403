"""``histoflare privacy``: what noise costs, and how much noise a budget takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json
from histoflare.commands.options import Preset
from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.accountant import ACCOUNTANTS
from histoflare.privacy.spend import ADD_OR_REMOVE_ONE, UNIT
from histoflare.privacy.words import say_cost, say_delta, say_epsilon, say_room

if TYPE_CHECKING:
    from histoflare.flare.job import Job
    from histoflare.privacy.budget import Budget
    from histoflare.privacy.policy import Policy

app = typer.Typer(no_args_is_help=True)


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
How = Annotated[bool, typer.Option("--how", help="Show also what other ways of counting say.")]
Which = Annotated[Accountant | None, typer.Option(help="With --how only this other way of counting; none: all that apply.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON; an infinite epsilon is null, and said to be infinite.")
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
            f"ε at δ = {say_delta(delta)}: noise multiplier {noise_multiplier:g}, sample rate {sample_rate:g}, "
            f"{steps:,} steps",
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
            {"accountant": name, "noise_multiplier": least, "bound_of": whose, "ledger_epsilon": _json(booked)}
            for name, (least, whose, booked) in others.items()
        ]
        asked = {"target_epsilon": target_epsilon, "share": share, "sample_rate": sample_rate, "steps": steps}
        found = {"noise_multiplier": noise} | _spent(budget, cost)
        print_json(_facts(delta) | asked | found | {"answers": answers})
        return
    spent = say_cost(budget.epsilon_of(cost), budget.epsilon)
    _say(
        f"Noise multiplier {noise:.5g}: this spends ε = {spent} at δ = {say_delta(delta)}; {say_room(budget, cost, cost)}."
    )
    if others:
        _print_table(
            f"Least noise for ε = {target_epsilon:g} at δ = {say_delta(delta)}, had all been fixed beforehand",
            ("noise multiplier", "a ledger books"),
            [
                (name, f"{least:.5g}", say_cost(booked, budget.epsilon), _meaning(name, whose))
                for name, (least, whose, booked) in others.items()
            ],
        )


@app.command("plan")
def show_plan(
    job: Annotated[Path, typer.Argument(help="A job folder, e.g. jobs/mem_dpsgd.")],
    site: Annotated[Path, typer.Option(help="The site's own file, e.g. local/histoflare.toml.")],
    policy: Annotated[
        Path | None, typer.Option(help="A signed policy; none: policy_<scope>.toml beside the site's file.")
    ] = None,
    preset: Preset = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job would cost this site's patients, and whether the site would admit it. Books nothing.

    The exit code is 3 if the site would refuse it.

    Example: histoflare privacy plan jobs/mem_dpsgd --site local/histoflare.toml
    """
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_schema import TRAINING
    from histoflare.flare.site_policy import policy_file
    from histoflare.privacy.accountant import epsilon
    from histoflare.privacy.own_policy_file import read_site_policy
    from histoflare.rounds.strategy import count_sent_by_job
    from histoflare.site.configuration import read_site_file
    from histoflare.site.data import device_of, slides_of_a_patient
    from histoflare.site.likely_time import likely_seconds
    from histoflare.site.preview import preview

    read, configuration = choose_job(job, preset).job, read_site_file(site)
    local = site.absolute().parent
    rules = read_site_policy(policy or local / policy_file(read.scope), local)
    trains = read.kind == TRAINING
    refusal: HistoflareError | None = _refused_otherwise(read, rules, local, trains=trains)
    if not trains:
        limit = rules.protection.evaluations if rules.protection else "any number of"
        out.print(
            f"An evaluation: no ε. The policy lets {limit} evaluations over a patient out.", highlight=False
        )
        if refusal is None and rules.protection is not None and read.answer_seconds is None:
            refusal = JobError(
                "Under this policy job.toml must say answer_seconds.", reason="PRIVACY_INVALID"
            )
        _say_refusal(refusal)
        raise typer.Exit(0 if refusal is None else 3)
    weights = count_sent_by_job(read.strategy, read.task)
    found = preview(
        configuration,
        rules,
        read.plan,
        read.rounds,
        weights,
        list(read.task.labels),
        read.task.data,
        read.split,
    )
    refusal = refusal or found.refusal
    spend = read.plan.spend().times(read.rounds)
    tight = "pld" if spend.sample_rate < 1 else "gaussian"
    delta = found.budget.delta
    tightly = epsilon([spend], delta, tight)
    most_slides = slides_of_a_patient(configuration, list(read.task.labels), read.task.data)
    device = device_of(configuration)
    takes = likely_seconds(read.task, read.plan, max(1, found.patients), most_slides, device)
    if as_json:
        facts = {
            "job": read.name,
            "rounds": read.rounds,
            "mechanism": read.plan.mechanism,
            "spend": spend.to_json(),
            "patients_to_train_on": found.patients,
            "budget": found.budget.epsilon,
            "spent": _json(found.before),
            "job_alone": _json(found.alone),
            f"job_alone_by_{tight}": _json(tightly),
            "together": _json(found.after),
            "weights": weights,
            "sampler_delta": found.sampler_delta,
            "answer_seconds": read.answer_seconds,
            "likely_seconds": takes,
            "admitted": refusal is None,
            "reason": refusal and refusal.reason,
        }
        print_json(_facts(delta) | facts)
    else:
        table = make_table("for one patient, the most exposed", "ε", title=f"{job}: {read.rounds} rounds")
        table.add_row("spent so far", _shown(found.before))
        table.add_row("this job", _shown(found.alone))
        table.add_row(f"this job by {tight}, for comparison", _shown(tightly))
        table.add_row("together", _shown(found.after))
        table.add_row("budget", _shown(found.budget.epsilon))
        out.print(table)
        about = (
            f"{read.plan.describe()} δ = {say_delta(delta)}, of which the sampler of the noise takes "
            f"{found.sampler_delta:.1g} ({weights:,} weights). {found.patients} patients to train on. ε is "
            "counted at the one order that suits the budget, by which jobs are admitted; a lower budget has "
            "another."
        )
        out.print(about, highlight=False, markup=False)
        if delta * found.patients >= 1:
            out.print(
                f"[red]δ = {say_delta(delta)} is not below 1 ÷ {found.patients} patients: it would let one of them be "
                "published.[/red]",
                highlight=False,
            )
        out.print(_on_time(read.answer_seconds, takes), highlight=False)
        if refusal is None:
            out.print(
                "This site would admit the job (bags or images were not looked at, nor a kit elsewhere).",
                highlight=False,
            )
        _say_refusal(refusal)
    raise typer.Exit(0 if refusal is None else 3)


def _say_refusal(refusal: HistoflareError | None) -> None:
    from histoflare.report.reasons import explain

    if refusal is not None:
        out.print(f"Refused ({refusal.reason}): {explain(refusal.reason)}", style="red", highlight=False)
        out.print(str(refusal), highlight=False, markup=False)


def _refused_otherwise(job: Job, policy: Policy, local: Path, trains: bool) -> JobError | None:
    """Return why a site would refuse a job whatever its budget, as far as its own folder says."""
    from histoflare.flare.admission import check_agreement, check_strategy
    from histoflare.flare.kit_signature import verify_kit
    from histoflare.privacy.own_policy import check_taking_part
    from histoflare.privacy.protocol import PROTOCOL_FILE

    try:
        if (local.parent / "startup").is_dir():
            verify_kit(local.parent)
        check_taking_part(
            policy,
            purpose=job.purpose,
            strategy_name=job.strategy.name,
            model_name=job.task.model_name,
        )
        if (local / PROTOCOL_FILE).is_file():
            check_agreement(job, local)
        if trains:
            check_strategy(policy, job.plan, job.strategy)
    except JobError as error:
        return error
    return None


def _on_time(public: int | None, takes: float | None) -> str:
    """Say whether a round will be done by its public time; the disk and other work get half of it."""
    if public is None:
        return "No public time of answers."
    said = f"Answers come {public} s after the opening"
    if takes is None:
        return f"{said}. How long a round takes cannot be measured beforehand."
    if 2 * takes <= public:
        return f"{said}; the longest likely round takes {takes:.1f} s here."
    return (
        f"[red]{said}, and the longest likely round takes {takes:.1f} s here: ask the lead for "
        f"answer_seconds of at least {math.ceil(2 * takes)}.[/red] Late answers come after twice as long, "
        "and that they are late is not covered by ε."
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
