"""Options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

DEFAULT_JOB = Path("jobs/mem_fedavg")


class Runtime(StrEnum):
    """Where a job's server and sites run."""

    POC = "poc"
    SIMULATOR = "simulator"
    INPROCESS = "inprocess"


RUNTIME_HELP = (
    "poc: a server and one client process per site, as in production; simulator: FLARE's own; "
    "inprocess: without FLARE."
)
