"""What a run folder says of a job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from histoflare.flare.result import evaluation_noise_of
from histoflare.privacy.budget import Budget
from histoflare.privacy.tally import Tally
from histoflare.privacy.words import IF_CA_IS_HONEST
from histoflare.report.evaluation_noise import say_evaluation_noise

TALLY = Tally(noise_multiplier=4.0, noise="shared", honest=2)
JOB: Any = SimpleNamespace(tally=TALLY, most_evaluations=1)
TOTAL = {"sites": ["a", "b"], "noise_std": 4.0, "figures": {"accuracy": 0.5}}


@pytest.mark.parametrize(
    ("voids", "total", "paid"), [(0, TOTAL, 1), (2, TOTAL, 3), (2, None, 2), (0, None, 1)]
)
def test_an_evaluation_costs_what_was_sent_to_sums_that_did_not_open(
    voids: int, total: dict[str, Any] | None, paid: int
) -> None:
    """Nothing was learned of them, and they are paid for; what was reserved is, too."""
    row = {"voids": [{"sites": ["a", "b"]}] * voids} if voids else {}
    found = evaluation_noise_of(JOB, total, row)
    assert found is not None
    expected = Budget(TALLY.budget_epsilon, TALLY.delta).spent([TALLY.spend().times(paid)])
    assert found["epsilon"] == pytest.approx(expected)


@pytest.mark.parametrize("trusts_ca", [True, False])
def test_who_must_be_honest_stands_in_the_sentence_with_the_figure(trusts_ca: bool) -> None:
    row = {"stamps": {"a": {"trusts_ca": False}, "b": {"trusts_ca": trusts_ca}}}
    said = say_evaluation_noise(evaluation_noise_of(JOB, TOTAL, row))
    (sentence,) = [each for each in said.split(". ") if "ε = " in each]
    assert (IF_CA_IS_HONEST in sentence) is trusts_ca
