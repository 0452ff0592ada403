"""What a job would cost a site, before anything is booked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger.rules import TRAIN, refuse_share
from histoflare.privacy.plan import PrivacyPlan
from histoflare.privacy.policy import Policy, Protection
from histoflare.privacy.tally import Tally
from histoflare.site.bookkeeping import (
    TEST,
    check_leaving_out,
    check_plan,
    check_sampler,
    check_size,
    check_tally,
)
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data, read_roles
from histoflare.site.kinds import kind_of
from histoflare.site.ledgers import open_ledger
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule


@dataclass(frozen=True)
class Preview:
    """What a job would cost a site's most exposed patient. ε is that of the budget's filter, at its δ.

    Attributes:
        patients: To train on, or to be asked about, those who would be left out among them.
        left_out: How many would be left out, as the job costs more than they have left and the policy leaves
            such out; what follows is then of the others.
        before: What was charged already; NaN if the ledger does not say. alone: The job. after: Together.
        further: How many more like it fit afterwards, by both filters; None: any number, or the ledger does
            not say.
        budget: What there is. sampler_delta: What the job's sampler takes of its δ.
        share: Which part of the budget's allowance the job takes, from 0 on; shares of jobs add up.
        left: Which part is left afterwards; below 0 where it does not fit, NaN if the ledger does not say.
        if_all_collude: The same should all other sites collude; None where no noise is shared.
        refusal: Why the site would refuse the job; None if it would not.
    """

    patients: int
    left_out: int
    before: float
    alone: float
    after: float
    further: int | None
    share: float
    left: float
    budget: Budget
    sampler_delta: float
    if_all_collude: Figures | None
    refusal: HistoflareError | None


@dataclass(frozen=True)
class Figures:
    """What a job costs by one filter of a budget.

    Attributes:
        budget: Of the filter.
        spent, cost: What was charged already and what the job costs, in ρ at its order; ``spent`` is NaN if
            the ledger does not say.
    """

    budget: Budget
    spent: float
    cost: float

    @property
    def before(self) -> float:
        """See :class:`Preview`, as for the next ones."""
        return self._epsilon(self.spent)

    @property
    def alone(self) -> float:
        """ε of the job."""
        return self._epsilon(self.cost)

    @property
    def after(self) -> float:
        """ε of both together."""
        return self._epsilon(self.spent + self.cost)

    @property
    def share(self) -> float:
        """Which part of the allowance the job takes."""
        return self.budget.share_of(self.cost)

    @property
    def room(self) -> int | None:
        """How many more jobs like it fit afterwards."""
        after = self.spent + self.cost
        return None if math.isnan(after) else self.budget.room_for(self.cost, after)

    def _epsilon(self, rho: float) -> float:
        return math.nan if math.isnan(rho) else self.budget.epsilon_of(rho)


def preview(
    configuration: SiteConfiguration,
    policy: Policy,
    plan: PrivacyPlan,
    rounds: int,
    weights: int,
    task: Any,
    split: SplitRule = DEFAULT_SPLIT,
) -> Preview:
    """Return what the site's bookkeeping would reserve. Nothing is written, and no ledger is made.

    The site's bags or images are looked at as a job does before its first round.

    Args:
        configuration: The site's. policy: Of the job's scope, as it holds at the site.
        plan: Settled; a :class:`Tally` for the job's evaluation, which is booked on the test patients.
        rounds: All that would be reserved, spare ones too; of an evaluation how often it is asked.
        weights: How many numbers leave in one.
        task: What is learned. split: The protocol's rule, for a manifest without a split column.

    Raises:
        JobError: The policy has no budget (POLICY_INVALID).
        ManifestError: The manifest cannot be used.
    """
    if isinstance(plan, Tally):
        plan = plan.of_site(only_evaluates=configuration.evaluation_only)
    protection = protection_of(policy)
    roles = read_roles(configuration, task.manifest_labels, task.data, split)
    budget, cohort = protection.budget(), cohort_of(plan)
    patients = sum(role == cohort for role in roles.values())
    spent: tuple[float, ...] = (math.nan, math.nan)
    left_out: frozenset[str] = frozenset()
    refusal: HistoflareError | None = None
    try:
        ledger = open_ledger(configuration)
        ledger.check_usable()  # first: what another site's or an older copy says was spent is not to be shown
        spent = ledger.exposure(roles, budget, cohort)
        _check(policy, plan)
        check_leaving_out(policy, plan)
        check_size(policy, patients)
        check_sampler(budget, plan, rounds, weights)
        left_out = ledger.check_room(
            spend=plan.spend(),
            rounds=rounds,
            roles=roles,
            budget=budget,
            job_share=protection.job_share,
            role=cohort,
            leave_out=protection.leaves_out,
        )
        if left_out:
            others = {name: role for name, role in roles.items() if name not in left_out}
            spent = ledger.exposure(others, budget, cohort)
    except HistoflareError as error:
        refusal = error
    refusal = refusal or _data_fault(configuration, task, split)
    return _figures(budget, plan, rounds, weights, patients, spent, refusal, len(left_out))


def preview_without_site(policy: Policy, plan: PrivacyPlan, rounds: int, weights: int) -> Preview:
    """Return what a job costs a patient of whom nothing was spent before, by a policy alone.

    Raises:
        JobError: The policy has no budget (POLICY_INVALID).
    """
    protection = protection_of(policy)
    budget, event, refusal = protection.budget(), plan.spend(), None
    try:
        _check(policy, plan)
        for kept in budget.filters():
            cost = kept.cost([kept.price(event).times(rounds)])
            refuse_share(kept, cost, protection.job_share, event.honest > 1)
    except HistoflareError as error:
        refusal = error
    return _figures(budget, plan, rounds, weights, patients=0, spent=(0.0, 0.0), refusal=refusal)


def cohort_of(plan: PrivacyPlan) -> str:
    """Return the role of the patients on whom a plan is booked."""
    return TEST if isinstance(plan, Tally) else TRAIN


def _check(policy: Policy, plan: PrivacyPlan) -> None:
    if isinstance(plan, Tally):
        check_tally(policy, plan)
    else:
        check_plan(policy, plan)


def protection_of(policy: Policy) -> Protection:
    """Return a policy's budget and what goes with it; JobError if it has none (POLICY_INVALID)."""
    if policy.protection is None:
        raise JobError(
            f"The scope {policy.name} has no budget: nothing is booked under it, and nothing is protected.",
            reason="POLICY_INVALID",
        )
    return policy.protection


