"""A job's start, its cost, what policies allow it, and what a variant changes of the protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.admission import check_parts, check_patience
from histoflare.flare.job import Job
from histoflare.flare.job_files import CONFIG_FOLDER, PROTOCOL_FILE, SERVER_APP, START_MODEL_FILE
from histoflare.flare.job_schema import EVALUATION
from histoflare.flare.job_variant import flatten
from histoflare.model_file import read_model_header
from histoflare.privacy.accountant import epsilon
from histoflare.privacy.budget import Budget
from histoflare.privacy.own_policy import OWN_POLICY_FILE, check_taking_part
from histoflare.privacy.own_policy_file import read_site_policy
from histoflare.privacy.policy import Policy, read_policy
from histoflare.privacy.protocol import hash_protocol
from histoflare.privacy.spend import Spend
from histoflare.privacy.words import ALL_COLLUDE, say_against, say_delta, say_room
from histoflare.privacy.words import say_cost as say_part
from histoflare.privacy.words import say_epsilon as write_epsilon
from histoflare.report.guarantee import epsilon_if_all_collude, state_epsilon
from histoflare.report.guarantee_words import say_epsilon
from histoflare.rounds.tally import asks_model
from histoflare.site.bookkeeping import check_plan, check_sampler, check_tally

POLICY_PLACES = (
    "policy_{}.toml",
    "local/policy_{}.toml",
    "*/local/policy_{}.toml",
    "{}.toml",
    "policies/{}.toml",
)
"""Where a folder has the policy of a scope: a kit's ``local``, a kit, kits, provisioning's own."""


def say_start(job: Job) -> str:
    """Return with which round and which model a job starts; rounds count from 1."""
    if not asks_model(job.task):
        return "asks about no model"
    path = job.folder / SERVER_APP / CONFIG_FOLDER.name / START_MODEL_FILE
    if not path.is_file():
        model = "a model that it does not bring yet (--model)"
        if job.kind != EVALUATION and not job.start_round:
            model = f"a new one, by its seed {job.seed}"
    else:
        header = read_model_header(path)
        of = "the model that it brings"
        made = "" if header.round is None else f", of round {header.round + 1} of the run {header.run}"
        model = f"{of}{made}"
    if job.kind == EVALUATION:
        return f"asks about {model}"
    before = f"; rounds 1 to {job.start_round} are done" if job.start_round else ""
    return f"round {job.start_round + 1} of {job.rounds}{before}; model: {model}"


def find_cost(job: Job) -> dict[str, Any] | None:
    """Return what all rounds of a job cost one patient, at its own δ; None where nothing protects."""
    delta = job.plan.delta
    if delta is None:
        return None
    spend = job.plan.spend().times(job.reserved_rounds)
    tight = "gaussian" if spend.sample_rate == 1 else "pld"
    return {
        "delta": delta,
        **{name: state_epsilon(epsilon([spend], delta, name)) for name in ("rdp", tight)},
        "seeded_noise": job.plan.noise_seed is not None,
    }


def say_cost(job: Job, cost: Mapping[str, Any] | None) -> str:
    """Return what a job spends of the budget that it is made for, in words: the figure of the ledgers."""
    if job.kind == EVALUATION:
        return say_evaluation(job)
    budget = job.plan.budget()
    if cost is None or budget is None:
        return "nothing protects the updates: ε = ∞"
    spend = job.plan.spend().times(job.reserved_rounds)
    spent = budget.cost(spend)
    part, delta = say_part(budget.epsilon_of(spent), budget.epsilon), say_delta(budget.delta)
    void = "; void, as its noise can be repeated" if cost["seeded_noise"] else ""
    room, whom = say_room(budget, spent, spent), _say_whom(budget, spend)
    return f"ε = {part} at δ = {delta} for each patient, all rounds{whom}; {room}{void}"


def _say_whom(budget: Budget, spend: Spend) -> str:
    """Return against whom a figure of shared noise holds, and what it is should all others collude."""
    if spend.honest == 1:
        return ""
    alone = write_epsilon(epsilon_if_all_collude(budget, [spend]))
    return f", {say_against(spend.honest)} (ε = {alone} by RDP {ALL_COLLUDE})"


def find_evaluation_cost(job: Job) -> dict[str, Any]:
    """Return what a job's evaluation costs each patient who is asked about, at its own δ; it has a tally."""
    assert job.tally is not None
    budget = job.tally.budget()
    spent = budget.cost(job.tally.spend().times(job.most_evaluations))
    return {
        **state_epsilon(budget.epsilon_of(spent)),
        "delta": budget.delta,
        "share": budget.share_of(spent),
        "seeded_noise": job.tally.noise_seed is not None,
    }


