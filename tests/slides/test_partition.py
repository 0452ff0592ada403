"""Patients dealt out to sites: evenly, or by drawn shares; never split, the same for a seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.seeds import derive_seed
from histoflare.slides.manifest import ManifestRow, label_of_patients
from histoflare.slides.partition import deal_evenly, draw_unevenly, partition
from tests.refusals import raises_reason

CLASSES = st.dictionaries(
    st.text(max_size=6), st.sampled_from(["LUAD", "LUSC", "x"]), min_size=1, max_size=60
)


@given(CLASSES, st.integers(1, 12), st.integers(0, 9))
def test_patients_are_dealt_evenly_by_class_and_in_all(
    class_of: dict[str, str], sites: int, seed: int
) -> None:
    number_of = deal_evenly(class_of, sites, seed)
    assert set(number_of) == set(class_of)
    for name in {*class_of.values()}:
        counts = Counter(number_of[patient] for patient, own in class_of.items() if own == name)
        assert max(counts[site] for site in range(sites)) - min(counts[site] for site in range(sites)) <= 1
    counts = Counter(number_of.values())
    assert max(counts[site] for site in range(sites)) - min(counts[site] for site in range(sites)) <= 1
    assert deal_evenly(dict(reversed(class_of.items())), sites, seed) == number_of


@given(CLASSES, CLASSES, st.integers(1, 12), st.integers(0, 9))
def test_a_patient_more_moves_nobody_who_was_drawn(
    class_of: dict[str, str], more: dict[str, str], sites: int, seed: int
) -> None:
    before = draw_unevenly(class_of, sites, seed)
    assert set(before.values()) <= set(range(sites))
    assert before.items() <= draw_unevenly({**more, **class_of}, sites, seed).items()


@pytest.mark.parametrize("name", ["LUAD", "LUSC"])
def test_drawn_shares_are_random_values_divided_by_their_sum(name: str) -> None:
    """Adnan 2022, series 1. Of 4000 patients a share has a standard deviation of 0.8 % at most."""
    class_of = {f"{each}-{i}": each for each in ("LUAD", "LUSC") for i in range(4000)}
    values = np.random.default_rng(derive_seed(3, "shares", name)).random(8)
    number_of = draw_unevenly(class_of, 8, seed=3)
    counts = np.bincount([number_of[f"{name}-{i}"] for i in range(4000)], minlength=8)
    np.testing.assert_allclose(counts / 4000, values / values.sum(), atol=0.04)
    assert np.ptp(values) > 0.3


def rows_of(patients: dict[str, str], slides: int = 2) -> list[ManifestRow]:
    return [
        ManifestRow(0, Path(f"{patient}-{slide}.svs"), patient, label)
        for patient, label in patients.items()
        for slide in range(slides)
    ]


ROWS = rows_of({f"p{i}": "AB"[i % 3 == 0] for i in range(30)})
CLASS_OF = label_of_patients(ROWS)
HERE = Path("all.csv")


@pytest.mark.parametrize("iid", [True, False])
@pytest.mark.parametrize("sites", [1, 4, 7, 30])
def test_every_row_goes_to_one_site_and_no_patient_to_two(sites: int, iid: bool) -> None:
    dealt = partition(HERE, ROWS, CLASS_OF, sites, iid=iid, seed=1)
    assert list(dealt) == [f"hospital-{i + 1}" for i in range(sites)]
    everything = [row for own in dealt.values() for row in own]
    assert Counter(row.slide for row in everything) == Counter(row.slide for row in ROWS)
    owners = Counter(patient for own in dealt.values() for patient in {row.patient for row in own})
    assert set(owners.values()) == {1}
    assert dealt == partition(HERE, list(ROWS), CLASS_OF, sites, iid=iid, seed=1)
    assert sites == 1 or dealt != partition(HERE, ROWS, CLASS_OF, sites, iid=iid, seed=2)


def test_each_site_tests_on_its_share_of_each_class() -> None:
    for own in partition(HERE, ROWS, CLASS_OF, 3, iid=True, test_fraction=0.3).values():
        for label in "AB":
            patients = {row.patient: row.split for row in own if row.label == label}
            tested = sum(split == "test" for split in patients.values())
            assert tested == max(1, round(0.3 * len(patients)))


def test_a_site_that_is_too_poor_is_not_filled_up() -> None:
    """Two patients of class B and four sites: two of the sites have none of it, and none is moved there."""
    rows = rows_of({f"a{i}": "A" for i in range(8)} | {"b0": "B", "b1": "B"})
    dealt = partition(HERE, rows, label_of_patients(rows), 4, iid=True)
    assert sorted(sum(row.label == "B" for row in own) for own in dealt.values()) == [0, 0, 2, 2]
    alone = [own for own in dealt.values() if any(row.label == "B" for row in own)]
    assert all(row.split == "train" for own in alone for row in own if row.label == "B")


def test_splits_that_are_there_stay_and_are_dealt_evenly_too() -> None:
    split = [replace(row, split="test" if int(row.patient[1:]) < 12 else "train") for row in ROWS]
    dealt = partition(HERE, split, CLASS_OF, 4, iid=True, test_fraction=0.5)
    assert {row.slide: row.split for own in dealt.values() for row in own} == {
        r.slide: r.split for r in split
    }
    assert {len({row.patient for row in own if row.split == "test"}) for own in dealt.values()} == {3}
    bare = partition(HERE, ROWS, CLASS_OF, 4, iid=True, test_fraction=None)
    assert {row.split for own in bare.values() for row in own} == {None}


def test_what_cannot_be_dealt_is_refused() -> None:
    with raises_reason("JOB_INVALID", "30", "31"):
        partition(HERE, ROWS, CLASS_OF, 31, iid=True)
    twice = [replace(ROWS[0], split="train"), replace(ROWS[1], split="test")]
    with raises_reason("MANIFEST_INVALID", "p0 ", "'test'", "'train'"):
        partition(HERE, twice, CLASS_OF, 1, iid=True)
    with raises_reason("MANIFEST_INVALID", "all.csv", "line 0: "):
        partition(HERE, [replace(ROWS[0], split="train"), ROWS[5]], CLASS_OF, 1, iid=True)
