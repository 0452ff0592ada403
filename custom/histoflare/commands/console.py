"""Where commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from histoflare.commands.plain_progress import PlainProgress
from histoflare.lab.watch import Step, Watch

if TYPE_CHECKING:
    from histoflare.flare.job_choice import Choice

# Names of files may look like emoji codes (":x:") or markup ("[b]").
console = Console(stderr=True, emoji=False)
out = Console(emoji=False)


class RateColumn(ProgressColumn):
    """Steps per second, e.g. ``12.3/s``."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def progress() -> Progress:
    """Return a progress display (stderr): a bar, a count, the rate, and the time gone and left.

    Where stderr is no terminal, such as a log, it writes plain lines as things happen.
    """
    if not console.is_terminal:
        return PlainProgress(say)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def watch_on(bars: Progress) -> Watch:
    """Return what shows the steps of an experiment as bars, and prints its warnings."""
    shown: dict[int, TaskID] = {}

    def show(step: Step) -> None:
        if step.number in shown:
            bars.update(shown[step.number], completed=step.done, total=step.total, description=step.text)
        else:
            shown[step.number] = bars.add_task(step.text, total=step.total)

    return Watch(show, lambda text: say(text, style="yellow"))


def say(text: str, style: str | None = None) -> None:
    """Print one plain line for a person (stderr); paths in it are never cut or coloured."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def tell(text: str, style: str | None = None) -> None:
    """Print one plain line of what was asked for (stdout); paths in it are never cut or coloured."""
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def say_warnings(warnings: Iterable[str]) -> None:
    """Say what is odd about a manifest."""
    for warning in warnings:
        say(f"warning: {warning}")


def say_fitted(choice: Choice) -> None:
    """Say what of a job was taken from the data that are there."""
    if text := choice.say_fitted():
        say(text)
    if choice.doubt:
        say(choice.doubt, style="yellow")


def say_refused(refused: Mapping[str, str]) -> None:
    """Say who had no part in a run, and why."""
    if refused:
        say("left out:" + "".join(f"\n  {site}: {why}" for site, why in refused.items()), "yellow")


def show_left_out(entries: Iterable[tuple[str, str]], title: str = "left out:") -> None:
    """Print what was left out (heading, message) under a title; nothing if there is none."""
    for number, (head, message) in enumerate(entries):
        if not number:
            out.print(title, highlight=False)
        for text, indent in ((head, 2), (message, 6)):
            out.print(Padding(Text(text, overflow="fold"), (0, 0, 0, indent), expand=False))


def make_table(*columns: str, title: str | None = None) -> Table:
    """Return a table that folds what is too wide for it: a path cut short is no use."""
    headers = [Column(column, overflow="fold") for column in columns]
    return Table(*headers, title=title, title_justify="left")


def print_json(content: Any) -> None:
    """Print ``content`` as JSON on stdout, plainly: scripts read it."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
