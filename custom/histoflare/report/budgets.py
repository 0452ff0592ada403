"""What a smaller or a greater ε costs in accuracy: one job at several budgets, over the same data."""

from __future__ import annotations

import math
from typing import Any

from histoflare.privacy.plan import PrivacyPlan
from histoflare.report.consortium import flatten_metrics
from histoflare.report.figures import CLASSIFICATION, KINDS
from histoflare.report.guarantee import state_epsilon
from histoflare.report.headline import mean_of
from histoflare.rounds.comparison import Comparison


def budget_entry(
    plan: PrivacyPlan,
    rounds: int,
    comparison: Comparison,
    bounds: Comparison,
    *,
    is_own: bool = False,
    data: str = CLASSIFICATION.data,
) -> dict[str, Any]:
    """Return one point of accuracy against ε, as plain JSON.

    ``epsilon`` is what a patient of a site that takes part in every round spends of the plan's budget. The
    figures are those on the test patients of all sites. ``site_mean`` and ``local_mean`` are the mean over
    the sites of the kind's main figure, each site on its own test patients: of the federated model, and of
    the sites' own without noise.

    Args:
        plan: Settled.
        comparison: Of the model that was trained under it.
        bounds: With the sites' own models; without noise they do not depend on ε.
        is_own: Whether this is the job's own plan, and not another of the same job.
        data: Of the job's task, see ``report.figures.KINDS``.

    Raises:
        JobError: The plan's event cannot be accounted (PRIVACY_INVALID).
    """
    kind = KINDS[data]
    settings = plan.to_json()
    delta = settings.get("delta")
    budget = plan.budget()
    spent = math.inf if budget is None else budget.spent([plan.spend().times(rounds)])
    federated = flatten_metrics(comparison.federated) or dict.fromkeys(kind.names)
    federated.pop("subgroups", None)
    return {
        "mechanism": plan.mechanism,
        **state_epsilon(spent),
        "delta": delta,
        "noise_multiplier": settings.get("noise_multiplier"),
        "seeded_noise": plan.noise_seed is not None and not math.isinf(spent),
        "is_own": is_own,
        "rounds": rounds,
        **federated,
        "site_mean": _mean_of_sites(comparison, "federated", kind.main),
        "local_mean": _mean_of_sites(
            bounds, "local_unprotected" if bounds.local_unprotected else "local", kind.main
        ),
    }


def _mean_of_sites(comparison: Comparison, model: str, metric: str) -> float | None:
    figures = [flatten_metrics(getattr(site, model)) for site in comparison.sites.values()]
    return mean_of(figures, metric)
