"""Counts of patients: rows by hand, their norm, the golden noise, and what cannot be asked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.bags.cohort_task import CohortFacts, CohortTally, CohortTask
from histoflare.count_form import name_of
from histoflare.privacy.tally import TALLY, Tally
from tests.refusals import raises_reason

FORM = CohortTally(("benign", "tumour"), (0.3, 0.6), (10, 100), ("aperio",))
Slide = tuple[str, str, str, float, int]


def facts(slides: list[Slide]) -> CohortFacts:
    patients, labels, scanners, mpps, patches = zip(*slides, strict=True)
    columns = {
        "label": np.array(labels, object),
        "scanner": np.array(scanners, object),
        "mpp": np.array(mpps, float),
        "patches": np.array(patches),
    }
    return CohortFacts(columns, patients, [str(index) for index in range(len(slides))])


def task(**changes: Any) -> CohortTask:
    return CohortTask(**{"labels": ("benign", "tumour"), "encoder": "uni:v1", **changes})


def test_each_patient_counts_once_in_each_block() -> None:
    table = facts(
        [
            ("a", "benign", "aperio", 0.25, 5),
            ("a", "benign", "aperio", 0.5, 25),  # 15 patches on average
            ("b", "of the ward", "of the lab", 0.6, 100),
            ("c", "tumour", "", math.nan, 9),
            ("c", "benign", "aperio", math.nan, 9),
        ]
    )
    found = FORM.exact(table)
    expected = {
        "label": {"benign": 1, "other": 1, "mixed": 1},
        "mpp": {"mixed": 1, "from 0.6": 1, "unknown": 1},
        "patches": {"10 to 100": 1, "from 100": 1, "below 10": 1},
        "scanner": {"aperio": 1, "other": 1, "mixed": 1},
    }
    for block, counts in expected.items():
        assert {name for name, count in found[block].items() if count} == {
            name_of(block, cell) for cell in counts
        }
        assert sum(found[block].values()) == 3
    assert not any("ward" in name or "lab/" in name for counts in found.values() for name in counts)


words = st.sampled_from(["benign", "tumour", "aperio", "", "../x", "<b>"])
slide = st.tuples(
    st.sampled_from("abcd"), words, words, st.floats() | st.just(math.nan), st.integers(0, 10**6)
)


@given(st.lists(slide, min_size=1, max_size=12), st.sampled_from("abcd"))
def test_one_patient_moves_the_vector_by_one_whatever_is_in_the_manifest(
    slides: list[Slide], who: str
) -> None:
    """The declared sensitivity is exact: √(Q · 1/Q) = 1 for Q blocks, one cell of each."""
    rest = [each for each in slides if each[0] != who]
    total = FORM.rows(facts(slides)).sum(axis=0)
    without = FORM.rows(facts(rest)).sum(axis=0) if rest else np.zeros(FORM.length)
    moved = float(np.linalg.norm(total - without))
    assert moved == pytest.approx(1.0 if any(each[0] == who for each in slides) else 0.0, abs=1e-12)


def test_the_noise_is_what_the_form_says_and_the_intervals_hold_it() -> None:
    """A count's noise is z √Q: 4 blocks double it."""
    z, runs = 1.5, 400
    table = facts([(f"p{index}", "benign", "", 0.5, 20) for index in range(40)])
    plan = Tally(noise_multiplier=z, noise_seed=3).settled(1, FORM.length)
    counts, held = [], 0
    for run in range(runs):
        released = plan.release_rows(FORM.rows(table), plan.noise_source("a", TALLY, str(run)))
        figure = FORM.figures(released[TALLY].numpy(), plan.sites_noise)[name_of("label", "benign")]
        assert figure.value is not None and figure.low is not None and figure.high is not None
        counts.append(figure.value)
        held += figure.low <= 40 <= figure.high
    assert np.mean(counts) == pytest.approx(40, abs=4 * z * 2 / math.sqrt(runs))
    assert np.std(counts) == pytest.approx(z * 2, rel=4 / math.sqrt(2 * runs))
    assert held / runs == pytest.approx(0.95, abs=0.045)


def test_no_count_is_below_nothing() -> None:
    figures = FORM.figures(np.full(FORM.length, -9.0), 1.0)
    assert all(each.value == each.low == each.high == 0 for each in figures.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"scanners": ("../../etc/passwd",)},
        {"scanners": ("<script>",)},
        {"scanners": ("aperio", "aperio")},
        {"scanners": ("other",)},
        {"scanners": "aperio"},
        {"scanners": ("a\nb",)},
        {"labels": ("a/b", "c")},
        {"labels": ("unknown", "c")},
        {"mpp_edges": ()},
        {"mpp_edges": (0.6, 0.3)},
        {"mpp_edges": (0.3, math.nan)},
        {"patch_edges": (-1,)},
        {"patch_edges": (1, 1.0000001)},
        {"patch_edges": tuple(range(1, 1001))},
    ],
)
def test_what_cannot_be_asked(changes: dict[str, Any]) -> None:
    with raises_reason("JOB_INVALID"):
        task(**changes)


def test_it_asks_no_model_and_a_policy_knows_it_by_its_own_name() -> None:
    asked = task()
    assert asked.model_name == "cohort_statistics" and asked.manifest_labels is None
    assert CohortTask.from_json(asked.to_json()) == asked
