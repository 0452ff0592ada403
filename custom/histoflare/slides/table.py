"""What every kind of manifest has in common: a CSV about patients, read whole, every fault named at once."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, get_args

from histoflare import storage
from histoflare.errors import ManifestError
from histoflare.slides.names import SPREADSHEET_DATE, SPREADSHEET_NUMBER, decode_text
from histoflare.slides.resolution import given_mpp_fault
from histoflare.slides.splits import Split, SplitRule
from histoflare.storage import real_path

SUBGROUPS = ("site", "sex", "age_band", "scanner")
LONGEST_STEM = 160
"""Bytes of a slide's stem in a row's id; a file name made of it may have 255 in all."""


class Row(Protocol):
    """What the rows of every kind of manifest have."""

    @property
    def line(self) -> int: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> Split | None: ...


def read_table(path: Path, needed: Sequence[str], columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, cells by column) of every row of a CSV that is not blank.

    Args:
        path: UTF-8 (a byte order mark is fine) or UTF-16, separated by commas, semicolons or tabs; the first
            line may be a spreadsheet's ``sep=;``.
        needed: Columns that must be there; the first names what a row is about.
        columns: Columns that may be there.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``), is empty or has other columns.
    """
    lines = _read_lines(path)
    if len(lines) < 2:
        raise ManifestError(
            f"{path}: the manifest is empty. It needs a header line ({', '.join(needed)}) and a row "
            f"per {needed[0]}."
        )
    header, rows = _plain_names(lines[0][1], columns), lines[1:]
    problems = _header_problems(header, needed, columns)
    problems += [
        f"line {line}: {len(cells)} cells under {len(header)} columns"
        for line, cells in rows
        if len(cells) > len(header)
    ]
    if problems:
        raise ManifestError(f"{path}: the columns are wrong; nothing was read.", problems=problems)
    return [(line, _by_column(header, cells)) for line, cells in rows]