def say_evaluation(job: Job) -> str:
    """Return what a job's evaluation spends of the budget of each patient who is asked about, in words."""
    if job.tally is None:
        return "no ε: its figures leave without noise, where and as often as a policy says"
    budget, found = job.tally.budget(), find_evaluation_cost(job)
    part = say_part(found["epsilon"], budget.epsilon)
    void = "; void, as its noise can be repeated" if found["seeded_noise"] else ""
    whom = _say_whom(budget, job.tally.spend().times(job.most_evaluations))
    return f"ε = {part} at δ = {say_delta(budget.delta)} for each patient who is asked about{whom}{void}"


def find_allowances(job: Job, places: Path) -> list[dict[str, Any]]:
    """Return what the policies of a job's scope allow, beside what the job takes of each.

    Args:
        places: A policy, a startup kit, a folder of kits, or ``provisioning``.

    Raises:
        JobError: There is no policy of the scope (SCOPE_UNKNOWN), or one cannot be used.
    """
    patterns = [pattern.format(job.scope) for pattern in POLICY_PLACES]
    paths = (
        [places] if places.is_file() else sorted({path for each in patterns for path in places.glob(each)})
    )
    if not paths:
        raise JobError(
            f"{places}: no policy of the scope '{job.scope}' there. Give a startup kit, a folder of kits, or "
            "the folder from which kits are made (provisioning).",
            reason="SCOPE_UNKNOWN",
        )
    return [_allowance(job, path, places) for path in paths]


def say_allowance(found: Mapping[str, Any]) -> str:
    """Return one entry of :func:`find_allowances` in words."""
    said = "no ε is counted"
    if found["epsilon_allowed"] is not None:
        said = (
            f"the job takes ε = {say_epsilon(found['job'])}, as jobs are admitted by, of "
            f"{found['epsilon_allowed']:g} at δ = {say_delta(found['delta'])} for each patient over all jobs"
        )
    if second := found["if_all_collude"]:
        said += f", and {ALL_COLLUDE} {say_epsilon(second['job'])} of {second['epsilon_allowed']:g}"
    evaluations = "any number of" if found["evaluations"] is None else found["evaluations"]
    verdict = found["problem"] or "fits, with nothing spent before"
    return (
        f"{found['policy']}: {said}: {verdict}. At least {found['minimum_patients']} patients; {evaluations} "
        "evaluations over a patient."
    )


def _allowance(job: Job, path: Path, places: Path) -> dict[str, Any]:
    name = path.name if path == places else str(path.relative_to(places))
    if path.parent.name == "local":
        name = path.absolute().parent.parent.name  # the kit's, which is the site's
    own = (path.parent / OWN_POLICY_FILE).is_file()
    try:
        policy = read_site_policy(path) if own else read_policy(path)
    except JobError as error:
        if error.reason != "SCOPE_NOT_ALLOWED":
            raise
        policy = read_policy(path)
        return _facts(job, policy, name) | {"problem": "the site takes no part in this scope"}
    return _facts(job, policy, name) | {"problem": _problem(job, policy, own)}


