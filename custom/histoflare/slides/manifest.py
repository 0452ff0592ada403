"""The manifest: which slides a site brings, whose they are and what they show.

A CSV with a header line. Columns ``slide`` (path, relative to the manifest's folder), ``patient`` and
``label`` are needed; ``mpp, split, site, sex, age_band, scanner`` may be there. It is read as a whole: every
fault is named at once, with its line number.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from histoflare import storage
from histoflare.errors import ManifestError
from histoflare.seeds import derive_seed
from histoflare.slides.resolution import is_mpp

Split = Literal["train", "validation", "test"]

NEEDED = ("slide", "patient", "label")
SUBGROUPS = ("site", "sex", "age_band", "scanner")
COLUMNS = (*NEEDED, "mpp", "split", *SUBGROUPS)

LONGEST_STEM = 160
"""Bytes of a slide's stem in a row's id; a file name made of it may have 255 in all."""


@dataclass(frozen=True)
class ManifestRow:
    """One slide. ``slide`` is its full path, ``written`` the path as it stands in the manifest."""

    line: int
    slide: Path
    patient: str
    label: str
    mpp: float | None = None
    split: Split | None = None
    site: str | None = None
    sex: str | None = None
    age_band: str | None = None
    scanner: str | None = None
    written: str = ""


@dataclass(frozen=True)
class Manifest:
    """The rows of the manifest at ``path``, in its order."""

    path: Path
    rows: tuple[ManifestRow, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occur, sorted."""
        return tuple(sorted({row.label for row in self.rows}))

    def row_id(self, row: ManifestRow) -> str:
        """Return a file stem that is unique in this manifest and the same on every run and machine.

        The slide's own stem (cut if it is very long) and 8 hex digits of the SHA-256 of its path as the
        manifest has it.
        """
        written = row.written or str(row.slide)
        stem = row.slide.stem.encode()[:LONGEST_STEM].decode(errors="ignore")
        return f"{stem}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"


def read_manifest(path: Path, labels: Sequence[str] | None = None, check_files: bool = True) -> Manifest:
    """Read and check the manifest at ``path``.

    Args:
        path: The CSV; UTF-8 (a byte order mark is fine), separated by commas or semicolons.
        labels: The labels that may occur. Without them any may, but there must be two at least.
        check_files: Whether the slides must exist.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``) or is wrong (``MANIFEST_INVALID``); every
            fault is in its ``problems``.
    """
    table = _read_table(path)
    problems: list[str] = []
    rows = [_read_row(path, line, cells, problems) for line, cells in table]
    problems += _duplicate_slides(rows) + _split_problems(rows) + _label_problems(rows, labels)
    if check_files:
        missing = [row for row in rows if row.written and not _exists(row.slide)]
        problems += [f"line {row.line}: no such slide: {row.slide}" for row in missing]
    if problems:
        problems.sort(key=_line_of)
        count = "one fault" if len(problems) == 1 else f"{len(problems)} faults"
        raise ManifestError(f"{path}: {count}; nothing was read.", problems=problems)
    return Manifest(path, tuple(rows))


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> Manifest:
    """Write ``rows`` to ``path``, whole or not at all, with slides relative to its folder; return them so.

    Columns that no row fills are left out.
    """
    used = [name for name in COLUMNS if name in NEEDED or any(getattr(row, name) is not None for row in rows)]
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(used)
    folder = path.parent.resolve()
    written_rows = []
    for line, row in enumerate(rows, start=2):
        # a slide may be a link into an archive: resolve its folder, never the slide itself
        target = row.slide.parent.resolve() / row.slide.name
        written = Path(os.path.relpath(target, folder)).as_posix()
        written_rows.append(replace(row, line=line, written=written))
        cells = {name: getattr(row, name) for name in used} | {"slide": written}
        writer.writerow("" if cells[name] is None else cells[name] for name in used)
    storage.write_text(path, content.getvalue())
    return Manifest(path, tuple(written_rows))


SPLIT_RULE = {"unit": "patient", "test_fraction": 0.2, "seed": 0}
"""How :func:`assign_splits` divides a manifest that has no splits, as a protocol writes it."""


def assign_splits(manifest: Manifest, test_fraction: float = 0.2, seed: int = 0) -> Manifest:
    """Return the manifest with every patient in ``train`` or ``test``; unchanged if it has splits already.

    Within each label, patients are ranked by a hash of (seed, patient) and the first ``test_fraction`` of
    them are for testing, so neither the order of the rows nor other labels' patients matter. Of a label with
    two or more patients at least one is for testing and one for training. A patient with slides of several
    labels counts under the first of them in alphabetical order.

    Raises:
        ManifestError: Some rows have a split and others not (``MANIFEST_INVALID``), or ``test_fraction`` is
            not between 0 and 1.
    """
    if not 0 <= test_fraction < 1:
        raise ManifestError(
            f"The share of test patients must be at least 0 and less than 1: {test_fraction}."
        )
    given = [row for row in manifest.rows if row.split is not None]
    if len(given) == len(manifest.rows):
        return manifest
    if given:
        problems = [f"line {row.line}: no split" for row in manifest.rows if row.split is None]
        raise ManifestError(
            f"{manifest.path}: some rows have a split and others not. Fill the column, or empty it.",
            problems=problems,
        )
    label_of: dict[str, str] = {}
    for row in manifest.rows:
        label_of[row.patient] = min(row.label, label_of.get(row.patient, row.label))
    patients_of: dict[str, list[str]] = defaultdict(list)
    for patient, label in label_of.items():
        patients_of[label].append(patient)
    tested: set[str] = set()
    for patients in patients_of.values():
        ranked = sorted(patients, key=lambda patient: (derive_seed(seed, "split", patient), patient))
        count = math.floor(len(ranked) * test_fraction + 0.5)
        if test_fraction > 0 and len(ranked) > 1:
            count = min(max(count, 1), len(ranked) - 1)
        tested.update(ranked[:count])
    rows = tuple(replace(row, split="test" if row.patient in tested else "train") for row in manifest.rows)
    return replace(manifest, rows=rows)


