"""What a command is about to write, looked at before it works for minutes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from histoflare.errors import JobError


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse to write where something is read, twice to one place, or onto a folder.

    Args:
        outputs: Files that will be made; None for those that were not asked for.
        inputs: Files that are read; of a folder everything in it counts.

    Raises:
        JobError: An output cannot be one; nothing was written.
    """
    read = [path.resolve() for path in inputs]
    taken: set[Path] = set()
    for output in outputs:
        if output is None:
            continue
        place = output.resolve()
        if output.is_dir():
            raise JobError(f"{output}: is a folder; give the file to be made.")
        if any(place == path or (path.is_dir() and place.parent == path) for path in read):
            raise JobError(f"{output}: is read by this command and would be overwritten; give another file.")
        if place in taken:
            raise JobError(f"{output}: two outputs cannot be one file; give each its own.")
        taken.add(place)


def refuse_overwriting(target: Path, *inputs: Path) -> None:
    """Raise :class:`JobError` if a page is to be written over a folder, or over what it is made of."""
    if target.is_dir() or any(target.resolve() == path.resolve() for path in inputs):
        raise JobError(f"{target}: a folder, or a file that is read here; give another one with --out.")


def check_output_folders(folders: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Refuse folders for outputs that are files, or lie in a folder that is read: they would be read next.

    Args:
        folders: Where files will be made; None for those that were not asked for.
        inputs: Files and folders that are read; of a folder everything below it.

    Raises:
        JobError: A folder cannot be one; nothing was written.
    """
    read = [path.resolve() for path in inputs if path.is_dir()]
    for folder in folders:
        if folder is None:
            continue
        if folder.exists() and not folder.is_dir():
            raise JobError(f"{folder}: is a file; of several slides, give a folder.")
        if any(folder.resolve().is_relative_to(path) for path in read):
            raise JobError(f"{folder}: lies in the folder that is read; give another one.")
