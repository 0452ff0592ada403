"""The protocol: what a consortium agreed to measure and on what, with a hash that says it is the same.

Metric, class names, resolution, encoder, split rule and stop rule. A change of one of them after the results
are known is how studies go wrong unseen, so every site keeps the protocol it agreed to beside its policy, and
refuses a job whose protocol has another hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.storage import write_bytes

FIELDS = ("metric", "labels", "mpp", "patch_px", "encoder", "split", "stop")
"""What every protocol says."""

PROTOCOL_FILE = "protocol.json"
"""A site's agreed protocol, in the ``local`` folder of its startup kit."""


def canonical(protocol: Mapping[str, Any]) -> bytes:
    """Return the protocol as bytes that do not depend on the order of its keys or how its file is laid out.

    Numbers are written as JSON writes them, a whole float as an integer: 1.0 and 1 are the same agreement.

    Raises:
        JobError: A field is missing or unknown, or holds something that is not plain data.
    """
    missing = [name for name in FIELDS if name not in protocol]
    unknown = sorted(set(protocol) - set(FIELDS))
    if missing or unknown:
        raise JobError(
            f"A protocol has the fields {', '.join(FIELDS)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}.",
            reason="PROTOCOL_INVALID",
        )
    try:
        text = json.dumps(_plain(protocol), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JobError(
            f"The protocol holds something that is not plain data: {error}", reason="PROTOCOL_INVALID"
        ) from None
    return text.encode()


def digest(protocol: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hexadecimal) of :func:`canonical`."""
    return hashlib.sha256(canonical(protocol)).hexdigest()


def read_protocol(path: Path) -> dict[str, Any]:
    """Read a site's protocol file.

    Raises:
        JobError: There is none, or it is not a protocol.
    """
    try:
        protocol = json.loads(path.read_bytes())
    except OSError:
        raise JobError(
            f"{path}: not found. A site keeps there the protocol it agreed to; ask the consortium's lead.",
            reason="PROTOCOL_MISSING",
        ) from None
    except ValueError as error:
        raise JobError(f"{path}: not JSON: {error}", reason="PROTOCOL_INVALID") from None
    if not isinstance(protocol, dict):
        raise JobError(f"{path}: not a protocol.", reason="PROTOCOL_INVALID")
    canonical(protocol)
    return protocol


def write_protocol(path: Path, protocol: Mapping[str, Any]) -> None:
    """Write a protocol for a site, in its canonical form."""
    write_bytes(path, canonical(protocol) + b"\n")


def check_task(protocol: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    """Raise :class:`JobError` (``PROTOCOL_MISMATCH``) where a task says other than the protocol."""
    differs = [name for name in FIELDS if name in task and _plain(protocol[name]) != _plain(task[name])]
    if differs:
        raise JobError(
            f"The job's task differs from its protocol in {', '.join(differs)}.", reason="PROTOCOL_MISMATCH"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
