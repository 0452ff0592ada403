"""Errors a person can act on.

Every error that bad input can cause is a :class:`HistoflareError`. Its text is one message that says what is
wrong and what to do about it; its ``reason`` is a fixed code without names, paths or counts, the only part
that may be shown outside the site; ``reasons.REASONS`` has them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def list_lines(lines: Iterable[object]) -> str:
    """Return lines as they stand below the first of a message: each on one of its own, indented."""
    return "".join(f"\n  {line}" for line in lines)


class HistoflareError(Exception):
    """Something a user can put right.

    Args:
        message: What is wrong and what to do, for the person at this site. May name slides and paths.
        reason: Fixed code in capitals, safe to show to others.

    >>> from pathlib import Path
    >>> from histoflare import HistoflareError, read_job
    >>> try:
    ...     read_job(Path("no-such-folder"))
    ... except HistoflareError as error:
    ...     print(error.reason)
    JOB_INVALID
    """

    reason = "ERROR"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class SlideError(HistoflareError):
    """A slide cannot be used (unreadable, no mpp, no tissue, dark background)."""

    reason = "SLIDE_UNUSABLE"


class ManifestError(HistoflareError):
    """A manifest is wrong; ``problems`` holds every fault found, each with its line number."""

    reason = "MANIFEST_INVALID"

    def __init__(self, message: str, *, problems: Sequence[str] = (), reason: str | None = None) -> None:
        self.problems = tuple(problems)
        super().__init__(message + list_lines(self.problems), reason=reason)


class BagError(HistoflareError):
    """A bag is missing, damaged, empty, or of another encoder or mosaic than the job's."""

    reason = "BAG_UNUSABLE"


class MaskError(HistoflareError):
    """An image or its mask cannot be used (damaged, of another size, unknown class, too small)."""

    reason = "MASK_UNUSABLE"


class CheckpointError(HistoflareError):
    """A pretrained checkpoint cannot be used (missing, damaged, partial, of another network)."""

    reason = "CHECKPOINT_INVALID"


class EncoderError(HistoflareError):
    """An encoder cannot be loaded (missing file, wrong hash, wrong output)."""

    reason = "ENCODER_UNUSABLE"


class JobError(HistoflareError):
    """A job, a strategy or a task is configured wrongly."""

    reason = "JOB_INVALID"


class LedgerError(HistoflareError):
    """A site's privacy ledger refuses something, or cannot be used."""

    reason = "LEDGER_UNUSABLE"
