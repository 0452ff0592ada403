"""What makes a ledger's entries a chain, and patients nameless: keys that are derived from the site's one.

Every entry carries HMAC-SHA256(chain key, previous chain ‖ seq ‖ time ‖ kind ‖ body). Without the key no
entry can be changed, taken out or put in so that those after it still fit. A patient is HMAC-SHA256(patient
key, name), cut to 16 bytes: without the key a list of all possible names is of no help.
"""

from __future__ import annotations

import hmac
import json
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY_BYTES = 32
MAC_BYTES = 16
START = bytes(32)
"""What the first entry is chained to."""


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    Attributes:
        seq: 1, 2, 3, …
        unix_time: Whole seconds; never less than the entry's before, whatever the clock says.
        kind: What happened.
        body: The rest as canonical JSON (:func:`canonical_json`).
        chain: 32 bytes.
    """

    seq: int
    unix_time: int
    kind: str
    body: str
    chain: bytes

    def content(self) -> Any:
        """Return the body as plain JSON values."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Keys:
    """What a site's secret of 32 bytes is used for; equal secrets make equal keys."""

    secret: bytes = field(repr=False)
    _chain: bytes = field(init=False, repr=False)
    _patient: bytes = field(init=False, repr=False)
    _machine: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for use in ("chain", "patient", "machine"):
            derived = hmac.digest(self.secret, f"histoflare ledger: {use}".encode(), "sha256")
            object.__setattr__(self, f"_{use}", derived)

    def link(self, previous: bytes, seq: int, unix_time: int, kind: bytes, body: bytes) -> bytes:
        """Return the chain (32 bytes) of an entry after one whose chain is ``previous`` (32 bytes)."""
        message = previous + struct.pack(">qqI", seq, unix_time, len(kind)) + kind + body
        return hmac.digest(self._chain, message, "sha256")

    def patient(self, name: str) -> bytes:
        """Return the 16 bytes that stand for a patient; ``name`` as :func:`normalised`."""
        return hmac.digest(self._patient, name.encode("utf-8", "surrogatepass"), "sha256")[:MAC_BYTES]

    def machine(self, machine_id: str) -> bytes:
        """Return the 16 bytes that stand for a machine."""
        return hmac.digest(self._machine, machine_id.encode(), "sha256")[:MAC_BYTES]


def normalised(patient: str) -> str:
    """Return a patient's name so that two ways of writing it are one: NFC, without spaces around it."""
    return unicodedata.normalize("NFC", patient).strip()


def canonical_json(body: Mapping[str, Any]) -> str:
    """Return plain JSON values as the one text that stands for them: sorted keys, no spaces, ASCII."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
