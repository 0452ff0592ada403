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
        ({"noise_multiplier": 1.0, "honest": 0}, "honest"),
        ({"noise_multiplier": 1.0, "honest": 2.0}, "honest"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, Any], says: str) -> None:
    with raises_reason("PRIVACY_INVALID", f"{says}: "):
        Spend(**numbers)


@pytest.mark.parametrize(
    "spend", [Spend(0.0), Spend(4.0, 0.5, 0), Spend(1e-300, 1e-12, 10**9), Spend(4.0, 0.1, 2, 3)]
)
def test_it_is_read_as_it_was_written(spend: Spend) -> None:
    assert Spend.from_json(spend.to_json()) == spend


@pytest.mark.parametrize("content", [{}, {"noise_multiplier": 1.0, "sigma": 2.0}])
def test_what_is_no_event_is_refused(content: dict[str, Any]) -> None:
    with raises_reason("PRIVACY_INVALID", "sigma" if content else "noise_multiplier"):
        Spend.from_json(content)


def test_so_many_in_a_row_are_one() -> None:
    assert Spend(2.0, 0.1, 3).times(4) == Spend(2.0, 0.1, 12)
    assert Spend(2.0).times(0).steps == 0


def test_an_event_without_honest_is_one_of_noise_that_is_not_shared() -> None:
    content = {"noise_multiplier": 4.0, "sample_rate": 0.5, "steps": 3}
    assert Spend.from_json(content).honest == 1
    assert Spend(4.0, 0.5, 3).to_json() == content, "as an earlier version wrote it, and reads it"


@pytest.mark.parametrize(
    ("honest", "multiplier"),
    [(4, 4.618802), (3, 4.0), (2, 3.265986), (1, 2.309401), (0, 2.309401), (-7, 2.309401)],
)
def test_shares_of_noise_add_up_and_a_sites_own_is_always_there(honest: int, multiplier: float) -> None:
    shared = Spend(4.0, 0.1, 5, honest=3)
    against = shared.against(honest)
    assert against.noise_multiplier == pytest.approx(multiplier, rel=1e-6)
    assert (against.sample_rate, against.steps, against.honest) == (0.1, 5, 1)


def test_noise_that_is_not_shared_is_the_same_against_everybody() -> None:
    local = Spend(4.0, 0.1, 5)
    assert local.against(9) == local.against(0) == local.alone() == local


def test_alone_is_one_share() -> None:
    assert Spend(4.0, honest=16).alone() == Spend(1.0)
