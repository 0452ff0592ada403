"""``histoflare privacy plan``: what a job would cost, beside what the sites' policies allow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histoflare.commands.console import make_table, out, print_json, tell
from histoflare.commands.options import JOB_HELP, AsJson, How, Preset, SiteOption
from histoflare.errors import JobError
from histoflare.privacy.words import (
    ALL_COLLUDE,
    IF_CA_IS_HONEST,
    say_cost,
    say_delta,
    say_epsilon,
    say_further,
    say_share,
)
from histoflare.reasons import explain
from histoflare.shipped import find_job

if TYPE_CHECKING:
    from histoflare.lab.job_cost import JobCost
    from histoflare.site.preview import Preview


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
    from histoflare.lab.job_cost import find_cost_at_site, find_cost_by_policy
    from histoflare.site.places import find_site_of

    read = choose_job(find_job(job), preset).job
    try:
        where: Path | None = find_site_of(site)
    except JobError:
        if site is not None:
            raise
        where = None
    cost = find_cost_by_policy(read, policy) if where is None else find_cost_at_site(read, where, policy)
    if as_json:
        print_json(cost.to_json())
    else:
        _show(cost, how)
    raise typer.Exit(0 if cost.refusal is None else 3)


def _show(cost: JobCost, how: bool) -> None:
    if cost.found is not None:
        (_show_at_site if cost.at_site else _show_by_policy)(cost, cost.found)
    _say_evaluations(cost)
    if cost.found is not None:
        if cost.at_site:
            tell(_on_time(cost.job.answer_seconds, cost.likely_seconds))
        if how:
            _show_how(cost, cost.found)
        if not cost.at_site:
            tell("No site's ledger, patients and data were looked at: each does in its kit's folder.")
        elif cost.refusal is None:
            tell(
                "This site would admit the job."
                if cost.kit_is_there
                else "This site would admit the job; its file is in no startup kit: no signature was checked."
            )
    if cost.refusal is not None:
        tell(f"Refused ({cost.refusal.reason}): {explain(cost.refusal.reason)}", style="red")
        tell(str(cost.refusal))


def _show_by_policy(cost: JobCost, found: Preview) -> None:
    """Say what a job costs beside what a signed policy allows."""
    from histoflare.site.preview import protection_of

    read, budget, policy = cost.job, found.budget, protection_of(cost.signed)
    tell(f"{read.name}: {_say_rounds(cost)} under {cost.signed.name}.")
    tell(
        f"This job spends ε = {say_cost(found.alone, budget.epsilon)} at δ = {say_delta(budget.delta)}"
        f"{_say_whom(cost, found)}; {say_further(found.further, found.share)}."
    )
    _say_second(found)
    table = make_table("", "this job", "the policy allows")
    table.add_row("ε of each patient", say_epsilon(found.alone), f"{budget.epsilon:g}")
    table.add_row("share of that budget", say_share(found.share), say_share(policy.job_share))
    if second := found.if_all_collude:
        table.add_row(
            "ε, if all other sites collude", say_epsilon(second.alone), f"{second.budget.epsilon:g}"
        )
        table.add_row("share of that budget", say_share(second.share), say_share(policy.job_share))
    table.add_row("δ", say_delta(read.plan.to_json()["delta"]), say_delta(budget.delta))
    out.print(table)


def _show_at_site(cost: JobCost, found: Preview) -> None:
    """Say what a job would cost a site's most exposed patient, beside what both layers of policy allow."""
    from histoflare.site.preview import protection_of

    read, signed, rules = cost.job, cost.signed, cost.rules
    budget, outer, own = found.budget, protection_of(signed), protection_of(rules)
    spent = say_cost(found.alone, budget.epsilon)
    used = 1 - found.left
    left = "" if math.isnan(found.before) else f"; {say_further(found.further, used, used - found.share)}"
    tell(f"{read.name}: {_say_rounds(cost)} under {rules.name}.")
    tell(
        f"This job spends ε = {spent} of the most exposed patient at δ = {say_delta(budget.delta)}"
        f"{_say_whom(cost, found)}{left}."
    )
    _say_second(found)
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
    if second := found.if_all_collude:
        widest, here = outer.budget().if_all_collude.epsilon, second.budget.epsilon
        rows[2:2] = [
            ("ε, spent so far, if all others collude", say_epsilon(second.before), "", ""),
            ("ε, with this job, if they do", say_epsilon(second.after), f"{widest:g}", f"{here:g}"),
        ]
    for row in rows:
        table.add_row(*row)
    out.print(table)
    _say_left_out(found)
    if budget.delta * found.patients >= 1:
        tell(
            f"δ = {say_delta(budget.delta)} is not below 1 ÷ {found.patients} patients: it would let one of "
            "them be published.",
            style="red",
        )


