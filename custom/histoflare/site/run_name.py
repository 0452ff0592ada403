"""Which names a run can have."""

from __future__ import annotations

import re


def is_run_name(run: object) -> bool:
    """Return whether a run can be called that: it is the name of a folder."""
    return isinstance(run, str) and bool(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", run)) and bool(run.strip("."))
