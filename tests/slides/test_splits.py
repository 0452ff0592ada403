"""Roles by a hash of the patient: shares, folds, and what a protocol may ask for."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import unicodedata
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.errors import JobError, ManifestError
from histoflare.slides.splits import MOST_FOLDS, SplitRule


@given(st.text(max_size=12), st.integers(), st.floats(0, 0.999))
def test_the_role_is_a_hash_of_seed_and_patient_below_the_share(
    patient: str, seed: int, share: float
) -> None:
    identifier = unicodedata.normalize("NFC", patient.strip())
    digest = hashlib.sha256(json.dumps([seed, "split", identifier]).encode()).digest()
    below = Fraction(int.from_bytes(digest[:8], "big") // 2, 2**63) < Fraction(share)
    assert SplitRule(share, seed=seed).role_of(patient) == ("test" if below else "train")
    decomposed = unicodedata.normalize("NFD", patient)
    assert SplitRule(share, seed=seed).role_of(f" {decomposed}\t") == SplitRule(share, seed=seed).role_of(
        patient
    )


NAMES = [f"patient-{index}" for index in range(20_000)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_shares_hold_on_average_and_patients_are_independent(share: float) -> None:
    """Counts are binomial and correlations normal: 5 standard deviations are one in two million."""
    tested = {
        seed: np.array([SplitRule(share, seed=seed).role_of(name) == "test" for name in NAMES])
        for seed in (0, 1, 12345)
    }
    for of_seed in tested.values():
        assert abs(of_seed.mean() - share) < 5 * math.sqrt(share * (1 - share) / len(NAMES))
        for lag in (1, 2, 10, 100):  # neighbours in the list say nothing of each other
            assert abs(np.corrcoef(of_seed[lag:], of_seed[:-lag])[0, 1]) < 5 / math.sqrt(len(NAMES) - lag)
    for one, other in itertools.combinations(tested.values(), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(NAMES))


def test_with_a_larger_share_more_are_for_testing_and_none_fewer() -> None:
    sets = [
        {name for name in NAMES[:500] if SplitRule(share, seed=3).role_of(name) == "test"}
        for share in (0.1, 0.2, 0.6)
    ]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_shares_are_from_zero_to_below_one(share: float) -> None:
    assert SplitRule(0.0).role_of("anna") == "train"
    with pytest.raises(ManifestError):
        SplitRule(share)


@pytest.mark.parametrize("folds", range(2, MOST_FOLDS + 1))
def test_folds_partition_the_patients(folds: int) -> None:
    names = NAMES[:600]
    tested = [
        {n for n in names if SplitRule(None, folds, fold).role_of(n) == "test"} for fold in range(folds)
    ]
    assert set().union(*tested) == set(names) and sum(map(len, tested)) == len(names)
    share = 1 / folds
    for of_fold in tested:
        assert abs(len(of_fold) / len(names) - share) < 5 * math.sqrt(share * (1 - share) / len(names))
    for fold, name in itertools.product(range(folds), names[:50]):
        assert SplitRule(None, folds, fold).role_of(name) == ("test" if name in tested[fold] else "train")


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_with_a_test_share_folds_partition_the_others_for_validation(share: float) -> None:
    """Pan et al. 2024, III.A: 70:30 for training and testing, 5 folds for validation."""
    names = NAMES[:600]
    tested = {name for name in names if SplitRule(share).role_of(name) == "test"}
    kept = []
    for fold in range(5):
        roles = {name: SplitRule(share, 5, fold).role_of(name) for name in names}
        assert {name for name, role in roles.items() if role == "test"} == tested
        kept.append({name for name, role in roles.items() if role == "validation"})
        assert {name for name, role in roles.items() if role == "train"} == set(names) - tested - kept[-1]
    assert set().union(*kept) == set(names) - tested and sum(map(len, kept)) == len(names) - len(tested)


AGREED = {"unit": "patient", "seed": 0}


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ({"test_fraction": 0.2}, SplitRule()),
        ({"test_fraction": 0.3}, SplitRule(0.3)),
        ({"folds": 5, "fold": 0}, SplitRule(None, 5, 0)),
        ({"folds": 10, "fold": 9}, SplitRule(None, 10, 9)),
        ({"test_fraction": 0.3, "folds": 5, "fold": 2}, SplitRule(0.3, 5, 2)),
    ],
)
def test_a_protocol_may_ask_for_these(said: dict[str, Any], rule: SplitRule) -> None:
    assert SplitRule.of_protocol(AGREED | said) == rule


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"test_fraction": 0.25},
        {"test_fraction": "0.2"},
        {"test_fraction": 0.2, "seed": 1},
        {"test_fraction": 0.2, "seed": False},
        {"test_fraction": 0.2, "unit": "slide"},
        {"test_fraction": 0.2, "salt": "x"},
        {"folds": 5},
        {"fold": 1},
        {"folds": 1, "fold": 0},
        {"folds": 11, "fold": 0},
        {"folds": 5, "fold": 5},
        {"folds": 5, "fold": -1},
        {"folds": 5.0, "fold": 1},
        {"folds": 5, "fold": True},
        {"test_fraction": 0.2, "fold": 1},
    ],
)
def test_and_for_nothing_else(said: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        SplitRule.of_protocol(AGREED | said)
    assert caught.value.reason == "PROTOCOL_INVALID"


@pytest.mark.parametrize("said", [None, "patient", 3, []])
def test_what_is_no_table_is_no_rule(said: object) -> None:
    with pytest.raises(JobError):
        SplitRule.of_protocol(said)
