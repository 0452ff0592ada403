"""A folder of bags: one writer at a time, whole files, and an account of every row of the manifest.

Beside the bags (``<row id>.h5``) a folder holds ``left_out.json``: the rows that have no bag, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from histoflare.bags.bag import Bag, write_bag
from histoflare.errors import BagError
from histoflare.storage import lock_file, make_folder, remove_partials, write_json

LEFT_OUT = "left_out.json"
LOCK = ".lock"

Status = Literal["made", "kept", "skipped", "failed"]


@dataclass(frozen=True)
class RowResult:
    """What became of one row of the manifest.

    Attributes:
        row_id: The bag's file stem.
        line: The row's line in the manifest.
        slide: The slide's path as the manifest has it.
        status: ``made``; ``kept``: it was up to date; ``skipped``: nothing on the slide makes a bag;
            ``failed``: the slide or its features cannot be used.
        patches: Patches in the bag.
        seconds: How long it took.
        reason, message: Code and text of why there is no (new) bag; empty otherwise.
    """

    row_id: str
    line: int
    slide: str
    status: Status
    patches: int = 0
    seconds: float = 0.0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class PrepareReport:
    """What became of every row of a manifest, in its order.

    Attributes:
        encoder: Id of the encoder.
        rows: One result a row.
        not_in_manifest: Files that belong to no row; they were left alone.
        seconds: How long it took in all.
    """

    encoder: str
    rows: tuple[RowResult, ...]
    not_in_manifest: tuple[str, ...]
    seconds: float

    def count(self, status: Status) -> int:
        """Return how many rows have ``status``."""
        return sum(row.status == status for row in self.rows)

    @property
    def left_out(self) -> tuple[RowResult, ...]:
        """The rows that were skipped or failed."""
        return tuple(row for row in self.rows if row.status in ("skipped", "failed"))

    @property
    def exit_code(self) -> int:
        """0 if every row has its bag, 3 if some were left out."""
        return 3 if self.left_out else 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        counts = {status: self.count(status) for status in ("made", "kept", "skipped", "failed")}
        return {**counts, **asdict(self)}


def bag_path(folder: Path, row_id: str) -> Path:
    """Return where the bag of ``row_id`` lies."""
    return folder / f"{row_id}.h5"


def strangers(folder: Path, row_ids: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the bags in ``folder`` that belong to none of ``row_ids``."""
    known = set(row_ids)
    return tuple(sorted(path.name for path in folder.glob("*.h5") if path.stem not in known))


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make ``folder``, keep other writers out of it, and clear away what a killed one left.

    Raises:
        BagError: Another process is writing there (BAGS_BUSY), or the folder cannot be made or written
            (BAG_NOT_WRITTEN).
    """
    busy = BagError(
        f"{folder}: another histoflare is writing bags there; wait until it is done", reason="BAGS_BUSY"
    )
    with ExitStack() as locked:
        try:
            make_folder(folder)
            locked.enter_context(lock_file(folder / LOCK, busy))
        except OSError as error:
            raise _not_written(folder, error) from error
        remove_partials(folder)
        yield


def save_bag(path: Path, bag: Bag) -> None:
    """Write ``bag`` to ``path``, whole or not at all.

    Raises:
        BagError: The disk is full or the folder cannot be written (BAG_NOT_WRITTEN), or what
            :func:`encode_bag` raises.
    """
    try:
        write_bag(path, bag)
    except OSError as error:
        raise _not_written(path.parent, error) from error


def save_left_out(folder: Path, rows: Sequence[RowResult]) -> None:
    """Write which of ``rows`` have no bag, and why; only codes, no paths."""
    content = {
        row.row_id: {"status": row.status, "reason": row.reason}
        for row in rows
        if row.status in ("skipped", "failed")
    }
    try:
        write_json(folder / LEFT_OUT, content)
    except OSError as error:
        raise _not_written(folder, error) from error


def read_left_out(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """Return ``{row id: {"status": …, "reason": …}}`` of the last run; empty if there was none."""
    try:
        content = json.loads((folder / LEFT_OUT).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_written(folder: Path, error: OSError) -> BagError:
    return BagError(
        f"{folder}: cannot be written ({error.strerror or error}). Nothing there is half-written: make room, "
        "or choose another --out, and run the same command again to go on",
        reason="BAG_NOT_WRITTEN",
    )
