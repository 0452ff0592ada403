"""A guarantee in sentences: one figure, the budget's; other ways to count stand apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from histoflare.privacy import words

WEAK_EPSILON = 10.0
WEAK = "An ε above 10 promises little, if anything."
"""Ponomareva et al. 2023 (How to DP-fy ML): beyond their second tier, which ends at ε = 10."""

ALL_COLLUDE = f"{words.ALL_COLLUDE[0].upper()}{words.ALL_COLLUDE[1:]}"

ACCOUNTANTS = {"rdp": "RDP", "pld": "PLD", "gaussian": "exact Gaussian"}


def say_epsilon(figure: Mapping[str, Any]) -> str:
    """Return an ε of a report as ``privacy.words`` writes it."""
    return words.say_epsilon(figure["epsilon"])


def say_sampler(guarantee: Mapping[str, Any]) -> str:
    """Return which part of δ the sampler of the noise takes; nothing where that is not known."""
    taken = guarantee.get("sampler_delta")
    if taken is None:
        return ""
    if taken > 0.1 * guarantee["delta"]:
        return f"At an ε as large as this the sampler of the noise alone takes δ = {taken:.1g}."
    return f"Of δ the sampler of the noise takes {taken:.1g}: no sampler is ideal."


def say_guarantee(guarantee: Mapping[str, Any]) -> str:
    """Return the bottom line in one sentence, or two where there is a but."""
    if guarantee["mechanism"] == "open":
        return "Nothing protects the updates: ε = ∞ for every patient."
    if guarantee["seeded_noise"]:
        return (
            "There is no guarantee: the noise was drawn from a known seed and can be taken off again. ε = ∞; "
            "the figures are those of the same noise from a source that nobody can repeat."
        )
    federation, budget = guarantee["federation"]["filter"], guarantee["budget"]
    figures = f"ε = {words.say_cost(federation['epsilon'], budget['epsilon'])}"
    if guarantee["epsilon_is_infinite"]:
        return f"{figures}: nothing protects the updates."
    delta = words.say_delta(guarantee["delta"])
    against = say_against(guarantee)
    sentence = f"This job spends {figures} for each {guarantee['unit']}, at δ = {delta}{against}; "
    sentence += say_room(guarantee)
    if second := guarantee.get("if_all_collude"):
        sentence += f". {ALL_COLLUDE}, ε = {say_epsilon(second['federation'])}"
    if guarantee["against_server"]["epsilon_is_infinite"]:
        sentence += ". That is against whoever sees the combined models only; against the server ε = ∞"
    return f"{sentence}. {WEAK}" if guarantee["epsilon"] > WEAK_EPSILON else f"{sentence}."


def say_against(guarantee: Mapping[str, Any]) -> str:
    """Return against whom a figure of shared noise holds, to go on after δ; nothing of any other noise."""
    if not guarantee.get("against"):
        return ""
    return f" {guarantee['against']}" + (f", {words.IF_CA_IS_HONEST}" if guarantee["trusts_ca"] else "")


def say_room(guarantee: Mapping[str, Any]) -> str:
    """Return how many more jobs like this one a patient's budget holds, if nothing else was spent of it."""
    share, further = guarantee["budget"]["share"], guarantee["budget"]["further"]
    said = words.say_further(further, math.inf if share is None else share)
    if further == 0:
        return said
    return f"{said} where nothing else was spent (shares of a budget add up, ε does not)"


def say_how(guarantee: Mapping[str, Any]) -> list[str]:
    """Return how the figure was computed, and what other ways of counting say: for whoever wants to know."""
    federation, budget = guarantee["federation"], guarantee["budget"]
    tight = guarantee["accountants"][-1]
    found = [
        f"ε is that of a Rényi filter for a budget of ε = {budget['epsilon']:g} at δ = "
        f"{words.say_delta(budget['delta'])}, which counts at the one order {budget['order']:g} and holds "
        "whatever jobs are chosen after seeing results (Feldman & Zrnic 2021). A site's ledger counts in its "
        "own budget: where the site has narrowed that, its figure is another one.",
        f"It holds for each {guarantee['unit']}, {guarantee['neighbouring_relation']}. The same "
        f"events, had they been fixed before: ε = {say_epsilon(federation['rdp'])} by RDP at its "
        f"best order, {say_epsilon(federation[tight])} by {ACCOUNTANTS[tight]}. Nothing is admitted by "
        "these.",
    ]
    if budget["share"] is not None:
        found.append(
            f"The job reserved {words.say_share(budget['share'])} of the budget. Shares of jobs add up; "
            "ε does not: the first job of all costs most of it."
        )
    if second := guarantee.get("if_all_collude"):
        found.append(
            f"Sites share the noise: each adds a part, and nobody sees more than the sum. {ALL_COLLUDE}, "
            "what is left is a site's own part, and "
            f"ε = {say_epsilon(second['reserved'])} for all that was reserved, by RDP at its best order. "
            "Which sites a site counts on, how many of them may collude, and how large the budget for this "
            "second figure is, its own policy says, and its ledger counts by that. The protection of the sum "
            "is computational: should its masks ever be opened, this second figure is what holds."
        )
    return found


