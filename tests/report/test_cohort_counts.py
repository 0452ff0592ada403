"""What a lead reads of counts: exact and noised ones, those held back, and whether a question is feasible."""

from __future__ import annotations

import pytest

from histoflare.bags.cohort_task import CohortTally
from histoflare.count_form import name_of
from histoflare.privacy.advice import advise
from histoflare.privacy.budget import Budget
from histoflare.report.cohort_counts import TOGETHER, list_counts, part_left, say_count, say_enough

FORM = CohortTally(("benign", "tumour"), (0.5,), (10,))
BENIGN, TUMOUR = name_of("label", "benign"), name_of("label", "tumour")


def test_exact_counts_are_added_up_unless_one_was_held_back() -> None:
    rows = list_counts(FORM, {"a": {BENIGN: 9.0, TUMOUR: 7.0}, "b": {BENIGN: 3.0}}, None)
    found = {row.cell: row.counts for row in rows if row.block == "label"}
    assert found["benign"][TOGETHER] == (12.0, 12.0, 12.0) and say_count(found["benign"][TOGETHER]) == "12"
    assert found["tumour"]["b"] is None and found["tumour"][TOGETHER] is None
    assert [row.cell for row in rows] == [cell for cells in FORM.blocks.values() for cell in cells]
    enough = say_enough(rows, FORM.labels, 12)
    assert [said.rpartition(": ")[2].split(",")[0] for said in enough] == ["yes.", "not known"]
    assert part_left(rows, FORM.labels, 2, Budget(8.0, 1e-5)) is None


@pytest.mark.parametrize(("low", "high", "verdict"), [(20, 30, "yes."), (5, 19, "no."), (15, 25, "cannot")])
def test_noised_counts_are_read_by_their_intervals(low: float, high: float, verdict: str) -> None:
    figures = {}
    for name in (BENIGN, TUMOUR):
        figures |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    rows = list_counts(FORM, {"a": figures, "b": figures}, {"figures": figures})
    assert all(f": {verdict}" in said for said in say_enough(rows, FORM.labels, 20))
    assert f"({low:.1f} to {high:.1f})" in say_count(rows[0].counts[TOGETHER])
    budget = Budget(8.0, 1e-5)
    expected = tuple(
        advise(2, int(end), 2, budget, colluders=None).part_left for end in (low, high)
    )  # two labels at two sites: as many patients a site as there are of a label
    assert part_left(rows, FORM.labels, 2, budget) == expected
