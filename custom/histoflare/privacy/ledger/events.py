"""What an entry of a ledger may say: its fields, the mechanism behind it, and whom its protection trusts.

Entries that cost something, or that nothing protects, have two fields more than they need today, so that
later kinds of protection are told apart and never counted as one of today's:

``mechanism``  an object with a ``kind``: ``gaussian`` or ``gaussian-share`` with the numbers of a
               :class:`Spend` (those of a booking are its reservation's; the booking of a share has instead on
               how many sites of the sum this one counted, ``countable``, itself included), or ``none`` for
               what left without protection
``trust``      null: nobody; ``{"server": true}``: the server, which adds the noise, and against which nothing
               protects; ``{"ca": true}``: whoever holds the key of the consortium's certificate authority,
               and could stand in for sites that were counted on

Raw numbers are kept, never an ε, nor how many sites collude: each filter derives its own charges. Whatever
this version does not know, an entry, a field, a kind, is refused: it was written by a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.checks import is_whole
from histoflare.errors import HistoflareError
from histoflare.privacy.spend import Spend

ROLES = ("train", "validation", "test")

GAUSSIAN = {"kind": "gaussian"}
SHARE = {"kind": "gaussian-share"}
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

LEAVES_OUT = "leaves_out"
"""A further field of a reservation that left out whoever had no room: the role of its cohort, which may be
empty. An earlier version refuses a ledger that has one."""


class UnknownEventError(Exception):
    """An entry says what this version does not know."""


def check_fields(kind: str, content: Any) -> None:
    """Raise :class:`UnknownEventError` unless an entry of this kind has just these fields."""
    if kind not in FIELDS:
        raise UnknownEventError(f"an entry of the kind '{kind}'")
    known = FIELDS[kind]
    if kind == "reservation" and isinstance(content, dict) and LEAVES_OUT in content:
        known = known | {LEAVES_OUT}
    if not isinstance(content, dict) or set(content) != known:
        raise UnknownEventError(f"a {kind} of other fields")


def mechanism_of(spend: Spend) -> dict[str, Any]:
    """Return a spend as an entry's mechanism."""
    return {**(SHARE if spend.honest > 1 else GAUSSIAN), **spend.to_json()}


def booked_mechanism(countable: int | None) -> dict[str, Any]:
    """Return the mechanism of a booking; ``countable``: of shared noise, see the module."""
    return dict(GAUSSIAN) if countable is None else {**SHARE, "countable": countable}


def read_countable(content: Mapping[str, Any], spend: Spend) -> int | None:
    """Return on how many sites a booking of shared noise counted; None for any other noise.

    Args:
        spend: Of the booking's reservation.

    Raises:
        UnknownEventError: The booking has another mechanism than its reservation.
    """
    mechanism = content["mechanism"]
    countable = mechanism.get("countable") if isinstance(mechanism, dict) else None
    if mechanism == booked_mechanism(countable) and (spend.honest > 1) == is_whole(countable, 1):
        return countable
    raise UnknownEventError(f"the mechanism {mechanism!r}")


def read_mechanism(content: Mapping[str, Any]) -> Spend:
    """Return the spend of an entry's mechanism; :class:`UnknownEventError` for any other mechanism."""
    mechanism = content["mechanism"]
    try:
        numbers = {name: value for name, value in mechanism.items() if name != "kind"}
        spend = Spend.from_json(numbers)
        if mechanism == mechanism_of(spend):
            return spend
    except (HistoflareError, LookupError, TypeError, AttributeError):
        pass
    raise UnknownEventError(f"the mechanism {mechanism!r}")


def check_mechanism(content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise :class:`UnknownEventError` if an entry's mechanism is not the one expected of it."""
    if content["mechanism"] != expected:
        raise UnknownEventError(f"the mechanism {content['mechanism']!r}")


def trust_of(*, server: bool, ca: bool = False) -> dict[str, Any] | None:
    """Return an entry's trust."""
    named = {name: True for name, is_trusted in (("server", server), ("ca", ca)) if is_trusted}
    return named or None


def read_leaves_out(content: Mapping[str, Any]) -> str | None:
    """Return the role of a reservation's cohort if it left out whoever had no room; else None.

    Raises:
        UnknownEventError: It is no role.
    """
    role = content.get(LEAVES_OUT)
    if LEAVES_OUT in content and role not in ROLES:
        raise UnknownEventError(f"a reservation that leaves out {role!r}")
    return role


def read_trust(content: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether server and certificate authority are trusted; UnknownEventError for any other trust."""
    for server in (False, True):
        for ca in (False, True):
            if content["trust"] == trust_of(server=server, ca=ca):
                return server, ca
    raise UnknownEventError(f"the trust {content['trust']!r}")
