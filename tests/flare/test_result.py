"""What a run folder says of a job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from histoflare.flare.result import FederationResult, evaluation_noise_of
from histoflare.privacy.budget import Budget
from histoflare.privacy.tally import Tally

TALLY = Tally(noise_multiplier=4.0, noise="shared", honest=2)
TOTAL = {"sites": ["a", "b"], "noise_std": 4.0, "figures": {"accuracy": 0.5}}


@pytest.mark.parametrize(
    ("voids", "total", "paid"), [(0, TOTAL, 1), (2, TOTAL, 3), (2, None, 2), (0, None, 1)]
)
def test_an_evaluation_costs_what_was_sent_to_sums_that_did_not_open(
    voids: int, total: dict[str, Any] | None, paid: int
) -> None:
    """Nothing was learned of them, and they are paid for; what was reserved is, too."""
    row = {"voids": [{"sites": ["a", "b"]}] * voids} if voids else {}
    result = FederationResult(None, [], {}, {}, evaluation_round=row, evaluation_total=total)
    job: Any = SimpleNamespace(tally=TALLY, most_evaluations=1)
    found = evaluation_noise_of(job, result.evaluation_total, result.evaluation_voids)
    assert found is not None
    expected = Budget(TALLY.budget_epsilon, TALLY.delta).spent([TALLY.spend().times(paid)])
    assert found["epsilon"] == pytest.approx(expected)
