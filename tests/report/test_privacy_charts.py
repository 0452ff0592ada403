"""Charts of ε: places follow the numbers."""

from __future__ import annotations

import math
import re

import pytest

from histoflare.report.privacy_charts import (
    FIRST_EPSILON,
    INFINITE_EPSILON,
    LAST_EPSILON,
    PLOT_PX,
    TOP_PX,
    EpsilonMark,
    EpsilonSeries,
    draw_accuracy,
    draw_epsilon,
)


def places(chart: str, look: str) -> list[tuple[float, ...]]:
    """Return (x1, y1, x2, y2) of every line of a look."""
    found = re.findall(
        rf'<line class="{look}" x1="([\d.]+)%" y1="([\d.]+)" x2="([\d.]+)%" y2="([\d.]+)"', chart
    )
    return [tuple(map(float, each)) for each in found]


def test_epsilon_grows_from_zero_up_and_the_budget_lies_across() -> None:
    series = EpsilonSeries("a & b", [(0, 2.0), (1, 3.0), (2, 4.0)])
    chart = draw_epsilon("k", "ε", [series], 5.0)
    (x1, y1, x2, y2), (_, _, x3, y3) = places(chart, "series s0")
    assert (x1, x2, x3) == (9, 53.5, 98)
    assert (y1, y2, y3) == pytest.approx(
        [TOP_PX + PLOT_PX * (1 - value / 5) for value in (2, 3, 4)], abs=1e-3
    )
    ((_, budget, end, _),) = places(chart, "limit")
    assert (budget, end) == (TOP_PX, 100)
    assert "a &amp; b: 2.0 after round 1, 4.0 after round 3; the whole job may cost 5.0</desc>" in chart
    assert "round 3" in chart


@pytest.mark.parametrize("greatest", [0.0, 0.0031, 0.9, 1.0, 4.999, 5.0, 10.6, 31_044.0])
def test_the_axis_holds_every_figure_in_few_steps(greatest: float) -> None:
    chart = draw_epsilon("k", "ε", [EpsilonSeries("a", [(0, greatest)])], greatest)
    lines = places(chart, "grid")
    assert 2 <= len(lines) <= 6
    assert lines[-1][1] == TOP_PX
    ((_, y, _, _),) = places(chart, "limit")
    assert TOP_PX <= y <= TOP_PX + PLOT_PX
    if greatest:
        assert y < TOP_PX + PLOT_PX / 2, "the axis is not far longer than the figures are"


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw_epsilon("k", "ε", [], 5.0) == ""
    assert "svg" in draw_accuracy("k", "t", [], None, None)


def test_accuracy_stands_over_a_logarithmic_axis_and_infinity_apart() -> None:
    marks = [
        EpsilonMark(1.0, 0.5, 0.4, 0.6),
        EpsilonMark(10.0, 0.6, is_own=True),
        EpsilonMark(100.0, 1.2, 0.7, 1.3),
        EpsilonMark(None, 0.9),
    ]
    chart = draw_accuracy("k", "t", marks, local=0.75, chance=0.25)
    circles = [
        float(x) for x in re.findall(r'<svg x="([\d.]+)%" y="[\d.]+" overflow="visible"><circle', chart)
    ]
    middle = (FIRST_EPSILON + LAST_EPSILON) / 2
    assert circles == [FIRST_EPSILON, middle, LAST_EPSILON, INFINITE_EPSILON]
    (first, last) = places(chart, "interval m-federated")
    assert first[1] == pytest.approx(TOP_PX + PLOT_PX * 0.6, abs=1e-3)
    assert last[3] == TOP_PX, "an interval beyond the axis ends at it"
    ((_, local, _, _),) = places(chart, "level m-local")
    ((_, chance, _, _),) = places(chart, "chance")
    assert (local, chance) == pytest.approx((TOP_PX + PLOT_PX * 0.25, TOP_PX + PLOT_PX * 0.75), abs=1e-3)
    assert "ε = 10.0 (this job): 0.600; ε = 100.0: 1.200 (0.70 to 1.30); ε = ∞: 0.900</desc>" in chart
    assert chart.count("this job</text>") == 1
    assert len(places(chart, "grid strong")) == 1


def test_one_budget_alone_stands_in_the_middle() -> None:
    chart = draw_accuracy("k", "t", [EpsilonMark(math.pi, 0.5, is_own=True)], None, None)
    assert f'<svg x="{(FIRST_EPSILON + LAST_EPSILON) / 2:g}%"' in chart
    assert not places(chart, "grid strong")


def test_a_hostile_name_is_escaped() -> None:
    chart = draw_epsilon("k", "<b>", [EpsilonSeries("<script>", [(0, 1.0)])], None)
    assert "<script>" not in chart
    assert "<b>" not in chart