def _say_left_out(found: Preview) -> None:
    """Say how many patients a job would be without; it stays at the site."""
    if found.left_out:
        tell(
            f"{found.left_out} of {found.patients} patients have too little left for it and would be left "
            "out, which shows nowhere outside; the figures are of the others."
        )


def _show_how(cost: JobCost, found: Preview) -> None:
    """Say how the figure was computed, and what other ways of counting say."""
    from histoflare.privacy.accountant import epsilon

    read, budget = cost.job, found.budget
    spend = read.plan.spend().times(read.reserved_rounds)
    tight = "pld" if spend.sample_rate < 1 else "gaussian"
    by = {name: say_epsilon(epsilon([spend], budget.delta, name)) for name in ("rdp", tight)}
    tell(read.plan.describe())
    tell(
        f"ε is counted at the one Rényi order {budget.order:g} of this budget, by which jobs are admitted; a "
        f"lower budget has another. Had the job been fixed beforehand: {by['rdp']} by RDP at its best order, "
        f"{by[tight]} by {tight}; nothing is admitted by these. Shares of jobs add up, and ε does not: the "
        f"first job of all costs most. Of δ the sampler of the noise takes {found.sampler_delta:.1g} "
        f"({cost.weights:,} weights)."
    )


def _say_rounds(cost: JobCost) -> str:
    spare = f" and {cost.job.spare_rounds} spare ones" if cost.job.spare_rounds else ""
    return f"{cost.job.rounds} rounds{spare}"


def _say_whom(cost: JobCost, found: Preview) -> str:
    """Return against whom the first figure holds; nothing where noise is not shared."""
    if found.if_all_collude is None:
        return ""
    return f" against {found.budget.filters()[0].whom()}" + (
        f", {IF_CA_IS_HONEST}" if cost.rules.trust_ca else ""
    )


def _say_second(found: Preview) -> None:
    """Say what a job costs should all other sites collude."""
    if second := found.if_all_collude:
        spent = say_cost(second.alone, second.budget.epsilon)
        tell(
            f"{ALL_COLLUDE[0].upper()}{ALL_COLLUDE[1:]}, it spends ε = {spent}; a job must fit both budgets."
        )


def _say_evaluations(cost: JobCost) -> None:
    """Say what an evaluation costs the patients asked about, or how many leave without noise."""
    from histoflare.flare.job_schema import TRAINING

    if not cost.job.most_evaluations:
        return
    which = "An evaluation" if cost.job.kind != TRAINING else "At its end an evaluation of its model"
    if cost.asked is None:
        protection = cost.rules.protection
        limit = protection.evaluations if protection else "any number of"
        tell(f"{which}: no ε. The policy lets {limit} evaluations over a patient out.")
        return
    asked = cost.asked
    whom = f"each of {asked.patients} test patients" if cost.at_site else "each test patient"
    budget = asked.budget
    tell(
        f"{which}: noised counts, which spend ε = {say_cost(asked.alone, budget.epsilon)} of {whom} at δ = "
        f"{say_delta(budget.delta)}; {say_further(asked.further, asked.share)}."
    )
    if cost.at_site:
        _say_left_out(asked)
    if asked.refusal is not None and asked.refusal is not cost.refusal:
        tell(f"It would be refused ({asked.refusal.reason}): {asked.refusal}", style="red")


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
