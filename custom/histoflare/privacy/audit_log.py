"""A site's own log of what was asked, what was refused and what left: a JSON line per event. It stays."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from histoflare.privacy.ledger.file import translated
from histoflare.storage import make_folder, open_private

UNREADABLE = "unreadable"
"""``what`` of a line that a crash left half-written, or that somebody changed."""


class AuditLog:
    """An append-only file of JSON lines; several processes may write to it.

    Args:
        path: The file; it is made, with its folder, when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, what: str, **details: Any) -> None:
        """Append one event, on the disk when this returns.

        Args:
            what: What happened, in a word or two.
            details: JSON values; other things as their text, and numbers that are not finite too.

        Raises:
            LedgerError: There is no room on the disk (LEDGER_FULL), or the file cannot be written
                (LEDGER_UNUSABLE).
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"time": time, "what": what, **{name: _plain(value) for name, value in details.items()}}
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        with translated(self._path):
            make_folder(self._path.parent)
            file = open_private(self._path, os.O_RDWR | os.O_APPEND)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a torn line must not take this one with it
                while line:
                    line = line[os.write(file, line) :]
                os.fsync(file)
            finally:
                os.close(file)

    def size(self) -> int:
        """Return how many bytes it has now: where events that are written from now on begin."""
        return self._path.stat().st_size if self._path.exists() else 0

    def read(self, from_byte: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the events, oldest first; an unreadable line as ``{"what": "unreadable", "line": n}``.

        Args:
            from_byte: Where to begin, as :meth:`size` said it; lines are counted from there.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(from_byte)
            for number, line in enumerate(file, start=1):
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                yield event if isinstance(event, dict) else {"what": UNREADABLE, "line": number}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
