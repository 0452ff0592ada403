"""What a ledger's entries amount to: read from the first to the last, each verified before it counts.

Nothing that can be derived is stored. Who was charged what follows from the reservations, the bookings under
them, and the cohorts; a cohort is a bit set over the patients' numbers, so that a thousand cohorts of ten
thousand patients are a megabyte.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from histoflare.privacy.ledger.chain import Entry, Keys
from histoflare.privacy.ledger.events import (
    UNPROTECTED,
    UnknownEventError,
    check_fields,
    check_mechanism,
    read_countable,
    read_leaves_out,
    read_mechanism,
    read_trust,
)
from histoflare.privacy.ledger.file import VERSION, damaged, later
from histoflare.privacy.ledger.key import Head
from histoflare.privacy.ledger.place import Place
from histoflare.privacy.ledger.tokens import Account, Booking, Disclosure, Reservation

if TYPE_CHECKING:
    from histoflare.privacy.budget import Filter


STEWARD = "steward"
WORKSTATION = "workstation"
"""Owners of a ledger: who made it, for patients or to try things out."""


def pack(ids: Iterable[int]) -> bytes:
    """Return patients' numbers (from 1) as a bit set; equal sets give equal bytes."""
    chosen = np.fromiter(ids, dtype=np.int64)
    bits = np.zeros(int(chosen.max(initial=0)), dtype=bool)
    bits[chosen - 1] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unpack(members: bytes) -> npt.NDArray[np.bool_]:
    """Return a bit set as a mask (8 · bytes,) whose index i is the patient of number i + 1."""
    return np.unpackbits(np.frombuffer(members, dtype=np.uint8), bitorder="little").view(np.bool_)


