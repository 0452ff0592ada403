"""Where a ledger is bound to, so that a copy of it does not go on beside it.

Bound are the full paths of ledger and key, the numbers (inodes) of the two files, and the machine. A copy has
other numbers, or another path, or is on another machine; a file that is written to keeps them all. The first
use in another place is refused until the ledger was moved (:mod:`histoflare.privacy.ledger.moves`).

The machine is what ``/etc/machine-id`` says, keyed with the ledger's key: it is the same after a restart and
with another host name. A container has the file of its image, an empty one, or none; without one the ledger
is bound to paths and files only, and with its image's it may be the same on two machines. To have the host's
in a container mount it there, read-only. What a container keeps on a volume keeps its numbers over restarts.

What is the same in a copy is not seen: a restored snapshot of a whole machine or volume; another machine with
the same machine-id, paths and file numbers.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from histoflare.privacy.ledger.chain import Keys

MACHINE_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
"""Where Linux says which machine this is; the first that does is taken (machine-id(5))."""


@dataclass(frozen=True)
class Place:
    """One place; two are equal if all is but the name of the host, which is for people.

    Attributes:
        ledger, key: Full paths without links.
        files: Inodes of the two.
        machine: Keyed hash of the machine's id (hexadecimal); None where the machine has none.
        host: The machine's name.
    """

    ledger: str
    key: str
    files: tuple[int, int]
    machine: str | None
    host: str = field(compare=False)

    @classmethod
    def of(cls, ledger: Path, key: Path, keys: Keys, *, written: Path | None = None) -> Place:
        """Return where a ledger is; ``written`` is the file that will be it, if it is not there yet."""
        found = machine_id()
        return cls(
            ledger=os.path.realpath(ledger),
            key=os.path.realpath(key),
            files=((written or ledger).stat().st_ino, key.stat().st_ino),
            machine=None if found is None else keys.machine(found).hex(),
            host=socket.gethostname(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "files": list(self.files)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Place:
        """Return the place that :meth:`to_json` gave."""
        return cls(**{**content, "files": tuple(content["files"])})

    def differences(self, here: Place) -> list[str]:
        """Return in which points another place differs, in words."""
        found = []
        if (self.ledger, self.key) != (here.ledger, here.key):
            found.append("another path")
        if self.machine != here.machine:
            found.append("another machine")
        if self.files != here.files:
            found.append("other files (a copy, or restored)")
        return found


def machine_id() -> str | None:
    """Return this machine's id (32 hexadecimal digits); None if it has none."""
    for path in MACHINE_FILES:
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if re.fullmatch("[0-9a-f]{32}", text):
            return text
    return None