def _facts(job: Job, policy: Policy, name: str) -> dict[str, Any]:
    protection = policy.protection
    facts: dict[str, Any] = {"policy": name, "minimum_patients": policy.minimum_patients, "job": None}
    facts |= {"epsilon_allowed": None, "delta": None, "evaluations": None, "if_all_collude": None}
    if protection is None:
        return facts
    budget = protection.budget()
    facts |= {"epsilon_allowed": budget.epsilon, "delta": budget.delta, "evaluations": protection.evaluations}
    if job.kind != EVALUATION and job.plan.spend().honest > 1:
        alone = budget.if_all_collude
        spent = alone.spent([job.plan.spend().times(job.reserved_rounds).alone()])
        facts["if_all_collude"] = {"job": state_epsilon(spent), "epsilon_allowed": alone.epsilon}
    return facts | {"job": state_epsilon(budget.epsilon_of(_cost(job, policy)))}


def _cost(job: Job, policy: Policy) -> float:
    """Return what a job costs a patient, trained on or asked about, in ρ of a policy's budget."""
    assert policy.protection is not None
    if job.kind != EVALUATION:
        return policy.protection.budget().cost(job.plan.spend().times(job.reserved_rounds))
    asked = job.tally and policy.protection.budget().cost(job.tally.spend().times(job.most_evaluations))
    return asked or 0.0


def _problem(job: Job, policy: Policy, narrowed: bool) -> str | None:
    """Return why a site with this policy would refuse the job whatever its patients are; None if not."""
    try:
        if narrowed:
            check_taking_part(
                policy, purpose=job.purpose, strategy_name=job.strategy.name, model_name=job.task.model_name
            )
        if job.kind == EVALUATION:
            none = policy.protection is not None and not policy.protection.evaluations
            if job.tally is not None:
                check_tally(policy, job.tally)
                return _too_much(policy, job.tally.spend().times(job.most_evaluations))
            return "lets no figures without noise out ([evaluation] in job.toml)" if none else None
        check_plan(policy, job.plan)
        check_patience(policy, job)
        check_parts(policy, job)
        if policy.protection is not None:
            check_sampler(policy.protection.budget(), job.plan, job.reserved_rounds, job.weights)
            return _too_much(policy, job.plan.spend().times(job.reserved_rounds))
    except HistoflareError as error:
        return f"{error} ({error.reason})"
    return None


def _too_much(policy: Policy, spend: Spend) -> str | None:
    """Return why a job is more than a whole budget; None if it is not."""
    assert policy.protection is not None
    budget = policy.protection.budget()
    cost = budget.cost(spend)
    if math.isinf(cost) or not budget.admits(cost):
        return "more than the whole budget (BUDGET_EXHAUSTED)"
    alone = budget.filters()[1]
    if not alone.budget.admits(alone.cost([spend.alone()])):
        return f"more than the whole budget, {ALL_COLLUDE} (BUDGET_EXHAUSTED)"
    return None


def say_protocol_change(before: Mapping[str, Any], after: Mapping[str, Any], target: Path) -> str:
    """Return what a variant changed of the protocol, and what has to be agreed then; empty if nothing.

    Args:
        before, after: The protocols. target: The folder of the variant.
    """

    if hash_protocol(before) == hash_protocol(after):
        return ""
    old, new = flatten(before), flatten(after)
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    listed = "".join(f"\n  {name}: {old.get(name, 'none')} → {new.get(name, 'none')}" for name in changed)
    return (
        f"The protocol is not that of the job it was made of: {hash_protocol(before)[:12]}… → "
        f"{hash_protocol(after)}"
        f"{listed}\nSites whose kits do not have it refuse the job (PROTOCOL_MISMATCH). To agree on it: show "
        f"them {target / CONFIG_FOLDER / PROTOCOL_FILE}, name the job under protocol in "
        "provisioning/project.yml, and make the kits anew."
    )
