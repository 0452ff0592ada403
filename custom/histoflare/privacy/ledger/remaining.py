"""How much of a budget each patient has left, for the site's own people: how many have how much.

It stays at the hospital: who has little left took part in much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from histoflare.privacy.ledger.chain import normalised
from histoflare.privacy.ledger.state import LedgerState

if TYPE_CHECKING:
    from histoflare.privacy.budget import Budget

PARTS = 1000
"""Shares are counted in thousandths, rounded down: nobody has more left than is said."""


@dataclass(frozen=True)
class PatientsLeft:
    """Patients of one role who have equally much left.

    Attributes:
        role: train, validation or test.
        left: Share of the allowance that is left, 0 to 1 and rounded down to a thousandth, by each of the
            budget's filters in their order: against the server and its colluders; should all others collude.
        patients: How many.
        names: Of those among them who were asked about by name, in alphabetical order.
    """

    role: str
    left: tuple[float, ...]
    patients: int
    names: tuple[str, ...]


def count_left(state: LedgerState, budget: Budget, names: Iterable[str] = ()) -> tuple[PatientsLeft, ...]:
    """Return how many patients have how much left, those with the least first.

    What an open run has reserved counts as spent.

    Args:
        names: Patients to be named, such as all of a manifest: the ledger itself knows nobody's name. One
            whom it has not met is in none of the groups.
    """
    kept = budget.filters()
    charges = [state.charges(each) for each in kept]
    known: dict[int, str] = {}
    for name in map(normalised, names):
        number = state.patients.get(state.keys.patient(name))
        if number is not None:
            known[number - 1] = name
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, role in enumerate(state.roles):
        left = tuple(
            _parts_left(float(charged[index]), each.budget.allowance)
            for each, charged in zip(kept, charges, strict=True)
        )
        groups.setdefault((role, left), []).append(index)
    found = [
        PatientsLeft(
            role=role,
            left=tuple(part / PARTS for part in left),
            patients=len(indices),
            names=tuple(sorted(known[index] for index in indices if index in known)),
        )
        for (role, left), indices in groups.items()
    ]
    return tuple(sorted(found, key=lambda each: (min(each.left), each.left, each.role)))


def _parts_left(rho: float, allowance: float) -> int:
    return max(0, math.floor(PARTS * (1.0 - rho / allowance)))
