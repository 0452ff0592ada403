"""``histoflare privacy plan``: what a job would cost, beside what the sites' policies allow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histoflare.commands.console import make_table, out, print_json
from histoflare.commands.options import JOB_HELP, AsJson, How, Preset, SiteOption
from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.spend import ADD_OR_REMOVE_ONE, UNIT
from histoflare.privacy.words import (
    ALL_COLLUDE,
    IF_CA_IS_HONEST,
    say_cost,
    say_delta,
    say_epsilon,
    say_further,
    say_share,
)
from histoflare.shipped import find_job
from histoflare.storage import real_path

if TYPE_CHECKING:
    from histoflare.flare.job import Job
    from histoflare.privacy.budget import Filter
    from histoflare.privacy.policy import Policy, Protection
    from histoflare.privacy.spend import Spend
    from histoflare.site.preview import Figures, Preview


def show_plan(
    job: Annotated[Path, typer.Argument(help=JOB_HELP)],
    site: SiteOption = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A signed policy; none: the kit's of the job's scope, outside a kit this package's."
        ),
    ] = None,
    preset: Preset = None,
    how: How = False,
    as_json: AsJson = False,
) -> None:
    """Show what a job would cost, beside what the policies allow, and whether a site would take it.

    In a kit's folder, or with --site, it looks at that site's ledger, patients, and bags or images;
    elsewhere, as a lead does, at the job and a signed policy alone. Nothing is booked. The exit code is 3 if
    the job would be refused.

    Example: histoflare privacy plan mem_dpsgd

    Example: histoflare privacy plan mem_dpsgd --site kits/histoflare/prod_00/hospital-a
    """
    from histoflare.flare.job_choice import choose_job
    from histoflare.flare.job_schema import TRAINING
    from histoflare.flare.kit_signature import site_around
    from histoflare.flare.site_policy import policy_file
    from histoflare.privacy.own_policy_file import read_site_policy
    from histoflare.privacy.policy import POLICIES, read_policy
    from histoflare.rounds.round import count_sent_by_job
    from histoflare.site.places import find_site_of

    job = find_job(job)
    read = choose_job(job, preset).job
    try:
        where: Path | None = find_site_of(site)
    except JobError:
        if site is not None:
            raise
        where = None
    if where is None:
        signed = read_policy(policy or POLICIES / f"{read.scope}.toml")
        _show_costs(read, signed, how, as_json)
        return
    local = real_path(where).parent
    signed_file = policy or local / policy_file(read.scope)
    signed, rules = read_policy(signed_file), read_site_policy(signed_file, local)
    trains = read.kind == TRAINING
    refusal: HistoflareError | None = _refused_otherwise(read, rules, where, trains=trains)
    if not trains:
        _show_evaluation(read, rules, refusal)
        return
    from histoflare.site.data import device_of
    from histoflare.site.kinds import kind_of
    from histoflare.site.likely_time import likely_seconds
    from histoflare.site.preview import preview
    from histoflare.site.site_file import read_site_file

    configuration = read_site_file(where, site_around(where))
    weights = count_sent_by_job(read.strategy, read.task)
    found = preview(configuration, rules, read.plan, read.reserved_rounds, weights, read.task, read.split)
    refusal = refusal or found.refusal
    most_slides = kind_of(read.task.data).slides_of_a_patient(configuration, read.task.manifest_labels)
    device = device_of(configuration)
    takes = likely_seconds(read.task, read.plan, max(1, found.patients), most_slides, device)
    if as_json:
        facts = {
            "job": read.name,
            "rounds": read.rounds,
            "spare_rounds": read.spare_rounds,
            "evaluations": read.most_evaluations,
            "mechanism": read.plan.mechanism,
            "spend": read.plan.spend().times(read.reserved_rounds).to_json(),
            "patients_to_train_on": found.patients,
            "budget": found.budget.epsilon,
            "spent": _json(found.before),
            "job_alone": _json(found.alone),
            "share": _json(found.share),
            "together": _json(found.after),
            "if_all_collude": found.if_all_collude and _figures(found.if_all_collude),
            "further": found.further,
            "weights": weights,
            "sampler_delta": found.sampler_delta,
            "answer_seconds": read.answer_seconds,
            "likely_seconds": takes,
            "admitted": refusal is None,
            "reason": refusal and refusal.reason,
        }
        print_json(_facts(found.budget.delta) | facts)
    else:
        _show_preview(read, found, signed, rules)
        _say_evaluations(read, rules)
        _say(_on_time(read.answer_seconds, takes))
        if how:
            _show_how(read, rules, weights, found.sampler_delta)
        if refusal is None:
            _say("This site would admit the job (a kit elsewhere was not looked at).")
        _say_refusal(refusal)
    raise typer.Exit(0 if refusal is None else 3)


def _show_costs(read: Job, signed: Policy, how: bool, as_json: bool) -> None:
    """Say what a job costs beside what a signed policy allows, without a site."""
    from histoflare.flare.job_schema import TRAINING
    from histoflare.privacy.ledger.rules import refuse_share
    from histoflare.rounds.round import count_sent_by_job
    from histoflare.site.bookkeeping import check_plan
    from histoflare.site.preview import Figures

    protection = signed.protection
    if read.kind != TRAINING:
        _show_evaluation(read, signed, None)
        return
    if protection is None:
        raise JobError(
            f"The scope {signed.name} has no budget: nothing is booked under it, and nothing is protected.",
            reason="POLICY_INVALID",
        )
    budget, spend = protection.budget(), read.plan.spend().times(read.reserved_rounds)
    first, alone = budget.filters()
    cost, is_shared = budget.cost(spend), spend.honest > 1
    second = Figures(alone.budget, 0.0, alone.cost([spend.alone()])) if is_shared else None
    refusal: HistoflareError | None = None
    try:
        check_plan(signed, read.plan)
        refuse_share(first, cost, protection.job_share, is_shared)
        if second is not None:
            refuse_share(alone, second.cost, protection.job_share, is_shared)
    except HistoflareError as error:
        refusal = error
    weights = count_sent_by_job(read.strategy, read.task)
    taken = budget.sampler_delta(read.plan.numbers(read.reserved_rounds, weights))
    if as_json:
        facts = {
            "job": read.name,
            "rounds": read.rounds,
            "spare_rounds": read.spare_rounds,
            "mechanism": read.plan.mechanism,
            "spend": spend.to_json(),
            "budget": budget.epsilon,
            "job_alone": _json(budget.epsilon_of(cost)),
            "share": _json(budget.share_of(cost)),
            "if_all_collude": second and _figures(second),
            "further": budget.room_for(cost, cost),
            "weights": weights,
            "sampler_delta": taken,
            "reason": refusal and refusal.reason,
        }
        print_json(_facts(budget.delta) | facts)
    else:
        said = say_further(budget.room_for(cost, cost), budget.share_of(cost))
        _say(f"{read.name}: {_say_rounds(read)} under {signed.name}.")
        _say(
            f"This job spends ε = {say_cost(budget.epsilon_of(cost), budget.epsilon)} at δ = "
            f"{say_delta(budget.delta)}{_say_whom(first, spend)}; {said}."
        )
        _say_second(second)
        table = make_table("", "this job", "the policy allows")
        table.add_row("ε of each patient", say_epsilon(budget.epsilon_of(cost)), f"{budget.epsilon:g}")
        table.add_row(
            "share of that budget", say_share(budget.share_of(cost)), say_share(protection.job_share)
        )
        if second is not None:
            whole, part = f"{second.budget.epsilon:g}", say_share(protection.job_share)
            table.add_row("ε, if all other sites collude", say_epsilon(second.alone), whole)
            table.add_row("share of that budget", say_share(second.share), part)
        table.add_row("δ", say_delta(read.plan.to_json()["delta"]), say_delta(budget.delta))
        out.print(table)
        if how:
            _show_how(read, signed, weights, taken)
        _say("No site's ledger, patients and data were looked at: each does in its kit's folder.")
        _say_refusal(refusal)
    raise typer.Exit(0 if refusal is None else 3)


def _show_preview(read: Job, found: Preview, signed: Policy, rules: Policy) -> None:
    """Say what a job would cost a site's most exposed patient, beside what both layers of policy allow."""
    budget, outer, own = found.budget, _protection(signed), _protection(rules)
    spent = say_cost(found.alone, budget.epsilon)
    left = "" if math.isnan(found.before) else f"; {say_further(found.further, 1 - found.left)}"
    second, spend = found.if_all_collude, read.plan.spend()
    whom = _say_whom(budget.filters()[0], spend)
    if spend.honest > 1 and rules.trust_ca:
        whom += f", {IF_CA_IS_HONEST}"
    _say(f"{read.name}: {_say_rounds(read)} under {rules.name}.")
    _say(
        f"This job spends ε = {spent} of the most exposed patient at δ = {say_delta(budget.delta)}{whom}"
        f"{left}."
    )
    _say_second(second)
    table = make_table("", "this job", "the kit allows", "this site allows")
    rows = [
        ("ε, spent so far", say_epsilon(found.before), "", ""),
        ("ε, with this job", say_epsilon(found.after), f"{outer.epsilon:g}", f"{own.epsilon:g}"),
        ("share of the budget", say_share(found.share), say_share(outer.job_share), say_share(own.job_share)),
        ("δ", say_delta(read.plan.to_json()["delta"]), say_delta(outer.delta), say_delta(own.delta)),
        (
            "patients to train on",
            str(found.patients),
            f"from {signed.minimum_patients} on",
            f"from {rules.minimum_patients} on",
        ),
    ]
    if second is not None:
        widest, here = outer.budget().if_all_collude, f"{second.budget.epsilon:g}"
        rows[2:2] = [
            ("ε, spent so far, if all other sites collude", say_epsilon(second.before), "", ""),
            ("ε, with this job, if they do", say_epsilon(second.after), f"{widest.epsilon:g}", here),
        ]
    for row in rows:
        table.add_row(*row)
    out.print(table)
    if budget.delta * found.patients >= 1:
        _say(
            f"δ = {say_delta(budget.delta)} is not below 1 ÷ {found.patients} patients: it would let one of "
            "them be published.",
            style="red",
        )