def _figures(
    budget: Budget,
    plan: PrivacyPlan,
    rounds: int,
    weights: int,
    patients: int,
    spent: tuple[float, ...],
    refusal: HistoflareError | None,
    left_out: int = 0,
) -> Preview:
    event = plan.spend()
    first, second = (
        Figures(kept.budget, rho, kept.cost([kept.price(event).times(rounds)]))
        for kept, rho in zip(budget.filters(), spent, strict=True)
    )
    together = first.spent + first.cost
    counted = (first, second) if event.honest > 1 else (first,)
    rooms = [found.room for found in counted]
    return Preview(
        patients=patients,
        left_out=left_out,
        before=first.before,
        alone=first.alone,
        after=first.after,
        further=min((room for room in rooms if room is not None), default=None),
        share=first.share,
        left=1 - budget.share_of(together),
        budget=budget,
        sampler_delta=budget.sampler_delta(plan.numbers(rounds, weights)),
        if_all_collude=second if event.honest > 1 else None,
        refusal=refusal,
    )


def _data_fault(configuration: SiteConfiguration, task: Any, split: SplitRule) -> HistoflareError | None:
    """Return why a site's bags or images cannot be used; those that it makes itself need not be there yet."""
    if kind_of(task.data).prepares(configuration):
        return None
    try:
        load_site_data("this site", task, configuration, split)
    except HistoflareError as error:
        return error
    return None
