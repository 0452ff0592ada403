"""What an entry of a ledger may say: its fields, the mechanism behind it, and whom its protection trusts.

Entries that cost something, or that nothing protects, have two fields more than they need today, so that
later kinds of protection are told apart and never counted as one of today's:

``mechanism``  an object with a ``kind``: ``gaussian`` with the numbers of a :class:`Spend` (a booking has the
               kind alone: the numbers are its reservation's), or ``none`` for what left without protection
``trust``      null: protects against everybody; ``{"server": true}``: not against the server, which adds the
               noise

Raw numbers are kept, never an ε: each filter derives its own charges. Whatever this version does not know,
an entry, a field, a kind, is refused: it was written by a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.errors import HistoflareError
from histoflare.privacy.spend import Spend

GAUSSIAN = {"kind": "gaussian"}
UNPROTECTED = {"kind": "none"}

FIELDS = {
    "created": {"version", "ledger", "site", "owner", "place"},
    "patients": {"count", "sha256"},
    "cohort": {"sha256"},
    "reservation": {"run", "about", "rounds", "cohort", "mechanism", "trust"},
    "booking": {"reservation", "round", "model", "attempt", "mechanism", "trust"},
    "release": {"of", "digest", "figures"},
    "failure": {"of"},
    "disclosure": {
        *("what", "run", "round", "model", "cohort", "patients", "figures", "digest"),
        *("mechanism", "trust"),
    },
    "closing": {"run", "reservations"},
    "departure": {"to"},
    "move": {"place", "site"},
}
"""Kind of entry → the fields of its body, all of them."""


class UnknownEventError(Exception):
    """An entry says what this version does not know."""


def check_fields(kind: str, content: Any) -> None:
    """Raise :class:`UnknownEventError` unless an entry of this kind has just these fields."""
    if kind not in FIELDS:
        raise UnknownEventError(f"an entry of the kind '{kind}'")
    if not isinstance(content, dict) or set(content) != FIELDS[kind]:
        raise UnknownEventError(f"a {kind} of other fields")


def mechanism_of(spend: Spend) -> dict[str, Any]:
    """Return a spend as an entry's mechanism."""
    return {**GAUSSIAN, **spend.to_json()}


def read_mechanism(content: Mapping[str, Any]) -> Spend:
    """Return the spend of an entry's mechanism; :class:`UnknownEventError` for any other mechanism."""
    mechanism = content["mechanism"]
    try:
        numbers = {name: value for name, value in mechanism.items() if name != "kind"}
        if mechanism["kind"] == GAUSSIAN["kind"]:
            return Spend.from_json(numbers)
    except (HistoflareError, LookupError, TypeError, AttributeError):
        pass
    raise UnknownEventError(f"the mechanism {mechanism!r}")


def check_mechanism(content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise :class:`UnknownEventError` if an entry's mechanism is not the one expected of it."""
    if content["mechanism"] != expected:
        raise UnknownEventError(f"the mechanism {content['mechanism']!r}")


def trust_of(trusts_server: bool) -> dict[str, Any] | None:
    """Return an entry's trust."""
    return {"server": True} if trusts_server else None


def read_trust(content: Mapping[str, Any]) -> bool:
    """Return whether the server is trusted; :class:`UnknownEventError` for any other trust."""
    for trusts_server in (False, True):
        if content["trust"] == trust_of(trusts_server):
            return trusts_server
    raise UnknownEventError(f"the trust {content['trust']!r}")
