"""A guarantee in sentences. An ε is rounded up, for it is a bound: what is written is true too."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

WEAK_EPSILON = 10.0
WEAK = "An ε above 10 promises little, if anything."
"""Ponomareva et al. 2023 (How to DP-fy ML): beyond their second tier, which ends at ε = 10."""

ACCOUNTANTS = {"rdp": "RDP", "pld": "PLD", "gaussian": "exact Gaussian"}


def say_epsilon(figure: Mapping[str, Any]) -> str:
    """Return ε with three digits (whole numbers from 1000 on), rounded up; or ``∞``."""
    value = figure["epsilon"]
    if value is None:
        return "∞"
    if value == 0:
        return "0"
    # The last bits of a float are no reason to write 8.000000000000002 as 8.01.
    exact = Decimal(value) * (1 - Decimal("1e-9"))
    for _ in range(2):  # 0.9999 becomes 1.000, and then 1.00
        exact = exact.quantize(Decimal(1).scaleb(min(0, exact.adjusted() - 2)), rounding=ROUND_CEILING)
    return f"{exact:,f}".replace(",", "\u202f")


def say_delta(delta: float) -> str:
    """Return δ as short as it can be said: ``1e-5``."""
    digits, _, power = f"{delta:g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


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
    federation = guarantee["federation"]
    tight = guarantee["accountants"][1]
    figures = f"ε = {say_epsilon(federation['rdp'])} at δ = {say_delta(guarantee['delta'])}"
    figures += f" (RDP; {say_epsilon(federation[tight])} by {ACCOUNTANTS[tight]})"
    if guarantee["epsilon_is_infinite"]:
        return f"{figures}: nothing protects the updates."
    sentence = f"For each {guarantee['unit']} {figures}, {guarantee['neighbouring_relation']}"
    if guarantee["against_server"]["epsilon_is_infinite"]:
        sentence += ", against whoever sees the combined models only. Against the server ε = ∞"
    return f"{sentence}. {WEAK}" if guarantee["epsilon"] > WEAK_EPSILON else f"{sentence}."


def say_title(guarantee: Mapping[str, Any]) -> str:
    """Return the bottom line in a few words."""
    if guarantee["mechanism"] == "open":
        return "Privacy: none guaranteed (ε = ∞)"
    if guarantee["seeded_noise"]:
        return "Privacy: void, for the noise can be repeated (ε = ∞)"
    if guarantee["epsilon_is_infinite"]:
        return "Privacy: none (ε = ∞)"
    delta = say_delta(guarantee["delta"])
    return f"Privacy: ε = {say_epsilon(guarantee)} for each {guarantee['unit']} at δ = {delta}"


def say_site(guarantee: Mapping[str, Any], site: str) -> str:
    """Return what one site's patients spent; nothing where there is no figure of it."""
    spent = guarantee.get("sites", {}).get(site)
    if spent is None:
        return ""
    tight = guarantee["accountants"][1]
    void = "; void" if guarantee["seeded_noise"] else ""
    return (
        f"In this run a patient of this site spent ε = {say_epsilon(spent['rdp'])} (RDP; "
        f"{say_epsilon(spent[tight])} by {ACCOUNTANTS[tight]}{void}) in {spent['updates']} updates; the "
        "site's ledger has what was spent in all."
    )


def say_published(
    published: float | None, reserved: Mapping[str, Any], rounds: int, delta: float
) -> str | None:
    """Return what to say of the source's ε beside the true one of all rounds; None if they agree."""
    if published is None:
        return None
    true = say_epsilon(reserved["rdp"])
    if say_epsilon({"epsilon": published}) == true:
        return None
    tight = next(name for name in reserved if name != "rdp")
    return (
        f"The source of these settings states ε = {published:g}; what a patient of a site spends over all "
        f"{rounds} rounds, at δ = {say_delta(delta)}, is ε = {true} (RDP; {say_epsilon(reserved[tight])} by "
        f"{ACCOUNTANTS[tight]})."
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
