"""How an ε is written, everywhere: rounded up, for it is a bound, to the same decimals."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

from histoflare.privacy.budget import Budget

MANY = 1000
"""From so many on, a number of jobs is not counted for a person."""

ALL_BUT = 0.999
"""Share of an allowance above which nothing is said to be left."""


def say_epsilon(value: float | None) -> str:
    """Return an ε with one decimal (below 1 with two, from 1000 on with none), rounded up.

    Args:
        value: At least 0; ∞ and None (JSON's infinity) are written ``∞``, NaN ``unknown``.
    """
    if value is None or value == math.inf:
        return "∞"
    if math.isnan(value):
        return "unknown"
    if value == 0:
        return "0"
    # The last bits of a float are no reason to write 8.000000000000002 as 8.1; and a budget itself lets up to
    # 1e-9 of its allowance too much pass.
    exact = Decimal(value) * (1 - Decimal("1e-9"))
    decimals = 2 if exact < 1 else 1 if exact < 1000 else 0
    return f"{exact.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_CEILING):,f}".replace(",", "\u202f")


def say_delta(delta: float) -> str:
    """Return δ as short as it can be said: ``1e-5``."""
    digits, _, power = f"{delta:g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def say_cost(epsilon: float | None, budget_epsilon: float) -> str:
    """Return what is spent of a budget: ``4.5 of 8``."""
    return f"{say_epsilon(epsilon)} of {budget_epsilon:g}"


def say_against(honest: int, sites: int | None = None) -> str:
    """Return against whom a figure of shared noise holds, from the job's own numbers.

    Args:
        honest: On how many sites' shares of noise the job counts, the patient's own site included.
        sites: How many take part in each sum; None: not known.
    """
    if sites is None:
        return f"against the server and all sites but {honest}, the patient's own among these"
    if sites <= honest:
        return "against the server and no other site"
    others = sites - honest
    return f"against the server and any {others} other site{'s' if others > 1 else ''}"


ALL_COLLUDE = "should all other sites collude with the server"
"""Whom the second figure of shared noise is about."""

IF_CA_IS_HONEST = "if whoever holds the key of the consortium's certificate authority is honest"
"""What goes with a figure where a site counts on sites that it has not pinned."""


def say_share(share: float) -> str:
    """Return a share of a budget in percent, rounded up as an ε is."""
    return "∞" if share == math.inf else f"{say_epsilon(100 * share)} %".replace(".0 %", " %")


def say_room(budget: Budget, cost: float, spent: float) -> str:
    """Return how many more jobs like one fit into a budget, in words.

    Args:
        budget: The budget.
        cost: ρ of one such job at the budget's order. spent: ρ of all that was spent, this job included.
    """
    return say_further(budget.room_for(cost, spent), budget.share_of(spent))


def say_further(further: int | None, share: float, before: float = 0.0) -> str:
    """Return how many more jobs like one fit, in words.

    Args:
        further: How many; None: any number.
        share: Of the budget's allowance, spent with the one.
        before: Of the same, spent before the one; at least 0.
    """
    if further is None:
        return "any number more like it fit"
    if further == 0 and share > 1 + 1e-6:
        if before > ALL_BUT:
            return "and the budget is used up already"
        return "that is more than is left" if before > 1e-6 else "that is more than there is"
    if further == 0:
        return (
            "nothing is left for a second" if share > ALL_BUT else "too little is left for a second like it"
        )
    if further >= MANY:
        return f"more than {MANY} more like it fit"
    return "1 more like it fits" if further == 1 else f"{further} more like it fit"
