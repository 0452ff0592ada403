"""One CSV of results over many slides: a row a slide, written when the slide is done, so that it goes on.

A row is appended whole and flushed to the disk; what a killed command left of a last line is dropped. When
the same command runs again, a row stands if its slide, the model and the settings are the same and what was
made beside it is there; every other slide is done again, also one that failed. In the end the rows are in the
order of the slides. Two commands never write one table.
"""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import EncoderError, HistoflareError, JobError
from histoflare.slides.files import SlideFingerprint, fingerprint, fingerprint_if_same
from histoflare.slides.left_out import say_left_out
from histoflare.slides.sources import Source
from histoflare.slides.table import write_table
from histoflare.storage import lock_file, make_folder

FIRST = ("slide", "patient", "status")
LAST = ("warnings", "reason", "message", "slide_sha256", "slide_bytes", "slide_mtime_ns")
DONE = "done"
ENDS_ALL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""No room, or no writing at all: that is no fault of a slide."""

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """What a table is about.

    Attributes:
        path: The CSV.
        columns: Of what is found, between those that every table has.
        settings: Column → value of what the answers depend on besides the slide, such as the model's SHA-256.
    """

    path: Path
    columns: Sequence[str]
    settings: Mapping[str, str]

    @property
    def header(self) -> list[str]:
        """All columns."""
        return [*FIRST, *self.columns, *LAST, *self.settings]


@dataclass(frozen=True)
class TableReport:
    """What became of the slides: their rows in order, and how many of them stood from an earlier run."""

    rows: tuple[dict[str, str], ...]
    kept: int

    @property
    def left_out(self) -> list[dict[str, str]]:
        """The rows of the slides without a result."""
        return [row for row in self.rows if row["status"] != DONE]

    @property
    def exit_code(self) -> int:
        """0 if every slide has a result, 3 if some were left out."""
        return 3 if self.left_out else 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        statuses = dict.fromkeys((DONE, "skipped", "failed"), 0)
        for row in self.rows:
            statuses[row["status"]] += 1
        return {**statuses, "kept": self.kept, "rows": list(self.rows)}


def fill_table(
    table: Table,
    sources: Sequence[Source],
    work: Callable[[Source], Cells],
    files: Callable[[Source], Sequence[Path]] = lambda _: (),
    own_settings: Callable[[Source], Mapping[str, str]] = lambda _: {},
    on_start: Callable[[int, int], None] = lambda *_: None,
    on_row: Callable[[], None] = lambda: None,
) -> TableReport:
    """Do ``work`` for the slides that have no row yet, or one that no longer stands; return all rows.

    A slide that fails costs no other: its row has the reason and the message.

    Args:
        sources: The slides.
        work: Returns the cells of ``table.columns`` and ``warnings`` of a slide.
        files: What is made beside a slide's row; if one is gone the slide is done again.
        own_settings: Settings of one slide, in place of the table's.
        on_start: Told how many rows stand, and how many slides are to be done.
        on_row: Called after each of these.

    Raises:
        JobError: The file is no table of results (OUTPUT_TAKEN), or another command writes it (RESULTS_BUSY).
        EncoderError: The encoder does not take the patches: of no slide.
        OSError: The disk is full or cannot be written; the same command goes on once it can.
    """
    busy = JobError(
        f"{table.path}: another command is writing this table; wait until it is done.",
        reason="RESULTS_BUSY",
    )
    make_folder(table.path.parent)
    with lock_file(table.path.with_name(f".{table.path.name}.lock"), busy):
        earlier = _read(table)
        kept: dict[str, dict[str, str]] = {}
        for source in sources:
            row = earlier.get(source.written)
            wanted = {**table.settings, **own_settings(source)}
            same = None if row is None else _same_slide(row, source, wanted, files(source))
            if row is not None and same is not None:
                kept[source.written] = {**row, "patient": source.patient, **_identity(same)}
        write_table(table.path, table.header, [_line(table, kept[each]) for each in kept])
        on_start(len(kept), len(sources) - len(kept))
        rows = dict(kept)
        for source in sources:
            if source.written in kept:
                continue
            settings = {**table.settings, **own_settings(source)}
            rows[source.written] = _row(table, source, work, settings)
            _append(table, rows[source.written])
            on_row()
        ordered = [rows[source.written] for source in sources]
        write_table(table.path, table.header, [_line(table, row) for row in ordered])
    return TableReport(tuple(ordered), len(kept))


def say_given(mpp: float | None, default_mpp: float | None) -> str:
    """Return the resolution that was given for a slide, as a table's cell."""
    given = default_mpp if mpp is None else mpp
    return "" if given is None else f"{given:g}"


def _row(
    table: Table, source: Source, work: Callable[[Source], Cells], settings: Mapping[str, str]
) -> dict[str, str]:
    """Return the row of a slide, with what was found or why nothing was."""
    cells: dict[str, Any] = {"slide": source.written, "patient": source.patient, **settings}
    try:
        cells |= _identity(fingerprint(source.path))  # before the work: what changes meanwhile is done again
        cells |= {**work(source), "status": DONE}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in ENDS_ALL:
            raise
        if isinstance(error, EncoderError) and error.reason != "ENCODER_NOT_FINITE":
            raise  # an encoder that does not take these patches takes those of no slide
        cells["status"], cells["reason"], cells["message"] = say_left_out(source.path, error)
    return {name: _text(cells.get(name)) for name in table.header}


def _same_slide(
    row: Mapping[str, str], source: Source, settings: Mapping[str, str], files: Sequence[Path]
) -> SlideFingerprint | None:
    """Return the slide's fingerprint if an earlier row still says what the work would find, else None."""
    if row["status"] != DONE or any(row[name] != value for name, value in settings.items()):
        return None
    if not all(file.is_file() for file in files):
        return None
    try:
        known = SlideFingerprint(row["slide_sha256"], int(row["slide_bytes"]), int(row["slide_mtime_ns"]))
        return fingerprint_if_same(source.path, known)
    except (HistoflareError, OSError, ValueError):
        return None


def _identity(slide: SlideFingerprint) -> dict[str, str]:
    return {
        "slide_sha256": slide.sha256,
        "slide_bytes": str(slide.size_bytes),
        "slide_mtime_ns": str(slide.mtime_ns),
    }


def _read(table: Table) -> dict[str, dict[str, str]]:
    """Return the rows of an earlier run by slide; none if there was none, or it was of other columns."""
    try:
        content = table.path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        content = ""
    lines = list(csv.reader(io.StringIO(content[: content.rfind("\n") + 1], newline="")))
    if not lines or not {*FIRST, *LAST} <= set(lines[0]):
        if table.path.stat().st_size == 0:
            return {}
        raise JobError(
            f"{table.path}: is there already, and no table of results; give another file.",
            reason="OUTPUT_TAKEN",
        )
    if lines[0] != table.header:
        return {}
    whole = [cells for cells in lines[1:] if len(cells) == len(table.header)]
    return {cells[0]: dict(zip(table.header, cells, strict=True)) for cells in whole}


def _append(table: Table, row: Mapping[str, str]) -> None:
    """Add a row to the file, and see that it is on the disk."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(_line(table, row))
    with table.path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _line(table: Table, row: Mapping[str, str]) -> list[str]:
    return [row[name] for name in table.header]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
