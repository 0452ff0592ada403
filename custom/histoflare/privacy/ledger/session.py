"""One use of a ledger, from the lock to the head: what is read is verified, what is written is chained.

A write is one SQLite transaction. In order: take the lock, read the head, open the file, verify, move up a
head that a crash left behind, let the caller decide and append, commit, replace the head. Only then is the
caller told. Whatever ends it before leaves the ledger as it was, or with entries that nobody acted on.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from histoflare.errors import LedgerError
from histoflare.privacy.ledger.chain import Entry, Keys, canonical_json
from histoflare.privacy.ledger.file import (
    VERSION,
    check_structure,
    damaged,
    make_file,
    opened,
    translated,
)
from histoflare.privacy.ledger.key import RESTORE, Head, KeyFolder
from histoflare.privacy.ledger.place import Place
from histoflare.privacy.ledger.state import WORKSTATION, LedgerState, pack, patients_hash
from histoflare.storage import PARTIAL_SUFFIX, atomic_path, make_folder, real_path

MISSING = (
    "there is no ledger. No job makes one: bring the one this site has (histoflare ledger move), or make it, "
    "once for all jobs and kits (histoflare ledger create)."
)


class Page:
    """An open transaction: the state so far, and a way to add to them.

    Attributes:
        entries: Those that were read when it was opened; all of them if that was asked for.
    """

    def __init__(
        self, connection: sqlite3.Connection, state: LedgerState, entries: list[Entry] | None = None
    ) -> None:
        self._connection = connection
        self.entries = entries or []
        self.keys = state.keys
        self.state = state
        self.is_written = False

    def append(self, kind: str, content: Mapping[str, Any]) -> int:
        """Add an entry; return its number."""
        head = self.state.head
        # The clock may be set back, or be plainly wrong; an entry is never older than the one before it.
        unix_time = max(int(time.time()), self.state.unix_time)
        seq, body = head.seq + 1, canonical_json(content)
        chain = self.keys.link(head.chain, seq, unix_time, kind.encode(), body.encode())
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (seq, unix_time, kind, body, chain)
        )
        self.state.apply(Entry(seq, unix_time, kind, body, chain))
        self.is_written = True
        return seq

    def add_patients(self, rows: list[tuple[bytes, str]]) -> None:
        """Add patients (MAC, role) that are not there yet."""
        if not rows:
            return
        first = len(self.state.roles) + 1
        self._connection.executemany(
            "INSERT INTO patients VALUES (?, ?, ?)",
            [(first + index, mac, role) for index, (mac, role) in enumerate(rows)],
        )
        hashed = patients_hash((mac, role.encode()) for mac, role in rows)
        self.state.add_patients(rows)
        self.append("patients", {"count": len(rows), "sha256": hashed})

    def add_cohort(self, ids: Iterable[int]) -> int:
        """Return the number of the cohort of these patients (numbers from 1); a new one is added."""
        members = pack(ids)
        if members not in self.state.cohort_ids:
            number = len(self.state.cohorts) + 1
            self._connection.execute("INSERT INTO cohorts VALUES (?, ?)", (number, members))
            self.state.add_cohort(members)
            self.append("cohort", {"sha256": hashlib.sha256(members).hexdigest()})
        return self.state.cohort_ids[members]


class Sessions:
    """Opens one ledger as often as it is used; safe for several threads and several processes.

    Keeps the verified state between uses. A use that is not ``whole`` verifies only what was added since; its
    answers come from that state, so that later damage to the file can change none of them.

    Args:
        path: The ledger.
        key_path: Its key, in another folder.
        site, owner: Whose ledger alone may be written to; None: anybody's.

    Raises:
        LedgerError: Both are in one folder (LEDGER_UNUSABLE).
    """

    def __init__(
        self, path: Path, key_path: Path, *, site: str | None = None, owner: str | None = None
    ) -> None:
        self.path = real_path(path)
        self._site, self._owner = site, owner
        self._folder = KeyFolder(real_path(key_path))
        self._books: LedgerState | None = None
        self._alone = threading.Lock()
        if self.path.parent.resolve() == self._folder.key.parent.resolve():
            raise LedgerError(
                f"{path} and {key_path}: keep the key in another folder than the ledger, so that no copy of "
                "the one folder gives the patients away."
            )

    def create(self, site: str, owner: str) -> bool:
        """Make ledger and key if there has never been one, and return whether they were made.

        What a crash cut short is finished. Written one after the other: a head of 0, the key, the ledger, the
        head of its first entry. A head of 0 proves that nothing was ever booked; any other gap is an error.

        Raises:
            LedgerError: One of the two is gone (LEDGER_MISSING), or they cannot be written.
        """
        folder = self._folder
        with translated(self.path):
            make_folder(folder.key.parent)
            with self._alone, folder.lock():
                is_new = not (self.path.exists() or folder.key.exists() or folder.head.exists())
                is_begun = not self.path.exists() and folder.head.exists() and folder.read_head().seq == 0
                if not (is_new or is_begun):
                    self._check_present()
                    return False
                folder.remove_leftovers()
                if is_new:
                    folder.write_head(Head())
                if not folder.key.exists():
                    folder.make_key()
                folder.write_head(self._make_ledger(Keys(folder.read_key()), site, owner))
                return True

    def _make_ledger(self, keys: Keys, site: str, owner: str) -> Head:
        make_folder(self.path.parent)
        for leftover in self.path.parent.glob(f".{self.path.name}.*{PARTIAL_SUFFIX}*"):
            leftover.unlink(missing_ok=True)
        with atomic_path(self.path) as partial:
            make_file(partial)
            with opened(partial) as connection:
                connection.execute("BEGIN IMMEDIATE")
                page = Page(connection, LedgerState(self.path, keys))
                content = {"version": VERSION, "ledger": secrets.token_hex(16), "site": site, "owner": owner}
                place = Place.of(self.path, self._folder.key, keys, written=partial)
                page.append("created", {**content, "place": place.to_json()})
                connection.execute("COMMIT")
        return page.state.head

    def place(self, keys: Keys) -> Place:
        """Return where the ledger is now."""
        with translated(self.path):
            return Place.of(self.path, self._folder.key, keys)

    def check_usable(self, state: LedgerState) -> None:
        """Refuse to go on with a ledger that is another's, or bound to another place.

        Raises:
            LedgerError: It is another site's, or a workstation's (LEDGER_FOREIGN); it is bound to another
                place, or was closed in this one (LEDGER_MOVED).
        """
        if self._site not in (None, state.site):
            raise LedgerError(
                f"{self.path}: this is the ledger of '{state.site}', and this site is '{self._site}'. Say in "
                "the site's file where its own is.",
                reason="LEDGER_FOREIGN",
            )
        if self._owner not in (None, state.owner):
            what = "made on a workstation, to try things out" if state.owner == WORKSTATION else "a steward's"
            raise LedgerError(
                f"{self.path}: this ledger was {what}. A site's own is made by its steward: histoflare "
                "ledger create.",
                reason="LEDGER_FOREIGN",
            )
        assert state.place is not None, "every ledger begins with its place"
        if state.is_away:
            raise LedgerError(
                f"{self.path}: this ledger was closed to go on elsewhere; nothing more is booked here. If "
                "this is where it goes on: histoflare ledger move.",
                reason="LEDGER_MOVED",
            )
        differences = state.place.differences(self.place(state.keys))
        if differences:
            raise LedgerError(
                f"{self.path}: this ledger is bound to {state.place.ledger}, with the key {state.place.key}, "
                f"on {state.place.host}, and here is {', '.join(differences)}. If it was moved here, and "
                "nothing is booked there any more: histoflare ledger move.",
                reason="LEDGER_MOVED",
            )

    @contextmanager
    def writing(self, *, whole: bool, anywhere: bool = False) -> Iterator[Page]:
        """Yield a page; what was appended to it is in the ledger, and in the head, when the block has ended.

        Args:
            whole: Verify the whole ledger, not only what was added since the last use.
            anywhere: Whoever's it is, and wherever it is bound to.

        Raises:
            LedgerError: The ledger is missing, damaged, full or cannot be used (:meth:`check_usable`).
                Nothing was appended then, or entries that nobody acted on.
        """
        self._check_present()
        folder = self._folder
        with translated(self.path), self._alone, folder.lock():
            head = folder.read_head()
            keys = Keys(folder.read_key())
            with opened(self.path) as connection:
                connection.execute("BEGIN IMMEDIATE")
                kept, self._books = self._books, None
                whole = whole or kept is None or kept.keys != keys
                state = LedgerState(self.path, keys) if whole or kept is None else kept
                entries = self._verify(connection, state, head, whole=whole)
                if not anywhere:
                    self.check_usable(state)
                if state.head != head:
                    folder.remove_leftovers()
                    folder.write_head(state.head)
                page = Page(connection, state, entries)
                yield page  # an exception ends the connection, and with it the transaction
                if page.is_written:
                    connection.execute("COMMIT")
                    folder.write_head(state.head)
            self._books = state

    @contextmanager
    def reading(self) -> Iterator[tuple[LedgerState, list[Entry], Head]]:
        """Yield the verified state, all entries, and the head; changes nothing.

        Raises:
            LedgerError: The ledger is missing, damaged or cannot be used.
        """
        self._check_present()
        with translated(self.path):
            head = self._folder.read_head()  # before the ledger, which may only have grown since
            state = LedgerState(self.path, Keys(self._folder.read_key()))
            with opened(self.path) as connection:
                connection.execute("BEGIN")
                entries = self._verify(connection, state, head, whole=True)
        yield state, entries, head

    def _verify(
        self, connection: sqlite3.Connection, state: LedgerState, head: Head, *, whole: bool
    ) -> list[Entry]:
        """Bring the state up to the ledger's end, past ``head``; :class:`LedgerError` if it is damaged."""
        if whole:
            check_structure(self.path, connection)
        known = {state.head.seq: state.head.chain}
        entries = state.read_on(connection)
        known |= {entry.seq: entry.chain for entry in entries}
        if state.head.seq == 0:
            raise damaged(self.path, "it has no entries")
        if state.head.seq < head.seq:
            raise damaged(
                self.path,
                f"it ends at entry {state.head.seq}, and there were {head.seq}: an older copy, or cut short",
            )
        # A state that was kept may be past an older head that somebody put back; it knows better.
        if known.get(head.seq, head.chain) != head.chain:
            raise damaged(self.path, f"its entry {head.seq} is not the one that was written")
        return entries

    def _check_present(self) -> None:
        with translated(self.path):  # a folder that may not be looked into
            ledger, key = self.path.exists(), self._folder.key.exists()
        if ledger and key:
            return
        if ledger:
            what = f"its key {self._folder.key} is missing. Put the key's copy back: without it nothing here "
            what += "can be verified, and a new key would take every patient for another one."
        elif self._folder.head.exists():
            what = f"the ledger is missing, and there has been one. {RESTORE}"
        elif key:
            what = f"there is no ledger, but a key, {self._folder.key}. Put back the ledger's newest copy, "
            what += "and the key's head; if this site has never had a ledger, remove the key."
        else:
            what = MISSING
        raise LedgerError(f"{self.path}: {what}", reason="LEDGER_MISSING")
