"""What the commands about images and masks have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

Made = TypeVar("Made")

LABELS = Annotated[
    str, typer.Option(help="Class names with commas, in the order of the masks' values, e.g. tumour,stroma.")
]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def split_labels(labels: str) -> list[str]:
    """Return the class names that ``--labels`` lists."""
    return [label.strip() for label in labels.split(",") if label.strip()]


def follow(what: str, work: Callable[[Callable[[int, int], None]], Made]) -> Made:
    """Do ``work`` under a progress bar (stderr)."""
    from histoflare.commands.console import progress

    with progress() as bar:
        task = bar.add_task(what, total=None)
        return work(lambda done, total: bar.update(task, completed=done, total=total))
