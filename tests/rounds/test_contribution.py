"""Shapley values against games with known ones, and the axioms that make them what they are."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.rounds.contribution import Coalition, coalitions, drawn_contributions, exact_contributions

SITES = ("a", "b", "c", "d")
games = st.lists(st.floats(-1, 1), min_size=16, max_size=16).map(
    lambda values: dict(zip(coalitions(SITES), values, strict=True))
)


def test_the_glove_game() -> None:
    """Left gloves at a and b, a right one at c; a pair is worth 1: 1/6, 1/6 and 4/6 (Shapley and Shubik)."""

    def worth(members: Coalition) -> float:
        return float("c" in members and len(members) > 1)

    found = exact_contributions(("a", "b", "c"), worth)
    assert [found[site].shapley for site in "abc"] == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    assert [found[site].left_out for site in "abc"] == [0, 0, 1]


def test_the_airport_game() -> None:
    """A runway as long as the largest plane needs (Littlechild and Owen 1973): 1, 2 and 4 long."""
    length = {"a": 1.0, "b": 2.0, "c": 4.0}
    found = exact_contributions("abc", lambda members: max((length[site] for site in members), default=0.0))
    assert [found[site].shapley for site in "abc"] == pytest.approx([1 / 3, 1 / 3 + 1 / 2, 1 / 3 + 1 / 2 + 2])


@given(games)
def test_they_are_the_mean_over_all_orders_of_joining(game: dict[Coalition, float]) -> None:
    found = exact_contributions(SITES, game.__getitem__)
    for site in SITES:
        added = [
            game[frozenset(order[: order.index(site) + 1])] - game[frozenset(order[: order.index(site)])]
            for order in permutations(SITES)
        ]
        assert found[site].shapley == pytest.approx(sum(added) / len(added), abs=1e-12)
    total = sum(each.shapley for each in found.values())
    assert total == pytest.approx(game[frozenset(SITES)] - game[frozenset()], abs=1e-12)


@given(games)
def test_a_site_that_adds_nothing_has_none_and_two_alike_have_the_same(game: dict[Coalition, float]) -> None:
    def idle(members: Coalition) -> float:
        return game[members - {"d"}]

    def alike(members: Coalition) -> float:
        return game[frozenset({"a"} if members & {"a", "b"} else ()) | (members & {"c", "d"})]

    assert exact_contributions(SITES, idle)["d"].shapley == pytest.approx(0, abs=1e-12)
    both = exact_contributions(SITES, alike)
    assert both["a"].shapley == pytest.approx(both["b"].shapley, abs=1e-12)


def test_drawn_orders_come_near_and_their_interval_says_how_near() -> None:
    sites = [f"site-{number}" for number in range(9)]
    weight = {site: number for number, site in enumerate(sites)}

    def worth(members: Coalition) -> float:
        return sum(weight[site] for site in members) ** 0.5

    exact = exact_contributions(sites, worth)
    covered = 0
    for seed in range(40):
        found = drawn_contributions(sites, worth, 30, seed)
        total = sum(each.shapley for each in found.values())
        assert total == pytest.approx(36**0.5), "each order adds up to the whole"
        for site in sites:
            assert found[site].left_out == pytest.approx(exact[site].left_out)
            low, high = found[site].low, found[site].high
            assert low is not None and high is not None
            covered += low - 1e-9 <= exact[site].shapley <= high + 1e-9
    assert covered >= 0.88 * 40 * len(sites), "a normal interval of 15 pairs covers a little less than 95 %"
