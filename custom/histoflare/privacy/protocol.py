"""The protocol: what a consortium agreed to measure and on what, with a hash that says it is the same.

Metric, class names, resolution, encoder or network, split rule and stop rule. A change of one of them after
the results are known is how studies go wrong unseen, so every site keeps the protocols it agreed to beside
its policy, one for each question, and refuses a job whose protocol has another hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.storage import write_bytes

FIELDS = ("metric", "labels", "mpp", "patch_px", "split", "stop")
"""What every protocol says, and"""

LEARNERS = {"encoder": ("max_patches",), "network": ("window_px",)}
"""one of these with what belongs to it: the encoder of the features that are classified and the largest bag
that is trained on (None: any), or the network that segments and the side of its windows."""

TARGET = "target"
"""Beside an encoder, what is learned of a slide, if that is not which of the labels it has."""

PROTOCOL_FILE = "protocol.json"
"""A site's agreed protocol, or a list of them, in the ``local`` folder of its startup kit."""


def canonical_protocol(protocol: Mapping[str, Any]) -> bytes:
    """Return the protocol as bytes that do not depend on the order of its keys or how its file is laid out.

    Numbers are written as JSON writes them, a whole float as an integer: 1.0 and 1 are the same agreement.

    Raises:
        JobError: A field is missing or unknown, or holds something that is not plain data.
    """
    missing = [name for name in FIELDS if name not in protocol]
    chosen = [name for name in LEARNERS if name in protocol]
    if len(chosen) != 1:
        missing.append(f"one of {' and '.join(LEARNERS)}")
    wanted = [name for learner in chosen for name in LEARNERS[learner]]
    missing += [name for name in wanted if name not in protocol]
    open_ones = {TARGET} if "encoder" in chosen else set()
    unknown = sorted(set(protocol) - {*FIELDS, *LEARNERS, *wanted, *open_ones})
    if missing or unknown:
        raise JobError(
            f"A protocol has the fields {', '.join(FIELDS)} and one of {', '.join(LEARNERS)}; "
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


def hash_protocol(protocol: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hexadecimal) of :func:`canonical_protocol`."""
    return hashlib.sha256(canonical_protocol(protocol)).hexdigest()


def read_protocols(path: Path) -> list[dict[str, Any]]:
    """Read a site's protocol file: one protocol, or a list of them.

    Raises:
        JobError: There is none, or it is not a protocol.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        raise JobError(
            f"{path}: not found. A site keeps there the protocol it agreed to; ask the consortium's lead.",
            reason="PROTOCOL_MISSING",
        ) from None
    except ValueError as error:
        raise JobError(f"{path}: not JSON: {error}", reason="PROTOCOL_INVALID") from None
    protocols = content if isinstance(content, list) else [content]
    if not protocols or not all(isinstance(protocol, dict) for protocol in protocols):
        raise JobError(f"{path}: not a protocol.", reason="PROTOCOL_INVALID")
    for protocol in protocols:
        canonical_protocol(protocol)
    return protocols


def write_protocols(path: Path, protocols: Sequence[Mapping[str, Any]]) -> None:
    """Write a site's protocols, in their canonical form; one stands by itself."""
    written = [canonical_protocol(protocol) for protocol in protocols]
    content = written[0] if len(written) == 1 else b"[" + b",\n".join(written) + b"]"
    write_bytes(path, content + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
