"""Seeds that depend on what they are for and on nothing else."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: str | int) -> int:
    """Return a seed in [0, 2**63) from ``parts``, e.g. (job seed, "train", site, round).

    The parts are hashed (SHA-256 over their JSON list), so seeds of different parts are unrelated, and the
    same parts give the same seed on every machine and in every process.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
