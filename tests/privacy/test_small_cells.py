"""What leaves of exact counts, against every table that would have left the same."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.privacy.small_cells import hide_small


def same_view(counts: tuple[int, ...], least: int) -> list[tuple[int, ...]]:
    """Return every table of as many patients of which the same leaves, by trying all of them."""

    def view(each: tuple[int, ...]) -> dict[str, int]:
        return hide_small({str(index): count for index, count in enumerate(each)}, least)

    seen, total = view(counts), sum(counts)
    free = [index for index in range(len(counts)) if str(index) not in seen]
    found = []
    for values in product(range(total + 1), repeat=len(free)):
        tried = list(counts)
        for index, value in zip(free, values, strict=True):
            tried[index] = value
        if sum(tried) == total and view(tuple(tried)) == seen:
            found.append(tuple(tried))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(2, 5))
def test_no_small_cell_can_be_told(counts: list[int], least: int) -> None:
    """Whoever knows the rule, the total and all that left is left with two values for each small cell."""
    if sum(counts) < least:
        return  # of so few the gate lets nothing out
    tables = same_view(tuple(counts), least)
    for index, count in enumerate(counts):
        if 0 < count < least:
            assert len({table[index] for table in tables}) > 1, (counts, least, tables)


@pytest.mark.parametrize(("cells", "most", "least"), [(2, 9, 2), (2, 9, 4), (3, 6, 2), (3, 6, 3), (4, 4, 2)])
def test_none_of_all_small_tables_tells(cells: int, most: int, least: int) -> None:
    views: dict[tuple[int, tuple[tuple[str, int], ...]], list[tuple[int, ...]]] = {}
    for counts in product(range(most + 1), repeat=cells):
        if least <= sum(counts) <= most:
            left = hide_small({str(index): count for index, count in enumerate(counts)}, least)
            views.setdefault((sum(counts), tuple(left.items())), []).append(counts)
    for tables in views.values():
        for index in range(cells):
            values = {table[index] for table in tables}
            assert len(values) > 1 or not 0 < values.pop() < least, tables


@pytest.mark.parametrize(
    ("counts", "least", "left"),
    [
        ({}, 5, {}),
        ({"a": 1, "b": 0, "c": 0}, 1, {"a": 1, "b": 0, "c": 0}),
        ({"a": 7, "b": 0, "c": 0}, 5, {"a": 7, "b": 0, "c": 0}),
        ({"a": 7, "b": 0}, 5, {}),
        ({"a": 7}, 5, {"a": 7}),
        ({"a": 2, "b": 9, "c": 14, "d": 0}, 5, {"c": 14}),
        ({"a": 4, "b": 5, "c": 5, "d": 6}, 5, {"d": 6}),
        ({"a": 4, "b": 9}, 5, {}),
    ],
)
def test_by_hand(counts: dict[str, int], least: int, left: dict[str, int]) -> None:
    assert hide_small(counts, least) == left
