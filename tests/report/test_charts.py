"""Charts: places follow the numbers, and nobody needs colours to read them."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from histoflare.report.charts import (
    MODELS,
    PHASES,
    STATUSES,
    Mark,
    MarkGroup,
    draw_intervals,
    draw_key,
    draw_lines,
    draw_participation,
    draw_seconds,
)


def test_marks_and_intervals_lie_where_the_figures_are() -> None:
    group = MarkGroup("a & b", "8 patients", [Mark("local", 0.25, 0.1, 0.4), Mark("federated", None)], [0.2])
    chart = draw_intervals("k", "AUC", [group], chance=0.5)
    assert 'class="interval m-local" x1="10%"' in chart
    assert 'x2="40%"' in chart
    assert '<svg x="25%"' in chart
    assert 'class="each" x1="20%"' in chart
    assert 'class="chance" x1="50%"' in chart
    assert "federated: –" in chart
    assert "a &amp; b: local 0.250 (0.10 to 0.40), federated –</desc>" in chart
    assert 'aria-labelledby="k-title k-desc"' in chart


def test_an_interval_beyond_the_axis_ends_at_it() -> None:
    chart = draw_intervals("k", "t", [MarkGroup("a", "", [Mark("pooled", 1.0, 0.9, 1.2)])])
    assert 'x1="90%"' in chart
    assert "120" not in chart.replace("1.20", "")


@pytest.mark.parametrize("rounds", [1, 5, 60, 61, 1000])
def test_the_strip_of_a_site_is_filled_from_end_to_end(rounds: int) -> None:
    statuses = ["took", "took", "refused", "silent", "unasked"] * 200
    chart = draw_participation("k", {"a": statuses[:rounds]})
    cells = re.findall(r'<rect class="cell c-(\w+)" x="([\d.]+)%" y="\d+" width="([\d.]+)%"', chart)
    ends = [(float(x), float(x) + float(width)) for _, x, width in cells]
    assert ends[0][0] == 0
    assert ends[-1][1] == pytest.approx(100, abs=0.01)
    assert all(before[1] == pytest.approx(after[0], abs=0.01) for before, after in pairwise(ends))
    shown = [name for name, _, width in cells for _ in range(round(float(width) * rounds / 100))]
    assert shown == statuses[:rounds]


def test_bars_of_seconds_are_on_one_scale() -> None:
    spent = {
        "a": {"training": 5.0, "waiting": 3.0, "idle": 2.0},
        "b": {"training": 2.5, "waiting": 0, "idle": 0},
    }
    chart = draw_seconds("k", spent)
    widths = [
        float(width)
        for width in re.findall(r'class="phase \w+" x="[\d.]+%" y="\d+" width="([\d.]+)%"', chart)
    ]
    assert widths == [50, 30, 20, 25, 0, 0]
    assert draw_seconds("k", {"a": dict.fromkeys(PHASES, 0.0)}).count("phase") == 3, "no time is no fault"


def test_lines_have_one_scale_and_survive_a_single_round() -> None:
    chart = draw_lines("k", "t", {"a": [(0, 0.0), (10, 1.0)]})
    first = re.search(r'class="series s0" x1="([\d.]+)%" y1="([\d.]+)" x2="([\d.]+)%" y2="([\d.]+)"', chart)
    assert first is not None
    x1, y1, x2, y2 = map(float, first.groups())
    assert (x1, x2) == (9, 98)
    assert y1 > y2, "more is higher"
    assert "1.000 in round 11" in chart
    assert "round 4" in draw_lines("k", "t", {"a": [(3, 0.5)]})
    assert "50" in draw_lines("k", "t", {"a": [(0, 50.0), (1, 50.0)]})
    assert draw_lines("k", "t", {}) == ""


def test_more_sites_than_can_be_told_apart_get_their_mean() -> None:
    sites = {f"s{number}": [(0, 0.1 * number), (1, 0.1 * number)] for number in range(10)}
    chart = draw_lines("k", "t", sites)
    assert chart.count("series many") == 10
    assert chart.count("series mean") == 1


def test_every_look_has_a_sign_of_its_own_besides_its_colour() -> None:
    """With the classes' names taken away the signs still differ, or are filled differently by pattern."""
    looks = [*MODELS, "s0", "s1", "s2", "s3"]
    shapes = {re.sub(r'class="[^"]*"', "", draw_key(look)) for look in looks[:3]}
    assert len(shapes) == 3
    assert len({re.sub(r'class="[^"]*"', "", draw_key(look)) for look in looks[3:]}) == 4
    assert "hollow" in draw_key("s4")
    for status in STATUSES:
        assert f"c-{status}" in draw_key(status)
    assert "sign" in draw_key("refused")


def test_a_hostile_label_is_escaped_and_a_long_one_cut() -> None:
    name = "<script>" + "x" * 80
    for chart in (
        draw_intervals("k", name, [MarkGroup(name, name, [])]),
        draw_participation("k", {name: ["took"]}),
        draw_seconds("k", {name: dict.fromkeys(PHASES, 1.0)}),
        draw_lines("k", name, {name: [(0, 0.5)]}),
    ):
        assert "<script>" not in chart
        assert "&lt;script&gt;" in chart
    assert "…" in draw_participation("k", {name: ["took"]})