def say_title(guarantee: Mapping[str, Any]) -> str:
    """Return the bottom line in a few words."""
    if guarantee["mechanism"] == "open":
        return "Privacy: none guaranteed (ε = ∞)"
    if guarantee["seeded_noise"]:
        return "Privacy: void, for the noise can be repeated (ε = ∞)"
    if guarantee["epsilon_is_infinite"]:
        return "Privacy: none (ε = ∞)"
    spent = words.say_cost(guarantee["epsilon"], guarantee["budget"]["epsilon"])
    return f"Privacy: spends ε = {spent} at δ = {words.say_delta(guarantee['delta'])}{say_against(guarantee)}"


def say_site(guarantee: Mapping[str, Any], site: str) -> str:
    """Return what one site's patients spent; nothing where there is no figure of it."""
    spent = guarantee.get("sites", {}).get(site)
    if spent is None:
        return ""
    void = " (void)" if guarantee["seeded_noise"] else ""
    cost = words.say_cost(spent["filter"]["epsilon"], guarantee["budget"]["epsilon"])
    return (
        f"In this run a patient of this site spent ε = {cost}{void} in {spent['updates']} updates"
        f"{say_against(guarantee)}; the site's ledger has what was spent in all."
    )


def say_published(
    published: float | None, reserved: Mapping[str, Any], rounds: int, delta: float
) -> str | None:
    """Return what to say of the source's ε beside the true one of all rounds; None if RDP's agrees.

    Sources state ε by RDP, of events fixed beforehand, to two decimals.
    """
    if published is None:
        return None
    rdp = reserved["rdp"]["epsilon"]
    if rdp is not None and abs(rdp - published) < 0.005:
        return None
    true, tight = say_epsilon(reserved["filter"]), list(reserved)[-1]
    return (
        f"The source of these settings states ε = {published:g}; what a patient of a site spends over all "
        f"{rounds} rounds, at δ = {words.say_delta(delta)}, is ε = {true} ("
        f"{say_epsilon(reserved['rdp'])} by RDP at its best order, as such figures are mostly stated; "
        f"{say_epsilon(reserved[tight])} by {ACCOUNTANTS[tight]})."
    )


def say_not_covered(guarantee: Mapping[str, Any]) -> str:
    """Return what left, or stands in this report, without noise."""
    found = guarantee["not_covered"]
    parts = []
    if number := found["evaluations"]:
        parts.append(f"{number} evaluation{'' if number == 1 else 's'} of the last model at the sites")
    if number := found["metrics_of_rounds"]:
        parts.append(f"metrics that sites sent in the rounds, {number} in all")
    if found.get("own_figures", True):
        parts.append(
            "this report's own figures, those of the bounds (local, pooled) and at other budgets among them"
        )
    if not parts:
        return ""
    return f"Not covered, for there is no noise in it: {'; '.join(parts)}."


def say_chance(entry: Mapping[str, Any], metric: str, chance: float | None) -> str:
    """Return whether a figure at a job's own ε can be told from guessing."""
    interval = entry.get(f"{metric}_ci95")
    if not interval:
        return "Whether the model at this ε is better than guessing cannot be said: there is no interval."
    between = f"At the job's ε = {say_epsilon(entry)} the interval is {interval[0]:.2f} to {interval[1]:.2f}"
    if chance is None:
        return f"{between}. What guessing gives cannot be said: it depends on how frequent the classes are."
    if interval[0] <= chance <= interval[1]:
        return f"{between}, which includes {chance:.2g}: not distinguishable from chance."
    side = "above" if interval[0] > chance else "below"
    return f"{between}, {side} {chance:.2g}, which guessing gives."
