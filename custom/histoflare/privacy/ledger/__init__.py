"""A site's privacy ledger: what was spent on which patients, and what left without protection."""

from __future__ import annotations

from histoflare.privacy.ledger.ledger import Ledger, Verification
from histoflare.privacy.ledger.rules import ROLES
from histoflare.privacy.ledger.tokens import Booking, Disclosure, Release, Reservation

__all__ = ["ROLES", "Booking", "Disclosure", "Ledger", "Release", "Reservation", "Verification"]
