"""A site's privacy ledger: what was spent on which patients, and what left without protection."""

from __future__ import annotations

from histoflare.privacy.ledger.events import ROLES
from histoflare.privacy.ledger.history import Event, RunHistory
from histoflare.privacy.ledger.ledger import Identity, Ledger, Verification
from histoflare.privacy.ledger.state import STEWARD, WORKSTATION
from histoflare.privacy.ledger.tokens import (
    EVALUATION,
    UPDATE,
    Account,
    Booking,
    Disclosure,
    Release,
    Reservation,
)

__all__ = [
    "EVALUATION",
    "ROLES",
    "STEWARD",
    "UPDATE",
    "WORKSTATION",
    "Account",
    "Booking",
    "Disclosure",
    "Event",
    "Identity",
    "Ledger",
    "Release",
    "Reservation",
    "RunHistory",
    "Verification",
]
