"""What commands on several slides have in common: their progress, and what they say in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from histoflare.commands.console import print_json, progress, say, show_left_out, tell
from histoflare.errors import JobError

if TYPE_CHECKING:
    from histoflare.slides.results import TableReport

OnStart = Callable[[int, int], None]
OnRow = Callable[[], None]
OnPart = Callable[[str], None]


def ask_for_table(path: Path, how: str) -> None:
    """Refuse several slides where one is meant.

    Args:
        path: What was given for a slide.
        how: What to give beside it.

    Raises:
        JobError: It is a manifest, or a folder that holds several slides.
    """
    from histoflare.errors import SlideError
    from histoflare.slides.files import opening_file

    several = path.suffix.lower() == ".csv" and path.is_file()
    if path.is_dir():
        try:
            opening_file(path)
        except SlideError as error:
            several = error.reason == "SLIDE_AMBIGUOUS"
    if several:
        raise JobError(f"{path}: names several slides; give {how} for the table of results.")


def follow_table(work: Callable[[OnStart, OnRow, OnPart], TableReport]) -> TableReport:
    """Do ``work`` under a progress bar: slides done, their rate, the time left."""
    with progress() as bars:
        task = None

        def on_start(kept: int, wanted: int) -> None:
            nonlocal task
            if kept:
                say(f"{kept} done before, with the same model: their rows stand")
            if wanted:
                task = bars.add_task("slides", total=wanted)

        def on_row() -> None:
            assert task is not None
            bars.update(task, advance=1, description="slides")

        def on_part(what: str) -> None:
            assert task is not None
            bars.update(task, description=f"slides ({what})")

        return work(on_start, on_row, on_part)


def show_table(report: TableReport, path: Path, *, as_json: bool) -> None:
    """Print how many slides have results, and which were left out and why."""
    if as_json:
        print_json({"table": str(path), **report.to_json()})
        return
    left_out = report.left_out
    done = len(report.rows) - len(left_out)
    tell(f"{path}: {done} of {len(report.rows)} slides, {report.kept} of them before")
    show_left_out((f"{row['slide']}, {row['status']} ({row['reason']})", row["message"]) for row in left_out)
