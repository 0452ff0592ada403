"""What the cohorts of all kinds of data have in common: splits, records, pooling, a fingerprint, faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, Protocol, Self, TypeVar

from histoflare.errors import JobError, list_lines

LISTED_PROBLEMS = 20


class Record(Protocol):
    """One slide or image, a dataclass. ``split`` is train, validation or test."""

    @property
    def slide_id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def content_sha256(self) -> str: ...


R = TypeVar("R", bound=Record)


class SplitCohort(Generic[R]):
    """A cohort's records by their splits; what is made of this class has name, records and warnings."""

    name: str
    records: tuple[R, ...]
    warnings: tuple[str, ...]
    left_out: int

    @cached_property
    def train(self) -> tuple[R, ...]:
        """Those to train on."""
        return self.of_split("train")

    @cached_property
    def validation(self) -> tuple[R, ...]:
        """Those to choose settings by."""
        return self.of_split("validation")

    @cached_property
    def test(self) -> tuple[R, ...]:
        """Those to test on."""
        return self.of_split("test")

    def by_patient(self, split: str) -> dict[str, Self]:
        """Return each patient's part of ``split`` as a cohort of its own, by patient; the cache is shared."""
        records: dict[str, list[R]] = {}
        for record in self.of_split(split):
            records.setdefault(record.patient, []).append(record)
        return {patient: replace(self, records=tuple(own)) for patient, own in records.items()}  # type: ignore[type-var]

    def without(self, patients: Collection[str]) -> Self:
        """Return the cohort as if these patients were not in it, but for ``left_out``; one cache."""
        if not patients:
            return self
        kept = tuple(record for record in self.records if record.patient not in patients)
        gone = len({record.patient for record in self.records if record.patient in patients})
        return replace(self, records=kept, left_out=self.left_out + gone)  # type: ignore[type-var]

    def of_split(self, split: str) -> tuple[R, ...]:
        """Return the records of ``split``, see :func:`choose_split`."""
        return tuple(choose_split(self.records, split))


def in_order(records: Sequence[R]) -> tuple[R, ...]:
    """Return records in the order of their ids, in which every cohort has them."""
    return tuple(sorted(records, key=lambda record: record.slide_id))


def pool(cohorts: Sequence[SplitCohort[R]]) -> tuple[tuple[R, ...], tuple[str, ...]]:
    """Return the records and warnings of several cohorts.

    Records, patients and warnings get their site's name in front, so equal names of two sites stay apart.
    """
    records = [
        replace(  # type: ignore[type-var]
            record, slide_id=f"{cohort.name}/{record.slide_id}", patient=f"{cohort.name}/{record.patient}"
        )
        for cohort in cohorts
        for record in cohort.records
    ]
    warnings = tuple(f"{cohort.name}: {warning}" for cohort in cohorts for warning in cohort.warnings)
    return in_order(records), warnings


def group(slides: Sequence[R], record: str, slides_per_patient: int | None) -> list[tuple[R, ...]]:
    """Return slides or images as the records of DP-SGD, in the order in which each first appears.

    Args:
        record: ``"patient"``: all slides of a patient are one record. ``"slide"``: each slide is one.
        slides_per_patient: Take a patient's first so many slides only; None takes all.

    Raises:
        JobError: Another kind of record, or ``slides_per_patient`` below 1 (PRIVACY_INVALID).
    """
    if record not in ("patient", "slide"):
        raise JobError(f"A record is a patient or a slide, not {record!r}.", reason="PRIVACY_INVALID")
    if slides_per_patient is not None and slides_per_patient < 1:
        raise JobError(
            f"slides_per_patient must be at least 1, not {slides_per_patient!r}.", reason="PRIVACY_INVALID"
        )
    patients: dict[str, list[R]] = {}
    for slide in slides:
        patients.setdefault(slide.patient, []).append(slide)
    kept = [tuple(of_one[:slides_per_patient]) for of_one in patients.values()]
    return kept if record == "patient" else [(slide,) for of_one in kept for slide in of_one]


def fingerprint(about: Sequence[Any], records: Sequence[R], detail: Callable[[R], Any]) -> str:
    """Return a SHA-256 that changes when a record's content, split or detail does, or whose it is.

    Patients enter by their order of appearance and not by name.

    Args:
        about: What else it is of, plain JSON. detail: Further plain JSON of each record.
    """
    numbers: dict[str, int] = {}
    rows = [
        (
            record.slide_id,
            record.content_sha256,
            detail(record),
            record.split,
            numbers.setdefault(record.patient, len(numbers)),
        )
        for record in records
    ]
    return hashlib.sha256(json.dumps([*about, rows]).encode()).hexdigest()


def list_problems(problems: Sequence[str]) -> str:
    """Return problems as lines of a message, the first :data:`LISTED_PROBLEMS` of them."""
    more = len(problems) - LISTED_PROBLEMS
    return list_lines([*problems[:LISTED_PROBLEMS], *([f"… and {more} more"] if more > 0 else [])])


def choose_split(records: Sequence[R], split: str) -> list[R]:
    """Return the records of a split: train, validation, test or all.

    Raises:
        JobError: There is no such split.
    """
    if split not in ("train", "validation", "test", "all"):
        raise JobError(f"There is no split {split!r}; use train, validation, test or all.")
    return [record for record in records if split in ("all", record.split)]
