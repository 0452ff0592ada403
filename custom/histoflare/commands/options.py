"""Options that several commands take."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from histoflare.errors import JobError

DEFAULT_JOB = Path("mem_fedavg")
DEMO_JOBS = (Path("mem_fedavg"), Path("mem_dpsgd"))
"""The two chapters of the demo: without protection, and with."""
JOB_HELP = "A job that comes with histoflare, by its name, or a job folder."

JOB_PATCH_MPP, JOB_PATCH_PX = 0.5, 224
"""Patches that every shipped MEM job asks for; slides are prepared for these unless told otherwise."""

PATCH_MPP_HELP = "Resolution of the patches in µm/px; the default is that of the jobs mem_*."
PATCH_PX_HELP = (
    "Side of a patch in pixels. The default is that of the jobs mem_*; the papers' and the presets' is 1000."
)

Preset = Annotated[
    str | None,
    typer.Option("--preset", help="Take the figures of a preset of the job (its folder presets/)."),
]

SiteOption = Annotated[
    Path | None,
    typer.Option(
        "--site", help="A site's kit, or its own file local/histoflare.toml; none: the kit of this folder."
    ),
]
How = Annotated[bool, typer.Option("--how", help="Show also how it was computed, and other ways to count.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class DemoTask(StrEnum):
    """What a demo learns."""

    CLASSIFICATION = "classification"
    SEGMENTATION = "segmentation"


class PlaneName(StrEnum):
    """From which corner of a slide pixels are counted (``slides.planes``)."""

    BOUNDS = "bounds"
    LEVEL0 = "level0"


PLANE_HELP = (
    "Part of the slide to cover: bounds, the scanned area, as QuPath shows it; level0, the whole slide, as "
    "OpenSlide, ASAP and HALO count. They differ on Mirax and Leica slides."
)

MODEL_HELP = "A model file, or the folder of a run or of a consortium's download with one."

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


Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a variable of the job, e.g. rounds=50.")
]


def read_seeds(text: str) -> list[int]:
    """Return the seeds that ``--seeds`` names.

    Raises:
        JobError: They are not whole numbers, or one is there twice.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise JobError(f"--seeds takes whole numbers separated by commas, not '{text}'.") from None
    if len(set(seeds)) < len(seeds):
        raise JobError(f"--seeds has a seed twice: '{text}'; that is no second run.")
    return seeds


DEVICE_HELP = (
    "Where encoders and models run: auto (CUDA when there is one), cpu or cuda. Only the CPU gives the same "
    "bytes again."
)


def read_device(text: str) -> str:
    """Return the device that ``--device`` names.

    Raises:
        EncoderError, JobError: There is no such device here, or it cannot train.
    """
    from histoflare.bags.encoder import choose_device
    from histoflare.site.data import check_device

    return check_device(str(choose_device(text)))


RUNTIME_HELP = (
    "poc: a server and one client process per site, as in production; simulator: FLARE's own; "
    "inprocess: without FLARE."
)
