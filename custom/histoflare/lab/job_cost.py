"""What a job costs beside what policies allow, and whether a site would take it; nothing is booked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.admission import check_agreement, check_parts
from histoflare.flare.job import Job
from histoflare.flare.job_schema import TRAINING
from histoflare.flare.kit_signature import participant_of, site_around, verify_kit
from histoflare.flare.site_policy import policy_file
from histoflare.flare.site_sum import check_known, count_pinned
from histoflare.privacy.own_policy import check_taking_part
from histoflare.privacy.own_policy_file import read_site_policy
from histoflare.privacy.policy import POLICIES, Policy, read_policy
from histoflare.privacy.protocol import PROTOCOL_FILE
from histoflare.privacy.spend import ADD_OR_REMOVE_ONE, UNIT
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.tally import tally_form_of
from histoflare.site.bookkeeping import NO_RAW_FIGURES
from histoflare.site.data import device_of
from histoflare.site.kinds import kind_of
from histoflare.site.likely_time import likely_seconds
from histoflare.site.places import kit_of
from histoflare.site.preview import Figures, Preview, preview, preview_without_site
from histoflare.site.site_file import read_site_file
from histoflare.storage import real_path


@dataclass(frozen=True)
class JobCost:
    """What a job costs, and what would refuse it.

    Attributes:
        job: The job.
        signed: The signed policy: a kit's, or one that comes with the package.
        rules: What holds: at a site the signed policy narrowed by the site's own, else the signed one.
        at_site: Whether a site's ledger, patients and data were looked at.
        found: What the training costs a patient who is trained on; None where nobody is.
        asked: What the evaluation costs a patient who is asked about; None where it costs no ε.
        weights: How many numbers a site sends in a round.
        likely_seconds: The longest likely round at the site; None if it cannot be measured.
        refusal: Why the job would be refused; None if it would not.
        kit_is_there: Whether the site's file lies in a startup kit, which was then checked too.
    """

    job: Job
    signed: Policy
    rules: Policy
    at_site: bool
    found: Preview | None = None
    asked: Preview | None = None
    weights: int = 0
    likely_seconds: float | None = None
    refusal: HistoflareError | None = None
    kit_is_there: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        facts: dict[str, Any] = {"job": self.job.name, "reason": self.refusal and self.refusal.reason}
        if self.at_site:
            facts |= {"admitted": self.refusal is None, "evaluations": self.job.most_evaluations}
        if self.asked is not None:
            assert self.job.tally is not None
            spend = self.job.tally.spend().times(self.job.most_evaluations)
            facts["evaluation"] = {
                "spend": spend.to_json(),
                "patients": self.asked.patients if self.at_site else None,
                "left_out": self.asked.left_out if self.at_site else None,
                **_figures(self.asked, self.at_site),
            }
        found = self.found
        if found is None:
            return facts
        facts |= {
            "unit": UNIT,
            "neighboring_relation": ADD_OR_REMOVE_ONE,
            "delta": found.budget.delta,
            "rounds": self.job.rounds,
            "spare_rounds": self.job.spare_rounds,
            "mechanism": self.job.plan.mechanism,
            "spend": self.job.plan.spend().times(self.job.reserved_rounds).to_json(),
            "budget": found.budget.epsilon,
            "job_alone": _finite(found.alone),
            "share": _finite(found.share),
            "if_all_collude": found.if_all_collude and _figures(found.if_all_collude, self.at_site),
            "further": found.further,
            "weights": self.weights,
            "sampler_delta": found.sampler_delta,
        }
        if self.at_site:
            facts |= {
                "patients_to_train_on": found.patients,
                "left_out": found.left_out,
                "spent": _finite(found.before),
                "together": _finite(found.after),
                "answer_seconds": self.job.answer_seconds,
                "likely_seconds": self.likely_seconds,
            }
        return facts


def find_cost_by_policy(job: Job, policy: Path | None = None) -> JobCost:
    """Return what a job costs beside what a signed policy allows, without a site.

    Args:
        job: The job.
        policy: The file of the policy; None: that of the job's scope which comes with the package.

    Raises:
        JobError: The policy cannot be used, or has no budget.
    """
    signed = read_policy(policy or POLICIES / f"{job.scope}.toml")
    asked = None
    if job.tally is not None:
        length = tally_form_of(job.task).length
        asked = preview_without_site(signed, job.tally, job.most_evaluations, length)
    if job.kind != TRAINING:
        unmet = _refuse_evaluation(job, signed) or (None if asked is None else asked.refusal)
        return JobCost(job, signed, signed, at_site=False, asked=asked, refusal=unmet)
    weights = count_sent_by_job(job.strategy, job.task)
    found = preview_without_site(signed, job.plan, job.reserved_rounds, weights)
    return JobCost(job, signed, signed, False, found, asked, weights, refusal=found.refusal)


def find_cost_at_site(job: Job, site: Path, policy: Path | None = None) -> JobCost:
    """Return what a job costs a site's most exposed patient, and whether the site would take it.

    Args:
        job: The job.
        site: The site's own file.
        policy: The file of the signed policy; None: the kit's of the job's scope.

    Raises:
        JobError: A policy or the site's file cannot be used, or the policy has no budget.
        ManifestError: The manifest cannot be used.
    """
    local = real_path(site).parent
    signed_file = policy or local / policy_file(job.scope)
    signed = read_policy(signed_file)
    try:
        rules = read_site_policy(signed_file, local)
    except JobError as error:
        if error.reason != "SCOPE_NOT_ALLOWED":
            raise
        return JobCost(job, signed, signed, at_site=True, refusal=error)
    refusal, kit_is_there = _refused_otherwise(job, rules, site), kit_of(site) is not None
    configuration = read_site_file(site, site_around(site))
    asked = None
    if job.tally is not None:
        length = tally_form_of(job.task).length
        asked = preview(configuration, rules, job.tally, job.most_evaluations, length, job.task, job.split)
    if job.kind != TRAINING:
        unmet = refusal or _refuse_evaluation(job, rules) or (None if asked is None else asked.refusal)
        return JobCost(
            job, signed, rules, at_site=True, asked=asked, refusal=unmet, kit_is_there=kit_is_there
        )
    weights = count_sent_by_job(job.strategy, job.task)
    found = preview(configuration, rules, job.plan, job.reserved_rounds, weights, job.task, job.split)
    slides = kind_of(job.task.data).slides_of_a_patient(configuration, job.task.manifest_labels)
    takes = likely_seconds(job.task, job.plan, max(1, found.patients), slides, device_of(configuration))
    return JobCost(
        job, signed, rules, True, found, asked, weights, takes, refusal or found.refusal, kit_is_there
    )


def _refuse_evaluation(job: Job, rules: Policy) -> JobError | None:
    """Return why a policy with a budget refuses an evaluation whatever is left of the budget."""
    if rules.protection is None:
        return None
    if job.answer_seconds is None:
        return JobError("Under this policy job.toml must say answer_seconds.", reason="PRIVACY_INVALID")
    if job.tally is None and not rules.protection.evaluations:
        return JobError(NO_RAW_FIGURES, reason="EVALUATION_NOT_ALLOWED")
    return None


def _refused_otherwise(job: Job, policy: Policy, site: Path) -> JobError | None:
    """Return why a site would refuse a job whatever its budget, as far as its own file and folder say."""
    local = real_path(site).parent
    try:
        kit = kit_of(site)
        if kit is not None:
            verify_kit(kit)
        check_taking_part(
            policy,
            purpose=job.purpose,
            strategy_name=job.strategy.name,
            model_name=job.task.model_name,
        )
        if (local / PROTOCOL_FILE).is_file():
            check_agreement(job, local)
        kind_of(job.task.data).check_resolution_named(job.task, read_site_file(site))
        if job.kind == TRAINING:
            check_parts(policy, job)
            if kit is not None and not job.transport.readable and not policy.trust_ca:
                check_known(count_pinned(participant_of(kit), policy.pins), policy, job.plan)
    except JobError as error:
        return error
    return None


def _figures(found: Figures | Preview, at_site: bool) -> dict[str, Any]:
    figures = {
        "budget": found.budget.epsilon,
        "job_alone": _finite(found.alone),
        "share": _finite(found.share),
    }
    if at_site:
        figures |= {"spent": _finite(found.before), "together": _finite(found.after)}
    return figures


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