def _show_how(read: Job, rules: Policy, weights: int, taken: float) -> None:
    """Say how the figure was computed, and what other ways of counting say."""
    from histoflare.privacy.accountant import epsilon

    budget, spend = _protection(rules).budget(), read.plan.spend().times(read.reserved_rounds)
    tight = "pld" if spend.sample_rate < 1 else "gaussian"
    by = {name: say_epsilon(epsilon([spend], budget.delta, name)) for name in ("rdp", tight)}
    _say(read.plan.describe())
    _say(
        f"ε is counted at the one Rényi order {budget.order:g} of this budget, by which jobs are admitted; a "
        f"lower budget has another. Had the job been fixed beforehand: {by['rdp']} by RDP at its best order, "
        f"{by[tight]} by {tight}; nothing is admitted by these. Shares of jobs add up, and ε does not: the "
        f"first job of all costs most. Of δ the sampler of the noise takes {taken:.1g} ({weights:,} weights)."
    )


def _say_evaluations(read: Job, rules: Policy) -> None:
    """Say how many evaluations the policy lets out, of a job that asks for any."""
    from histoflare.flare.job_schema import TRAINING

    if read.most_evaluations:
        limit = rules.protection.evaluations if rules.protection else "any number of"
        which = "An evaluation" if read.kind != TRAINING else "At its end an evaluation of its model"
        _say(f"{which}: no ε. The policy lets {limit} evaluations over a patient out.")