def patients_hash(rows: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the SHA-256 (hex) of patients' (mac, role), in order of their numbers."""
    return hashlib.sha256(b"".join(mac + role + b"\n" for mac, role in rows)).hexdigest()


@dataclass
class LedgerState:
    """The state of a ledger after its newest verified entry.

    Attributes:
        path: The ledger, for messages.
        head: Number and chain of the newest entry.
        unix_time: Of the newest entry.
        ledger: The ledger's own number (hexadecimal); copies have the same.
        site: The site it is bound to. owner: Who made it: :data:`STEWARD` or :data:`WORKSTATION`.
        place: Where it is bound to. is_away: Whether it was closed there, to be moved.
        went_to: The path of the ledger that closed it; None where it was closed before it was copied.
        patients: MAC → number, from 1 without gaps.
        roles: Role of patient i + 1 at index i.
        cohorts: Bit set of cohort i + 1 at index i.
        accounts, bookings: By number of entry.
        newest: (reservation, round, model) → number of its newest booking.
        transcripts: Those of shared noise that were booked: each serves for one vector.
        paid: Number of entry → what may be released: bookings and disclosures.
        releases: Number of entry → digest of what was released for it.
        failures: Bookings that were answered with a failure; none of them is released.
        counted: Evaluations that the policy counts, by (run, model, cohort).
        noted: All else that left without protection, by (what, run, round, model, digest).
        figures: Number of a disclosure → the names of the figures that left.
    """

    path: Path
    keys: Keys
    head: Head = field(default_factory=Head)
    unix_time: int = 0
    ledger: str = ""
    site: str = ""
    owner: str = ""
    place: Place | None = None
    is_away: bool = False
    went_to: str | None = None
    patients: dict[bytes, int] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)
    cohorts: list[bytes] = field(default_factory=list)
    cohort_ids: dict[bytes, int] = field(default_factory=dict)
    accounts: dict[int, Account] = field(default_factory=dict)
    bookings: dict[int, Booking] = field(default_factory=dict)
    newest: dict[tuple[int, int, str], int] = field(default_factory=dict)
    transcripts: set[str] = field(default_factory=set)
    paid: dict[int, Booking | Disclosure] = field(default_factory=dict)
    releases: dict[int, str] = field(default_factory=dict)
    digests: set[str] = field(default_factory=set)
    failures: set[int] = field(default_factory=set)
    counted: dict[tuple[str, str, int], Disclosure] = field(default_factory=dict)
    noted: dict[tuple[str, str, int | None, str, str], Disclosure] = field(default_factory=dict)
    figures: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def read_on(self, connection: sqlite3.Connection) -> list[Entry]:
        """Verify and take in the entries after :attr:`head`; return them.

        Raises:
            LedgerError: An entry, a patient or a cohort is not what was written (LEDGER_DAMAGED), or a later
                version of this program wrote it (LEDGER_UNUSABLE).
        """
        if self.head.seq:
            row = connection.execute("SELECT chain FROM entries WHERE seq = ?", (self.head.seq,)).fetchone()
            if row != (self.head.chain,):
                raise damaged(self.path, f"entry {self.head.seq} is gone or has changed")
        rows = connection.execute(
            "SELECT seq, unix_time, kind, body, chain FROM entries WHERE seq > ? ORDER BY seq",
            (self.head.seq,),
        )
        entries = []
        for row in rows.fetchall():
            entry = self._verify(*row)
            self._take_rows(connection, entry)
            self.apply(entry)
            entries.append(entry)
        for table, count in (("patients", len(self.roles)), ("cohorts", len(self.cohorts))):
            if connection.execute(f"SELECT count(*) FROM {table}").fetchone() != (count,):
                raise damaged(self.path, f"there are {table} that no entry speaks of")
        return entries

    def _verify(self, seq: Any, unix_time: Any, kind: Any, body: Any, chain: Any) -> Entry:
        fits = (
            (type(seq), type(unix_time)) == (int, int)
            and all(type(part) is bytes for part in (kind, body, chain))
            and seq == self.head.seq + 1
            and hmac.compare_digest(chain, self.keys.link(self.head.chain, seq, unix_time, kind, body))
        )
        if not fits:
            whose = ", or the key is not this ledger's" if self.head.seq == 0 else ""
            raise damaged(self.path, f"entry {self.head.seq + 1} is damaged{whose}")
        return Entry(seq, unix_time, kind.decode(), body.decode(), chain)

    def _take_rows(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Take in the patients or the cohort that an entry added, if they are those it speaks of."""
        content = self._content(entry)
        if entry.kind == "patients":
            first = len(self.roles) + 1
            rows = connection.execute(
                "SELECT mac, role FROM patients WHERE id BETWEEN ? AND ? ORDER BY id",
                (first, first + content["count"] - 1),
            ).fetchall()
            sound = all(type(mac) is bytes and type(role) is bytes for mac, role in rows)
            if not sound or len(rows) != content["count"] or patients_hash(rows) != content["sha256"]:
                raise damaged(self.path, "its patients are damaged")
            self.add_patients((mac, role.decode()) for mac, role in rows)
        elif entry.kind == "cohort":
            row = connection.execute(
                "SELECT members FROM cohorts WHERE id = ?", (len(self.cohorts) + 1,)
            ).fetchone()
            sound = row is not None and type(row[0]) is bytes
            if not sound or hashlib.sha256(row[0]).hexdigest() != content["sha256"]:
                raise damaged(self.path, "a cohort is damaged")
            self.add_cohort(row[0])

    def add_patients(self, rows: Iterable[tuple[bytes, str]]) -> None:
        """Take in patients, each with the next number."""
        for mac, role in rows:
            self.roles.append(role)
            self.patients[mac] = len(self.roles)

    def add_cohort(self, members: bytes) -> None:
        """Take in a cohort, with the next number."""
        self.cohorts.append(members)
        self.cohort_ids[members] = len(self.cohorts)

    def apply(self, entry: Entry) -> None:
        """Take in a verified entry; its patients or cohort are in already."""
        content = self._content(entry)
        self.unix_time = entry.unix_time
        try:
            _HANDLERS[entry.kind](self, entry.seq, content)
        except UnknownEventError as error:
            raise later(self.path, str(error)) from None
        self.head = Head(entry.seq, entry.chain)

    def _content(self, entry: Entry) -> Any:
        content = entry.content()
        try:
            check_fields(entry.kind, content)
        except UnknownEventError as error:
            raise later(self.path, str(error)) from None
        return content

    def members(self, cohort: int) -> npt.NDArray[np.bool_]:
        """Return a cohort's mask over the first of the patients; those beyond it are not in the cohort."""
        return unpack(self.cohorts[cohort - 1])[: len(self.roles)]

    def size(self, cohort: int) -> int:
        """Return how many patients are in a cohort."""
        return int.from_bytes(self.cohorts[cohort - 1], "little").bit_count()

    def role_of(self, cohort: int) -> str:
        """Return the role of a cohort's patients, of whom there is one: all have one, which never changes."""
        members = int.from_bytes(self.cohorts[cohort - 1], "little")
        return self.roles[(members & -members).bit_length() - 1]

    def overlap(self, one: int, other: int) -> bool:
        """Return whether two cohorts have a patient in common."""
        members = [int.from_bytes(self.cohorts[cohort - 1], "little") for cohort in (one, other)]
        return bool(members[0] & members[1])

    def charges(
        self, kept: Filter, *, without: int | None = None, run: str | None = None
    ) -> npt.NDArray[np.float64]:
        """Return what each patient was charged, (patients,): ρ by a filter; index = number - 1.

        Each patient's figure is the exact sum of the patient's own parts, rounded once: to the last bit it
        does not depend on with whom the patient was in a cohort.

        Args:
            kept: The filter, which says against whom.
            without: A reservation that is left out.
            run: Count this run alone; None counts all.
        """
        costs: dict[int, list[float]] = defaultdict(list)
        for id_, account in self.accounts.items():
            if id_ != without and run in (None, account.reservation.run):
                costs[account.cohort] += [kept.budget.cost(spend) for spend in account.charged(kept)]
        parts = [part for part in costs.values() if part]
        cohorts = [cohort for cohort, part in costs.items() if part]
        charged = np.zeros(len(self.roles))
        if not cohorts or not len(charged):
            return charged
        there = np.zeros((len(charged), len(cohorts)), dtype=bool)  # (patients, cohorts)
        for column, cohort in enumerate(cohorts):
            members = self.members(cohort)
            there[: len(members), column] = members
        # Most patients were in the same cohorts as others: each such set is added up once.
        packed = np.packbits(there, axis=1)
        sets = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
        _, first, which = np.unique(sets, return_index=True, return_inverse=True)
        sums = [
            math.fsum(cost for column in np.flatnonzero(there[index]) for cost in parts[column])
            for index in first
        ]
        return np.array(sums)[which]

    def disclosed(self) -> npt.NDArray[np.int64]:
        """Return how many counted evaluations each patient had part in, (patients,); index = number - 1."""
        counts = np.zeros(len(self.roles), dtype=np.int64)
        for _, _, cohort in self.counted:
            members = self.members(cohort)
            counts[: len(members)] += members
        return counts

    def _created(self, seq: int, content: Mapping[str, Any]) -> None:
        if content["version"] != VERSION:
            raise UnknownEventError(f"version {content['version']}")
        self.ledger, self.site, self.owner = content["ledger"], content["site"], content["owner"]
        self.place = Place.from_json(content["place"])

    def _departed(self, seq: int, content: Mapping[str, Any]) -> None:
        self.is_away, self.went_to = True, content["to"]

    def _moved(self, seq: int, content: Mapping[str, Any]) -> None:
        self.place = Place.from_json(content["place"])
        self.is_away, self.went_to = False, None
        self.site = content["site"]

    def _added(self, seq: int, content: Mapping[str, Any]) -> None:
        """Patients and cohorts are taken in with their rows."""

    def _reserved(self, seq: int, content: Mapping[str, Any]) -> None:
        cohort = content["cohort"]
        trusts_server, trusts_ca = read_trust(content)
        left_out = read_leaves_out(content)
        reservation = Reservation(
            id=seq,
            run=content["run"],
            about=content["about"],
            spend=read_mechanism(content),
            rounds=content["rounds"],
            patients=self.size(cohort),
            trusts_server=trusts_server,
            trusts_ca=trusts_ca,
            leaves_out=left_out is not None,
        )
        self.accounts[seq] = Account(reservation, cohort, left_out or self.role_of(cohort))

    def _booked(self, seq: int, content: Mapping[str, Any]) -> None:
        account = self.accounts[content["reservation"]]
        countable = read_countable(content, account.reservation.spend)
        read_trust(content)
        booking = Booking(
            id=seq,
            reservation=content["reservation"],
            round_index=content["round"],
            model_sha256=content["model"],
            attempt=content["attempt"],
            countable=countable,
        )
        self.bookings[seq] = self.paid[seq] = booking
        self.newest[booking.reservation, booking.round_index, booking.model_sha256] = seq
        account.booked += 1
        if countable is not None:
            account.countable[countable] += 1
            self.transcripts.add(booking.model_sha256)

    def _released(self, seq: int, content: Mapping[str, Any]) -> None:
        self.releases[content["of"]] = content["digest"]
        self.digests.add(content["digest"])
        paid = self.paid[content["of"]]
        if isinstance(paid, Booking):
            self.accounts[paid.reservation].released += 1
        else:
            self.figures[paid.id] = tuple(content["figures"])

    def _failed(self, seq: int, content: Mapping[str, Any]) -> None:
        self.failures.add(content["of"])
        self.accounts[self.bookings[content["of"]].reservation].failed += 1

    def _disclosed(self, seq: int, content: Mapping[str, Any]) -> None:
        check_mechanism(content, UNPROTECTED)
        read_trust(content)
        what, run, model = content["what"], content["run"], content["model"]
        index, cohort, digest = content["round"], content["cohort"], content["digest"]
        is_counted = cohort is not None
        disclosure = Disclosure(seq, self.unix_time, what, run, model, content["patients"], index, is_counted)
        if is_counted:
            self.counted[run, model, cohort] = self.paid[seq] = disclosure
        else:
            self.noted[what, run, index, model, digest] = disclosure
            self.figures[seq] = tuple(content["figures"])
            self.digests.add(digest)

    def _closed(self, seq: int, content: Mapping[str, Any]) -> None:
        for reservation in content["reservations"]:
            self.accounts[reservation].is_open = False


_HANDLERS: dict[str, Callable[[LedgerState, int, Mapping[str, Any]], None]] = {
    "created": LedgerState._created,
    "patients": LedgerState._added,
    "cohort": LedgerState._added,
    "reservation": LedgerState._reserved,
    "booking": LedgerState._booked,
    "release": LedgerState._released,
    "failure": LedgerState._failed,
    "disclosure": LedgerState._disclosed,
    "closing": LedgerState._closed,
    "departure": LedgerState._departed,
    "move": LedgerState._moved,
}
