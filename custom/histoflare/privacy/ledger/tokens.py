"""What a ledger hands out: the tokens without which nothing is trained, computed or let out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from histoflare.privacy.spend import Spend

if TYPE_CHECKING:
    from histoflare.privacy.budget import Filter

EVALUATION = "evaluation"
UPDATE = "update"


@dataclass(frozen=True)
class Reservation:
    """What a run may spend on a cohort; the token without which nothing is booked.

    Attributes:
        id: Number of its entry.
        run: The run's name, which a job that resumes it has too.
        about: What it was for: what the noise protects against, in a few words.
        spend: The event of one round.
        rounds: How many of them are reserved; at least 1.
        patients: Size of the cohort. It is the site's own.
        trusts_server: Whether the protection does not hold against the server, which adds the noise.
        trusts_ca: Whether sites were counted on that only the certificate authority vouches for.
        leaves_out: Whether whoever had no room was left out; else nobody was, or nothing was reserved.
    """

    id: int
    run: str
    about: str
    spend: Spend
    rounds: int
    patients: int
    trusts_server: bool = False
    trusts_ca: bool = False
    leaves_out: bool = False


@dataclass(frozen=True)
class Booking:
    """One event that was charged, before anything was computed.

    Attributes:
        id: Number of its entry; later bookings have greater ones.
        reservation: The reservation's ``id``.
        round_index: The round, from 0.
        model_sha256: Hash of the model that was received for it, or of the transcript of a sum.
        attempt: 1; more where the round was booked again: released bytes were lost, or it had failed.
        countable: Of shared noise, on how many sites of the sum this one counted, itself included; else None.
    """

    id: int
    reservation: int
    round_index: int
    model_sha256: str
    attempt: int
    countable: int | None = None


@dataclass(frozen=True)
class Release:
    """A booking whose bytes may have left: only the same bytes may leave again.

    Attributes:
        booking: What was booked.
        digest: SHA-256 (hex) of the bytes.
    """

    booking: Booking
    digest: str


@dataclass(frozen=True)
class Disclosure:
    """What may have left without protection: figures of a model on some patients, or an update.

    Attributes:
        id: Number of its entry. unix_time: Of the entry.
        what: :data:`EVALUATION` or :data:`UPDATE`.
        run, model_sha256: What was evaluated, or what the update started from.
        patients: Of how many patients.
        round_index: Of an update; from 0.
        is_counted: Whether it counts among the evaluations that the policy allows of each patient.
    """

    id: int
    unix_time: int
    what: str
    run: str
    model_sha256: str
    patients: int
    round_index: int | None = None
    is_counted: bool = False


@dataclass
class Account:
    """A reservation, and what became of it.

    Attributes:
        cohort: Number of its cohort.
        role: Of the cohort's patients.
        is_open: Whether more may be booked.
        booked, released, failed: Events; what failed is not released, and counts as booked.
        countable: Of shared noise: on how many sites a sum counted → so many of the booked events.
    """

    reservation: Reservation
    cohort: int
    role: str
    is_open: bool = True
    booked: int = 0
    released: int = 0
    failed: int = 0
    countable: Counter[int] = field(default_factory=Counter)

    @property
    def events(self) -> int:
        """How many events the cohort is charged: while open at least what is reserved."""
        return max(self.reservation.rounds, self.booked) if self.is_open else self.booked

    def charged(self, kept: Filter, *, further: int | None = None) -> list[Spend]:
        """Return what the cohort is charged, as the events that it is against a filter's adversary.

        Args:
            kept: The filter.
            further: One event more than are booked, and on how many sites it counts; 0 where noise is not
                shared. None: what is booked and reserved.
        """
        spend, more = self.reservation.spend, 0 if further is None else 1
        events = max(self.events, self.booked + more)
        if spend.honest == 1:
            return [spend.times(events)] if events else []
        booked = self.countable + Counter([further] if further else [])
        counted: list[tuple[int | None, int]] = [*booked.items(), (None, events - booked.total())]
        return [kept.price(spend, countable).times(count) for countable, count in counted if count]
