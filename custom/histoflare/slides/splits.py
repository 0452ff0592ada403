"""Who is for training, validation and testing: by a hash of the patient, or the same share of each class.

The hash of a patient is one number in [0, 1). A rule gives each role a range of it, so that a patient's role
follows from the patient alone: who else is in a manifest, and in which order, does not matter.
"""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from histoflare.errors import JobError, ManifestError
from histoflare.seeds import derive_seed

Split = Literal["train", "validation", "test"]

TEST_FRACTIONS = (0.2, 0.3)
"""Shares of test patients that a protocol can agree on: 80:20 (Adnan 2022, series 2) and 70:30 (Pan 2024)."""

MOST_FOLDS = 10

RANGE_BITS = 63
"""The hash is a whole number of so many bits; divided by 2**63 it lies in [0, 1)."""


def check_test_fraction(test_fraction: float) -> None:
    """Raise :class:`ManifestError` unless it is at least 0 and less than 1."""
    if not 0 <= test_fraction < 1:
        raise ManifestError(
            f"The share of test patients must be at least 0 and less than 1: {test_fraction}."
        )


@dataclass(frozen=True)
class SplitRule:
    """Which patients of a manifest without a split column have which role.

    With ``test_fraction`` alone, patients whose hash lies below it are for testing, all others for training.
    With ``folds`` and ``fold`` the hash's range is cut into ``folds`` equal parts, and part ``fold`` is for
    testing: over all folds, every patient is tested once (cross-validation). With all three, patients below
    ``test_fraction`` are for testing in every fold, and part ``fold`` of the rest is for validation (Pan et
    al. 2024, III.A: 70:30, and 5 folds of the 70). Shares hold on average: of a few patients, a role may have
    none.

    Attributes:
        test_fraction: At least 0, less than 1; None: folds alone decide.
        folds: How many, from 2 on; None: no folds.
        fold: Which one, from 0 to ``folds`` - 1; None: no folds.
        seed: Of the hash. Public; always 0 in a protocol.

    Raises:
        ManifestError: ``test_fraction`` is not between 0 and 1.
        JobError: ``folds`` and ``fold`` do not go together (PROTOCOL_INVALID).
    """

    test_fraction: float | None = 0.2
    folds: int | None = None
    fold: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.test_fraction is not None:
            check_test_fraction(self.test_fraction)
        if self.folds is None and self.fold is None and self.test_fraction is not None:
            return
        if self.folds is None or self.fold is None or not 0 <= self.fold < self.folds or self.folds < 2:
            raise _not_a_rule(f"folds = {self.folds}, fold = {self.fold}")

    @classmethod
    def of_protocol(cls, said: Any) -> SplitRule:
        """Return the rule that a protocol's ``[split]`` states.

        The set is closed on purpose (SECURITY.md): a job that could choose any seed or share could choose,
        patient by patient, whom to test.

        Raises:
            JobError: It is none of the rules that sites know (PROTOCOL_INVALID).
        """
        if not isinstance(said, Mapping) or set(said) - {"unit", "test_fraction", "seed", "folds", "fold"}:
            raise _not_a_rule(said)
        share, folds, fold = said.get("test_fraction"), said.get("folds"), said.get("fold")
        whole = all(type(value) is int for value in (folds, fold, said.get("seed")) if value is not None)
        known = (
            said.get("unit") == "patient"
            and said.get("seed") == 0
            and (share is None or (type(share) is float and share in TEST_FRACTIONS))
            and (folds is None or (whole and 2 <= folds <= MOST_FOLDS))
        )
        if not (known and whole):
            raise _not_a_rule(dict(said))
        return cls(share, folds, fold)

    def role_of(self, patient: str) -> Split:
        """Return a patient's role; spaces around the name and the spelling of letters (NFC) do not matter."""
        identifier = unicodedata.normalize("NFC", patient.strip())
        hashed = derive_seed(self.seed, "split", identifier)  # in [0, 2**63)
        if self.test_fraction is not None and hashed < self.test_fraction * 2**RANGE_BITS:
            return "test"
        if self.folds is None:
            return "train"
        first = 0 if self.test_fraction is None else math.ceil(self.test_fraction * 2**RANGE_BITS)
        part = (hashed - first) * self.folds // (2**RANGE_BITS - first)  # whole numbers: exact
        if part != self.fold:
            return "train"
        return "test" if self.test_fraction is None else "validation"


DEFAULT_SPLIT = SplitRule()


def stratified_test_patients(class_of: Mapping[str, str], test_fraction: float, seed: int) -> set[str]:
    """Return ``test_fraction`` of the patients of each class, drawn by a hash of (seed, patient).

    Of a class with two patients or more at least one is drawn, unless ``test_fraction`` is 0, and one is not.

    Args:
        class_of: Patient → class.

    Raises:
        ManifestError: ``test_fraction`` is not between 0 and 1.
    """
    check_test_fraction(test_fraction)
    patients_of: dict[str, list[str]] = defaultdict(list)
    for patient, of_patient in class_of.items():
        patients_of[of_patient].append(patient)
    tested: set[str] = set()
    for patients in patients_of.values():
        patients.sort(key=lambda patient: (derive_seed(seed, "split", patient), patient))
        count = math.floor(len(patients) * test_fraction + 0.5)
        if test_fraction > 0 and len(patients) > 1:
            count = min(max(count, 1), len(patients) - 1)
        tested.update(patients[:count])
    return tested


def _not_a_rule(said: object) -> JobError:
    shares = " or ".join(f"{share:g}" for share in TEST_FRACTIONS)
    return JobError(
        f'The protocol\'s split must have unit = "patient", seed = 0 and test_fraction = {shares}, or folds '
        f"from 2 to {MOST_FOLDS} with fold from 0 to folds - 1, or both; not {said}.",
        reason="PROTOCOL_INVALID",
    )
