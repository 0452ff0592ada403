from __future__ import annotations

import math

import pytest

from histoflare.checks import is_above_zero, is_number, is_whole

NONE = (True, False, "1", None, [1], {}, 1j, math.nan, math.inf, -math.inf, 10**400)


@pytest.mark.parametrize("value", NONE)
def test_what_is_no_number(value: object) -> None:
    assert not is_number(value) and not is_above_zero(value)


@pytest.mark.parametrize("value", [0, -1, 2.5, -0.0, 1e308, 10**300])
def test_numbers(value: float) -> None:
    assert is_number(value)
    assert is_above_zero(value) == (value > 0)


def test_a_limit_may_be_reached() -> None:
    assert is_above_zero(1, most=1) and is_above_zero(0.5, most=1)
    assert not is_above_zero(1.0000001, most=1)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, math.inf])
def test_what_is_no_whole_number(value: object) -> None:
    assert not is_whole(value)


def test_whole_numbers_have_limits_that_may_be_reached() -> None:
    assert is_whole(-(10**400)) and is_whole(1, 1, 1)
    assert not is_whole(0, least=1) and not is_whole(3, 1, 2)
