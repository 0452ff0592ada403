"""Options that several commands take."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from histoflare.errors import JobError

DEFAULT_JOB = Path("jobs/mem_fedavg")
DEMO_JOB = Path("jobs/mem_dpsgd")


Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Take the figures of a preset of the job (its folder presets/)."),
]


class Runtime(StrEnum):
    """Where a job's server and sites run."""

    POC = "poc"
    SIMULATOR = "simulator"
    INPROCESS = "inprocess"


EPSILONS_HELP = (
    "Budgets (ε, separated by commas) at which a protected job is tried too, in this process, to show what "
    'protection costs; "" for none.'
)


def read_epsilons(text: str) -> tuple[float, ...]:
    """Return the budgets that ``--epsilons`` names.

    Raises:
        JobError: They are not numbers above 0.
    """
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if not all(0 < epsilon < math.inf for epsilon in found):
        raise JobError(f"--epsilons takes numbers above 0, separated by commas, not '{text}'.")
    return found


RUNTIME_HELP = (
    "poc: a server and one client process per site, as in production; simulator: FLARE's own; "
    "inprocess: without FLARE."
)