def _read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, cells by column) of every row that is not blank."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read ({error.strerror}).", reason="MANIFEST_UNREADABLE"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: not UTF-8 text. In a spreadsheet, save it as 'CSV UTF-8'.", reason="MANIFEST_UNREADABLE"
        ) from error
    first_line = text.split("\n", 1)[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=";" if ";" in first_line else ",", strict=True
    )
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise ManifestError(
            f"{path}: line {reader.line_num} is not CSV ({error}).", reason="MANIFEST_UNREADABLE"
        ) from error
    if len(lines) < 2:
        raise ManifestError(
            f"{path}: the manifest is empty. It needs a header line ({', '.join(NEEDED)}) and a row "
            "per slide."
        )
    (_, header), rows = lines[0], lines[1:]
    problems = _header_problems(header)
    problems += [
        f"line {line}: {len(cells)} cells under {len(header)} columns"
        for line, cells in rows
        if len(cells) > len(header)
    ]
    if problems:
        raise ManifestError(f"{path}: the columns are wrong; nothing was read.", problems=problems)
    padded = [(line, [*cells, *[""] * (len(header) - len(cells))]) for line, cells in rows]
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in padded]


def _header_problems(header: Sequence[str]) -> list[str]:
    problems = [f"line 1: no column '{name}'" for name in NEEDED if name not in header]
    for name in header:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(COLUMNS)}"
            problems.append(f"line 1: unknown column '{name}'; {hint}")
    problems += [f"line 1: column '{name}' twice" for name in COLUMNS if header.count(name) > 1]
    return problems


def _read_row(path: Path, line: int, cells: dict[str, str], problems: list[str]) -> ManifestRow:
    """Return the row; what is wrong with it goes into ``problems``."""
    problems += [f"line {line}: no {name}" for name in NEEDED if not cells[name]]
    split = cells.get("split") or None
    if split is not None and split not in get_args(Split):
        problems.append(f"line {line}: split '{split}' is none of {', '.join(get_args(Split))}")
        split = None
    mpp: float | None = None
    if cells.get("mpp"):
        try:
            mpp = float(cells["mpp"])
        except ValueError:
            mpp = math.nan
        if not is_mpp(mpp):
            problems.append(f"line {line}: mpp '{cells['mpp']}' is not micrometres per pixel, such as 0.25")
            mpp = None
    return ManifestRow(
        line=line,
        slide=path.parent / cells["slide"],
        # One person under two spellings of the same letters would be two patients.
        patient=unicodedata.normalize("NFC", cells["patient"]),
        label=cells["label"],
        mpp=mpp,
        split=split,  # type: ignore[arg-type]
        written=cells["slide"],
        **{name: cells.get(name) or None for name in SUBGROUPS},
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # e.g. a name that is too long to be one
        return False


def _duplicate_slides(rows: Sequence[ManifestRow]) -> list[str]:
    first: dict[str, int] = {}
    problems = []
    for row in rows:
        key = os.path.normpath(row.slide)
        if row.written and key in first:
            problems.append(f"line {row.line}: slide {row.written} is already in line {first[key]}")
        first.setdefault(key, row.line)
    return problems


def _split_problems(rows: Sequence[ManifestRow]) -> list[str]:
    """A patient in two splits would be tested on what was trained on."""
    first: dict[str, ManifestRow] = {}
    problems = []
    for row in rows:
        if not row.patient or row.split is None:
            continue
        other = first.setdefault(row.patient, row)
        if other.split != row.split:
            problems.append(
                f"line {row.line}: patient {row.patient} is in '{row.split}' here and in '{other.split}' "
                f"in line {other.line}; a patient belongs to one split"
            )
    return problems


def _label_problems(rows: Sequence[ManifestRow], labels: Sequence[str] | None) -> list[str]:
    found = sorted({row.label for row in rows if row.label})
    if labels is None:
        return [f"every row has the label '{found[0]}'; two are needed"] if len(found) == 1 else []
    allowed = ", ".join(labels)
    return [
        f"line {row.line}: unknown label '{row.label}'; allowed are {allowed}"
        for row in rows
        if row.label and row.label not in labels
    ]


def _line_of(problem: str) -> int:
    """Sort key: problems by line, those of the whole manifest last."""
    word = problem.removeprefix("line ").split(":", 1)[0]
    return int(word) if word.isdigit() else 10**9
