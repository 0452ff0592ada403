"""The text of --help: a paragraph of a docstring fills the terminal's lines, whatever its own line ends."""

from __future__ import annotations

import inspect
import re

import typer


def join_lines(text: str) -> str:
    """Return a docstring with each of its paragraphs in one line, and an empty line between two."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)))


def fill_help(app: typer.Typer) -> None:
    """Have every command of ``app``, and of the groups in it, show its docstring in paragraphs."""
    for command in app.registered_commands:
        said = command.help or (command.callback and command.callback.__doc__)
        if said:
            command.help = join_lines(said)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            fill_help(group.typer_instance)