def _show_evaluation(read: Job, rules: Policy, refusal: HistoflareError | None) -> None:
    _say_evaluations(read, rules)
    if refusal is None and rules.protection is not None and read.answer_seconds is None:
        refusal = JobError("Under this policy job.toml must say answer_seconds.", reason="PRIVACY_INVALID")
    _say_refusal(refusal)
    raise typer.Exit(0 if refusal is None else 3)


def _say_refusal(refusal: HistoflareError | None) -> None:
    from histoflare.reasons import explain

    if refusal is not None:
        _say(f"Refused ({refusal.reason}): {explain(refusal.reason)}", style="red")
        _say(str(refusal))


def _refused_otherwise(job: Job, policy: Policy, site: Path, trains: bool) -> JobError | None:
    """Return why a site would refuse a job whatever its budget, as far as its own file and folder say."""
    from histoflare.flare.admission import check_agreement, check_parts
    from histoflare.flare.kit_signature import verify_kit
    from histoflare.privacy.own_policy import check_taking_part
    from histoflare.privacy.protocol import PROTOCOL_FILE
    from histoflare.site.kinds import kind_of
    from histoflare.site.site_file import read_site_file

    local = real_path(site).parent
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
        kind_of(job.task.data).check_resolution_named(job.task, read_site_file(site))
        if trains:
            check_parts(policy, job)
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
        f"{said}, and the longest likely round takes {takes:.1f} s here: ask the lead for "
        f"answer_seconds of at least {math.ceil(2 * takes)}. Late answers come after twice as long, and that "
        "they are late is not covered by ε."
    )


def _say_rounds(read: Job) -> str:
    spare = f" and {read.spare_rounds} spare ones" if read.spare_rounds else ""
    return f"{read.rounds} rounds{spare}"


def _say_whom(first: Filter, spend: Spend) -> str:
    """Return against whom the first figure is; nothing where noise is not shared."""
    return f" against {first.whom()}" if spend.honest > 1 else ""


def _say_second(second: Figures | None) -> None:
    """Say what a job costs should all other sites collude."""
    if second is not None:
        cost = say_cost(second.alone, second.budget.epsilon)
        _say(f"{ALL_COLLUDE[0].upper()}{ALL_COLLUDE[1:]}, it spends ε = {cost}; a job must fit both budgets.")


def _figures(second: Figures) -> dict[str, Any]:
    return {
        "budget": second.budget.epsilon,
        "spent": _json(second.before),
        "job_alone": _json(second.alone),
        "share": _json(second.share),
        "together": _json(second.after),
    }


def _protection(policy: Policy) -> Protection:
    assert policy.protection is not None, "looked at before"
    return policy.protection


def _json(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _facts(delta: float) -> dict[str, Any]:
    return {"unit": UNIT, "neighboring_relation": ADD_OR_REMOVE_ONE, "delta": delta}


def _say(text: str, style: str | None = None) -> None:
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
