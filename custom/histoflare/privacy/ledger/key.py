"""The folder a ledger is not in: its key, the head of its chain, and the lock.

``<key>`` holds 32 random bytes, ``<key>.head`` the number and the chain of the newest entry, as text. The
head is replaced after every commit, before the caller learns of it. So whatever was done on the strength of
an entry, the head knows the entry: a ledger that is behind its head is an older copy, or cut short. A crash
between the commit and the new head leaves the ledger ahead; nobody acted on what is ahead, and the next
writer moves the head up before anything else. ``<key>.lock`` keeps the two steps of two processes apart.

A head of 0 is written before anything else is made, and says that the ledger holds nothing yet: only then may
a key without a ledger go on to be one with a ledger.

Keeps accidents apart from a good ledger, not the site's own people: who puts older copies of the ledger *and*
of the head back is not seen.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from histoflare.errors import LedgerError
from histoflare.privacy.ledger.chain import KEY_BYTES, START
from histoflare.storage import PARTIAL_SUFFIX, write_bytes, write_text

WAIT_S = 60.0
"""How long a process waits for another one that has the ledger."""

RESTORE = (
    "Nothing is trained or let out until a person has looked. Put back the newest copy of the ledger; if "
    "none can be had, there is no telling what was spent on these patients: they may not be trained on again."
)


@dataclass(frozen=True)
class Head:
    """The number and the chain of the newest entry; 0 and zeros before there is one."""

    seq: int = 0
    chain: bytes = START

    def to_text(self) -> str:
        """Return the only text that stands for this head."""
        return f"{self.seq} {self.chain.hex()}\n"


class KeyFolder:
    """The key of one ledger, and what lies beside it."""

    def __init__(self, key_path: Path) -> None:
        self.key = key_path
        self.head = key_path.with_name(key_path.name + ".head")
        self._lock = key_path.with_name(key_path.name + ".lock")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the ledger alone, among all processes; it is let go when the process ends, however it ends.

        Raises:
            LedgerError: Another process has had it for :data:`WAIT_S` (LEDGER_UNUSABLE).
        """
        held = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            give_up = time.monotonic() + WAIT_S
            while not _try_lock(held):
                if time.monotonic() > give_up:
                    raise LedgerError(
                        f"{self.key}: another process has had the ledger for {WAIT_S:.0f} seconds; wait "
                        "for it, or end it."
                    )
                time.sleep(0.005)
            yield
        finally:
            os.close(held)

    def read_key(self) -> bytes:
        """Return the 32 bytes; :class:`LedgerError` (LEDGER_UNUSABLE) if the file holds anything else."""
        secret = self.key.read_bytes()
        if len(secret) != KEY_BYTES:
            raise LedgerError(
                f"{self.key}: not a ledger's key: {len(secret)} bytes, not {KEY_BYTES}. Put its copy back."
            )
        return secret

    def make_key(self) -> None:
        """Write a new key that only this user can read."""
        write_bytes(self.key, os.urandom(KEY_BYTES))

    def read_head(self) -> Head:
        """Return the head; :class:`LedgerError` (LEDGER_DAMAGED) if there is none that can be read."""
        try:
            text = self.head.read_bytes().decode("ascii")
        except FileNotFoundError:
            raise LedgerError(
                f"{self.head}: missing; the ledger may be an older copy. {RESTORE}",
                reason="LEDGER_DAMAGED",
            ) from None
        except UnicodeDecodeError:
            text = ""
        found = re.fullmatch(r"([0-9]{1,18}) ([0-9a-f]{64})\n", text)
        head = Head(int(found[1]), bytes.fromhex(found[2])) if found else None
        if head is None or head.to_text() != text or (head.seq == 0) != (head.chain == START):
            raise LedgerError(f"{self.head}: damaged. {RESTORE}", reason="LEDGER_DAMAGED")
        return head

    def write_head(self, head: Head) -> None:
        """Replace the head, whole or not at all."""
        write_text(self.head, head.to_text())

    def remove_leftovers(self) -> None:
        """Remove what killed writers left of key and head; call it with the lock held."""
        for leftover in self.key.parent.glob(f".{self.key.name}*{PARTIAL_SUFFIX}"):
            leftover.unlink(missing_ok=True)


def _try_lock(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
