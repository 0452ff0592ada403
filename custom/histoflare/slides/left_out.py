"""Why a slide was left out: one that cannot be used costs no other, and is listed with its reason."""

from __future__ import annotations

from pathlib import Path

from histoflare.errors import HistoflareError

NOTHING_THERE = {
    "SLIDE_NO_TISSUE",
    "SLIDE_DARK_BACKGROUND",
    "SLIDE_NO_PATCHES",
    "SLIDE_TOO_SMALL",
    "BAG_EMPTY",
}
"""These say that there is nothing on a sound slide to work on; everything else is a failure."""


def say_left_out(slide: Path, error: Exception) -> tuple[str, str, str]:
    """Return status (``skipped``, ``failed``), reason code and message of a slide that ``error`` left out."""
    if isinstance(error, HistoflareError):
        reason, message = error.reason, str(error)
    else:
        reason = "SLIDE_READ_FAILED"
        message = (
            f"{slide}: cannot be used ({type(error).__name__}: {error}). Copy it again, or leave it out."
        )
    return "skipped" if reason in NOTHING_THERE else "failed", reason, message
