"""What an evaluation under a budget cost, and what all sites together say of the model.

A site then sends noised counts in place of figures (``privacy.tally``), booked on the patients asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from histoflare.privacy import words
from histoflare.privacy.budget import Budget
from histoflare.privacy.spend import Spend
from histoflare.report.guarantee import epsilon_if_all_collude, state_epsilon

WHY_DROWNED = (
    "A figure that is missing cannot be told from the noise: too few test patients, of some class or in all."
)


def state_evaluation(
    plan: Mapping[str, Any],
    spend: Mapping[str, Any],
    total: Mapping[str, Any] | None,
    *,
    trusts_ca: bool = False,
) -> dict[str, Any]:
    """Return an evaluation's cost and figures as plain JSON.

    Args:
        plan: Its noise (``Tally.to_json``).
        spend: The event of all of a job's evaluations, sums that did not open among them
            (``Spend.to_json``).
        total: What the server computed of the sum of all counts (``evaluation_total.json``); None: there is
            no sum, as too few sites answered.
        trusts_ca: Whether a site counted on sites that it has not pinned.

    Returns:
        ``epsilon`` of each patient who is asked about, at ``delta``, by the filter of a budget of
        ``budget_epsilon``; ``if_all_collude`` where the sites share the noise, else null; ``trusts_ca``;
        ``seeded_noise``; ``together``: the ``sites`` whose counts are in the sum, and its ``figures``, or
        null.
    """
    budget, event = Budget(plan["budget_epsilon"], plan["delta"]), Spend.from_json(spend)
    shared = event.honest > 1
    return {
        **state_epsilon(budget.spent([event])),
        "delta": budget.delta,
        "budget_epsilon": budget.epsilon,
        "noise_multiplier": event.noise_multiplier,
        "honest": event.honest,
        "if_all_collude": state_epsilon(epsilon_if_all_collude(budget, [event])) if shared else None,
        "trusts_ca": trusts_ca,
        "seeded_noise": plan["noise_seed"] is not None,
        "together": None
        if total is None
        else {"sites": list(total["sites"]), "figures": dict(total["figures"])},
    }


def say_evaluation_noise(found: Mapping[str, Any] | None) -> str:
    """Return what an evaluation cost in words; empty where its figures have no noise."""
    if found is None:
        return ""
    if found["seeded_noise"]:
        return "The noise in these figures was drawn from a known seed and protects nobody."
    cost = words.say_cost(found["epsilon"], found["budget_epsilon"])
    said = (
        "These figures were computed from counts with noise in them, and their intervals take account of it. "
        f"The evaluation spent ε = {cost} of each test patient at δ = {words.say_delta(found['delta'])}"
    )
    if second := found["if_all_collude"]:
        said += f", {words.say_against(found['honest'])}"
        said += f", {words.IF_CA_IS_HONEST}" if found.get("trusts_ca") else ""
        said += f"; {words.ALL_COLLUDE} ε = "
        said += words.say_epsilon(second["epsilon"])
    return f"{said}."


def figures_together(report: Mapping[str, Any]) -> tuple[Sequence[str], Mapping[str, float | None]] | None:
    """Return the sites whose counts were added up, and the figures of the sum; None where there is none."""
    together = (report.get("evaluation_noise") or {}).get("together")
    return None if together is None else (together["sites"], together["figures"])
