"""What a job would cost a site, before anything is booked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from histoflare.errors import HistoflareError, JobError, LedgerError
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import Policy
from histoflare.site.books import check_plan, check_size
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import read_roles
from histoflare.site.ledgers import open_ledger
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule


@dataclass(frozen=True)
class Preview:
    """What a job would cost a site's most exposed patient. ε is that of the budget's filter, at its δ.

    Attributes:
        patients: To train on.
        before: What was charged already; NaN if the ledger does not say. alone: The job. after: Together.
        budget: What there is. sampler_delta: What the job's sampler takes of its δ.
        refusal: Why the site would refuse the job; None if it would not.
    """

    patients: int
    before: float
    alone: float
    after: float
    budget: Budget
    sampler_delta: float
    refusal: HistoflareError | None


def preview(
    configuration: SiteConfiguration,
    policy: Policy,
    plan: PrivacyPlan,
    rounds: int,
    weights: int,
    labels: list[str],
    data: str = "bags",
    split: SplitRule = DEFAULT_SPLIT,
) -> Preview:
    """Return what ``site.books.Books.reserve`` would do. Nothing is written, and no ledger is made.

    Raises:
        JobError: The policy has no budget (POLICY_INVALID).
        ManifestError: The manifest cannot be used.
    """
    if policy.protection is None:
        raise JobError(
            f"The scope {policy.name} has no budget: nothing is booked under it, and nothing is protected.",
            reason="POLICY_INVALID",
        )
    roles = read_roles(configuration, labels, data, split)
    budget = policy.protection.budget()
    patients = sum(role == "train" for role in roles.values())
    spent, refusal = math.nan, None
    try:
        ledger = open_ledger(configuration)
        spent = ledger.exposure(roles, budget)
        ledger.check_usable()
        check_plan(policy, plan)
        check_size(policy, patients)
        budget.without_sampler(plan.numbers(rounds, weights))
    except HistoflareError as error:
        refusal = error
    cost = budget.cost(plan.spend().times(rounds))
    if refusal is None and not budget.admits(spent + cost):
        refusal = LedgerError(
            "Run fewer rounds or with more noise, close runs that will not go on (histoflare ledger close), "
            "or train on other patients.",
            reason="BUDGET_EXHAUSTED",
        )
    before, alone, after = (
        math.nan if math.isnan(rho) else budget.epsilon_of(rho) for rho in (spent, cost, spent + cost)
    )
    taken = budget.sampler_delta(plan.numbers(rounds, weights))
    return Preview(patients, before, alone, after, budget, taken, refusal)
