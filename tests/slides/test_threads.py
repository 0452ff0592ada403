"""Work on several threads that looks like a loop."""

from __future__ import annotations

import threading
import time

import pytest

from histoflare.slides.threads import make_each


def test_what_is_made_comes_in_the_order_of_the_things() -> None:
    def make(number: int) -> int:
        time.sleep(0.01 * (5 - number % 5))  # the later of five is done first
        return number * number

    assert list(make_each(make, range(20))) == [number * number for number in range(20)]
    assert list(make_each(make, [])) == []


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    begun: list[int] = []

    def make(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("number 1")
        return number

    made = make_each(make, range(10_000))
    assert next(made) == 0
    with pytest.raises(ValueError, match="number 1"):
        next(made)
    assert len(begun) < 10_000


def test_whoever_stops_early_leaves_no_thread() -> None:
    made = make_each(lambda number: number, range(10_000))
    next(made)
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("make")]
