"""An event is data: what cannot be one is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from histoflare.privacy.spend import Spend
from tests.refusals import raises_reason


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": 10**400}, "noise_multiplier"),
        ({"noise_multiplier": True}, "noise_multiplier"),
        ({"noise_multiplier": "1"}, "noise_multiplier"),
        ({"noise_multiplier": 1.0, "sample_rate": 0.0}, "sample_rate"),
        ({"noise_multiplier": 1.0, "sample_rate": 1.0001}, "sample_rate"),
        ({"noise_multiplier": 1.0, "sample_rate": math.nan}, "sample_rate"),
        ({"noise_multiplier": 1.0, "steps": -1}, "steps"),
        ({"noise_multiplier": 1.0, "steps": 1.0}, "steps"),
        ({"noise_multiplier": 1.0, "steps": True}, "steps"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, Any], says: str) -> None:
    with raises_reason("PRIVACY_INVALID", f"{says}: "):
        Spend(**numbers)


@pytest.mark.parametrize("spend", [Spend(0.0), Spend(4.0, 0.5, 0), Spend(1e-300, 1e-12, 10**9)])
def test_it_is_read_as_it_was_written(spend: Spend) -> None:
    assert Spend.from_json(spend.to_json()) == spend


@pytest.mark.parametrize("content", [{}, {"noise_multiplier": 1.0, "sigma": 2.0}])
def test_what_is_no_event_is_refused(content: dict[str, Any]) -> None:
    with raises_reason("PRIVACY_INVALID", "sigma" if content else "noise_multiplier"):
        Spend.from_json(content)


def test_so_many_in_a_row_are_one() -> None:
    assert Spend(2.0, 0.1, 3).times(4) == Spend(2.0, 0.1, 12)
    assert Spend(2.0).times(0).steps == 0