def read_index(path: Path, columns: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return a CSV's columns, of which we need not know all, and (line number, cells by column) of each row.

    Args:
        path: As of :func:`read_table`.
        columns: Those that mean something here, whose capitals do not matter.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``).
    """
    lines = _read_lines(path)
    header = _plain_names(lines[0][1], columns) if lines else []
    return header, [(line, _by_column(header, cells)) for line, cells in lines[1:]]


def read_header(path: Path, columns: Sequence[str]) -> list[str]:
    """Return the names of a CSV's columns, read as by :func:`read_table`; none if it is empty.

    Args:
        path: The CSV.
        columns: Those whose capitals do not matter.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``).
    """
    return read_index(path, columns)[0]


def read_common_cells(line: int, cells: dict[str, str], problems: list[str]) -> dict[str, Any]:
    """Return patient, mpp, split and subgroups of a row; what is wrong with them goes into ``problems``."""
    split = cells.get("split") or None
    if split is not None and split not in get_args(Split):
        problems.append(f"line {line}: split '{split}' is none of {', '.join(get_args(Split))}")
        split = None
    mpp: float | None = None
    if cells.get("mpp"):
        try:
            mpp = float(cells["mpp"].replace(",", "."))  # a decimal comma
        except ValueError:
            mpp = math.nan
        if fault := given_mpp_fault(mpp):
            problems.append(f"line {line}: mpp '{cells['mpp']}' {fault}")
            mpp = None
    if SPREADSHEET_NUMBER.fullmatch(cells["patient"]):
        problems.append(
            f"line {line}: patient {cells['patient']} is an identifier that a spreadsheet cut short. Format "
            "the column as text and enter it again"
        )
    if SPREADSHEET_DATE.fullmatch(cells.get("age_band", "")):
        problems.append(
            f"line {line}: age_band '{cells['age_band']}' is a date that a spreadsheet made. Format the "
            "column as text and enter the ages again, such as 10-19"
        )
    # One person under two spellings of the same letters would be two patients.
    patient = unicodedata.normalize("NFC", cells["patient"])
    subgroups = {name: cells.get(name) or None for name in SUBGROUPS}
    return {"patient": patient, "mpp": mpp, "split": split, **subgroups}


def duplicate_problems(what: str, files: Iterable[tuple[int, Path, str]]) -> list[str]:
    """Return a problem for each file (line, path, path as written) that an earlier line has already."""
    first: dict[str, int] = {}
    problems = []
    for line, file, written in files:
        key = os.path.normpath(file)
        if written and key in first:
            problems.append(f"line {line}: {what} {written} is already in line {first[key]}")
        first.setdefault(key, line)
    return problems


def split_problems(rows: Sequence[Row], places: Sequence[str] | None = None) -> list[str]:
    """Return a problem for each row whose patient is in another split above: trained on, and tested on.

    Args:
        rows: Of one manifest or of several.
        places: Where each row stands; None is its line.
    """
    first: dict[str, tuple[Row, str]] = {}
    problems = []
    for row, place in zip(rows, places or _lines_of(rows), strict=True):
        if not row.patient or row.split is None:
            continue
        other, other_place = first.setdefault(row.patient, (row, place))
        if other.split != row.split:
            problems.append(
                f"{place}: patient {row.patient} is in '{row.split}' here and in '{other.split}' "
                f"in {other_place}; a patient belongs to one split"
            )
    return problems


def file_exists(path: Path) -> bool:
    """Tell whether ``path`` exists."""
    try:
        return path.exists()
    except OSError:  # e.g. a name that is too long to be one
        return False


def refuse_faults(path: Path | str, problems: Sequence[str]) -> None:
    """Raise a ManifestError that lists ``problems`` by line, if there are any."""
    if problems:
        count = "one fault" if len(problems) == 1 else f"{len(problems)} faults"
        raise ManifestError(f"{path}: {count}; nothing was read.", problems=sorted(problems, key=_line_of))


def has_splits(path: Path | str, rows: Sequence[Row], places: Sequence[str] | None = None) -> bool:
    """Tell whether every row has a split or none has.

    Args:
        path: Of the manifest, for messages.
        rows: Of one manifest or of several.
        places: Where each row stands; None is its line.

    Raises:
        ManifestError: Some have and others not (``MANIFEST_INVALID``).
    """
    placed = zip(rows, places or _lines_of(rows), strict=True)
    problems = [f"{place}: no split" for row, place in placed if row.split is None]
    if problems and len(problems) < len(rows):
        raise ManifestError(
            f"{path}: some rows have a split and others not. Fill the column, or empty it.", problems=problems
        )
    return not problems


def keeps_splits(path: Path, rows: Sequence[Row], rule: SplitRule) -> bool:
    """Tell whether a manifest has splits of its own, which stay, or is to be split by ``rule``.

    Raises:
        ManifestError: As :func:`has_splits`; or ``rule`` has folds, which splits that stay would not follow:
            every fold would be the same.
    """
    if not has_splits(path, rows):
        return False
    if rule.folds is not None and any(row.split == "train" for row in rows):
        raise ManifestError(
            f"{path}: the protocol asks for {rule.folds} folds, and this manifest says itself who is for "
            "training: take its split column out, or take a protocol without folds."
        )
    return True


def file_id(file: Path, written: str = "") -> str:
    """Return a file's stem and 8 hex digits of the SHA-256 of its path, both as the manifest has it.

    So it stays the same where a file is found under another spelling, or is not there any more.
    """
    path = written or str(file)
    stem = PurePosixPath(path.replace("\\", "/")).stem.encode()[:LONGEST_STEM].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def relative_path(file: Path, folder: Path) -> str:
    """Return how a manifest in ``folder`` names ``file``."""
    return Path(os.path.relpath(real_path(file), folder.resolve())).as_posix()


def write_table(path: Path, header: Sequence[str], table: Sequence[Sequence[Any]]) -> None:
    """Write a CSV, whole or not at all; None is an empty cell."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in cells] for cells in table)
    storage.write_text(path, content.getvalue())


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every line of a CSV that is not blank, the header's first."""
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read ({error.strerror}).", reason="MANIFEST_UNREADABLE"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: not UTF-8 text. In a spreadsheet, save it as 'CSV UTF-8'.", reason="MANIFEST_UNREADABLE"
        ) from error
    told = re.match(r"sep=(.)\n", text, re.IGNORECASE)
    first_line = text.split("\n", 2)[1 if told else 0]
    separator = told[1] if told else next((each for each in ";\t" if each in first_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            while cells and not cells[-1]:  # a spreadsheet's empty columns
                del cells[-1]
            if cells and not (told and reader.line_num == 1):
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise ManifestError(
            f"{path}: line {reader.line_num} is not CSV ({error}).", reason="MANIFEST_UNREADABLE"
        ) from error
    return lines


def _by_column(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Return a row's cells by column; those that a short row lacks are empty, those of no column left out."""
    return dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=False))


def _plain_names(header: Sequence[str], columns: Sequence[str]) -> list[str]:
    return [name.lower() if name.lower() in columns else name for name in header]


def _lines_of(rows: Sequence[Row]) -> list[str]:
    return [f"line {row.line}" for row in rows]


def _header_problems(header: Sequence[str], needed: Sequence[str], columns: Sequence[str]) -> list[str]:
    problems = [f"line 1: no column '{name}'" for name in needed if name not in header]
    for name in header:
        if name not in columns:
            near = difflib.get_close_matches(name.lower(), columns, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(columns)}"
            problems.append(f"line 1: unknown column '{name}'; {hint}")
    problems += [f"line 1: column '{name}' twice" for name in columns if header.count(name) > 1]
    return problems


def _line_of(problem: str) -> int:
    """Return the sort key of a problem: its line; those of the whole manifest come last."""
    word = problem.removeprefix("line ").split(":", 1)[0]
    return int(word) if word.isdigit() else 10**9
