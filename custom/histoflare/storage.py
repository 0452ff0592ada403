"""Files that are either whole or absent.

A file is written under a temporary name in its own folder, flushed to the disk and then renamed: a crash, a
full disk or SIGKILL leaves the earlier file or none, never half of one. What a killed writer leaves behind
carries :data:`PARTIAL_SUFFIX`; :func:`remove_partials` clears it away.

Whatever the umask, a file is for this user alone (0600), and so is a folder that is made for it (0700): most
of what a site writes speaks of its patients. What does not, says ``public``: then the umask decides. A folder
that was there stays as it is.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"


PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


def real_path(path: Path) -> Path:
    """Return the full path of a file, without ``..`` and without links in its folders.

    Two ways to one file are then one text, and it is found where a folder on the way is gone. The file itself
    may be a link, into an archive of slides for example, and keeps its name.
    """
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def make_folder(folder: Path, *, public: bool = False) -> None:
    """Make ``folder``, and those above it that are missing.

    Raises:
        OSError: It cannot be made, or a file has its place.
    """
    if public:
        folder.mkdir(parents=True, exist_ok=True)
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def open_private(path: Path, flags: int) -> int:
    """Open a file that only this user can read, made if missing; return its descriptor.

    Args:
        flags: Of ``os.open``.
    """
    opened = os.open(str(path), flags | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    os.fchmod(opened, PRIVATE_FILE)  # an earlier version made it for all to read
    return opened


@contextmanager
def lock_file(path: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes out of the block; the lock goes with the process, however that ends.

    Args:
        path: The file that is locked, made if missing; it stays. busy: Raised if another process holds it.

    Raises:
        OSError: The file cannot be made.
    """
    lock = open_private(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(lock)


@contextmanager
def atomic_path(path: Path, *, public: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block ends well, else remove it.

    Unless ``public`` the temporary file is there, empty and private, before anything is written to it.

    Args:
        path: The file to be made; its folder is made if missing.
        public: Others may read it, if the umask lets them.

    Raises:
        OSError: The disk is full or the folder cannot be written; ``path`` is then as it was.
    """
    make_folder(path.parent, public=public)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        if not public:
            os.close(open_private(partial, os.O_WRONLY | os.O_TRUNC))
        yield partial
        with partial.open("rb") as written:
            if not public:  # the writer may have put another file in its place
                os.fchmod(written.fileno(), PRIVATE_FILE)
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # A full disk names no file, other faults of writing the temporary one.
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes, *, public: bool = False) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with atomic_path(path, public=public) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str, *, public: bool = False) -> None:
    """Write UTF-8 ``content`` to ``path``, whole or not at all."""
    write_bytes(path, content.encode(), public=public)


def write_json(path: Path, content: Any, *, public: bool = False) -> None:
    """Write ``content`` as indented JSON to ``path``, whole or not at all. NaN is refused, JSON has none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", public=public)


def remove_partials(folder: Path) -> int:
    """Remove what killed writers left in ``folder`` (not below it); return how many files that were."""
    leftovers = [path for path in folder.glob(f".*{PARTIAL_SUFFIX}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
