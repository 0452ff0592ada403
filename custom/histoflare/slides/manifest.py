"""The manifest: which slides a site brings, whose they are and what they show.

A CSV with a header line. Columns ``slide`` (path, relative to the manifest's folder), ``patient`` and
``label`` are needed; ``mpp, split, site, sex, age_band, scanner`` may be there. It is read as a whole: every
fault is named at once, with its line number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoflare.slides.names import find_path, path_hint
from histoflare.slides.splits import DEFAULT_SPLIT, Split, SplitRule, stratified_test_patients
from histoflare.slides.table import (
    SUBGROUPS,
    duplicate_problems,
    file_exists,
    file_id,
    has_splits,
    keeps_splits,
    read_common_cells,
    read_table,
    refuse_faults,
    relative_path,
    split_problems,
    write_table,
)

__all__ = [
    "COLUMNS",
    "NEEDED",
    "SUBGROUPS",
    "Manifest",
    "ManifestRow",
    "Split",
    "assign_splits",
    "read_manifest",
    "role_warnings",
    "stratify_splits",
    "write_manifest",
]

NEEDED = ("slide", "patient", "label")
COLUMNS = (*NEEDED, "mpp", "split", *SUBGROUPS)


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
        return file_id(row.slide, row.written)


def read_manifest(path: Path, labels: Sequence[str] | None = None, check_files: bool = True) -> Manifest:
    """Read and check the manifest at ``path``.

    Args:
        path: The CSV, as :func:`histoflare.slides.table.read_table` takes it. Slides are found as by
            :func:`histoflare.slides.names.find_path`.
        labels: The labels that may occur. Without them any may.
        check_files: Whether the slides must exist.

    Raises:
        ManifestError: It cannot be read (``MANIFEST_UNREADABLE``) or is wrong (``MANIFEST_INVALID``); every
            fault is in its ``problems``.

    >>> from pathlib import Path
    >>> from histoflare import read_manifest
    >>> manifest = read_manifest(Path("clinic-a/manifest.csv"), check_files=False)
    >>> manifest.rows[0].patient, manifest.rows[0].label
    ('clinic-a-p0', 'glandular')
    """
    table = read_table(path, NEEDED, COLUMNS)
    problems: list[str] = []
    rows = [_read_row(path, line, cells, problems) for line, cells in table]
    problems += duplicate_problems("slide", [(row.line, row.slide, row.written) for row in rows])
    problems += split_problems(rows) + _label_problems(rows, labels)
    if check_files:
        missing = [row for row in rows if row.written and not file_exists(row.slide)]
        problems += [
            f"line {row.line}: no such slide: {row.slide}{path_hint(row.written)}" for row in missing
        ]
    refuse_faults(path, problems)
    return Manifest(path, tuple(rows))


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> Manifest:
    """Write ``rows`` to ``path``, whole or not at all, with slides relative to its folder; return them so.

    Columns that no row fills are left out.
    """
    used = [name for name in COLUMNS if name in NEEDED or any(getattr(row, name) is not None for row in rows)]
    written_rows = []
    table: list[list[Any]] = []
    for line, row in enumerate(rows, start=2):
        written = relative_path(row.slide, path.parent)
        written_rows.append(replace(row, line=line, written=written))
        cells = {name: getattr(row, name) for name in used} | {"slide": written}
        table.append([cells[name] for name in used])
    write_table(path, used, table)
    return Manifest(path, tuple(written_rows))


def assign_splits(manifest: Manifest, rule: SplitRule = DEFAULT_SPLIT) -> Manifest:
    """Return the manifest with every patient's role by ``rule``; unchanged if it has splits already.

    Each patient's role follows from the patient alone: who else is in the manifest, in which order and with
    which labels, does not matter. So a class may be without a patient for testing or training, which
    :func:`role_warnings` says.

    Raises:
        ManifestError: Some rows have a split and others not (``MANIFEST_INVALID``), or there are splits and
            the rule has folds.
    """
    if keeps_splits(manifest.path, manifest.rows, rule):
        return manifest
    rows = tuple(replace(row, split=rule.role_of(row.patient)) for row in manifest.rows)
    return replace(manifest, rows=rows)


def stratify_splits(manifest: Manifest, test_fraction: float = 0.2, seed: int = 0) -> Manifest:
    """Return the manifest with every patient in ``train`` or ``test``, the same share of each label.

    For whoever makes a cohort and writes its splits down, once: with other patients, others are for testing
    (:func:`histoflare.slides.splits.stratified_test_patients`). A patient with slides of several labels
    counts under the first of them in alphabetical order. A manifest that has splits already stays as it is.

    Raises:
        ManifestError: Some rows have a split and others not (``MANIFEST_INVALID``), or ``test_fraction`` is
            not between 0 and 1.
    """
    if has_splits(manifest.path, manifest.rows):
        return manifest
    tested = stratified_test_patients(label_of_patients(manifest.rows), test_fraction, seed)
    rows = tuple(replace(row, split="test" if row.patient in tested else "train") for row in manifest.rows)
    return replace(manifest, rows=rows)


def label_of_patients(rows: Iterable[ManifestRow]) -> dict[str, str]:
    """Return patient → label, the first in alphabetical order of a patient with slides of several."""
    label_of: dict[str, str] = {}
    for row in rows:
        label_of[row.patient] = min(row.label, label_of.get(row.patient, row.label))
    return label_of


def role_warnings(rows: Iterable[ManifestRow], labels: Iterable[str]) -> list[str]:
    """Return a warning for each label without a patient to train on, or without one to test on."""
    return missing_roles({(row.split, row.label) for row in rows}, labels)


def missing_roles(there: Collection[tuple[str | None, str]], labels: Iterable[str]) -> list[str]:
    """Return the same for the pairs (split, class) that are ``there``."""
    labels = tuple(labels)
    roles = {split for split, _ in there}
    warnings = [f"every row has the label '{labels[0]}'"] if len(labels) == 1 else []
    if "train" not in roles:
        warnings.append("no training slides: this cohort can only be tested on")
    if "test" not in roles:
        warnings.append("no test patients: the model cannot be tested here")
    for split, what in (("train", "training"), ("test", "test")):
        if split in roles:
            missing = [label for label in labels if (split, label) not in there]
            warnings += [f"no {what} patient of class '{label}'" for label in missing]
    return warnings


def _read_row(path: Path, line: int, cells: dict[str, str], problems: list[str]) -> ManifestRow:
    """Return the row; what is wrong with it goes into ``problems``."""
    problems += [f"line {line}: no {name}" for name in NEEDED if not cells[name]]
    return ManifestRow(
        line=line,
        slide=find_path(path.parent, cells["slide"]),
        label=cells["label"],
        written=cells["slide"],
        **read_common_cells(line, cells, problems),
    )


def same_but_for_capitals(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of labels that differ in capitals only: one class, written in two ways."""
    first: dict[str, str] = {}
    firsts = [(first.setdefault(label.casefold(), label), label) for label in sorted(set(labels))]
    return [(one, other) for one, other in firsts if one != other]


def _label_problems(rows: Sequence[ManifestRow], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        line_of = {row.label: row.line for row in reversed(rows)}
        return [
            f"line {line_of[other]}: label '{other}' is '{one}' in line {line_of[one]}, but for its capitals"
            for one, other in same_but_for_capitals(line_of)
        ]
    allowed = ", ".join(labels)
    return [
        f"line {row.line}: unknown label '{row.label}'; allowed are {allowed}"
        for row in rows
        if row.label and row.label not in labels
    ]
