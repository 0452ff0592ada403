"""Two charts of ε: how it grew over the rounds, and what accuracy it left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from histoflare.privacy.words import say_epsilon as write
from histoflare.report.charts import AXIS_PX, LINES_PX, MOST_LINES, draw_series, draw_sign
from histoflare.report.svg import draw_chart, line, text

TOP_PX = 10
PLOT_PX = LINES_PX - TOP_PX - 8
LEFT, RIGHT = 9.0, 98.0
"""Ends of the axis of rounds, in percent."""

FIRST_EPSILON, LAST_EPSILON, INFINITE_EPSILON = 16.0, 76.0, 92.0
"""Places of the least and the greatest finite ε, and of ∞, in percent."""


@dataclass(frozen=True)
class EpsilonSeries:
    """ε of one or more sites, of the job's budget: points (round from 0, ε)."""

    label: str
    points: Sequence[tuple[int, float]]


def draw_epsilon(key: str, title: str, series: Sequence[EpsilonSeries], budget: float | None) -> Markup:
    """Return ε over the rounds, from 0 up: a line each, and ``budget`` across.

    Nothing is drawn of no point; every ε must be finite.
    """
    everything = [point for each in series for point in each.points]
    if not everything:
        return Markup("")
    first, last = min(at for at, _ in everything), max(at for at, _ in everything)
    step, top = _scale(max([value for _, value in everything] + ([] if budget is None else [budget])))

    def y_of(value: float) -> float:
        return TOP_PX + PLOT_PX * (1 - value / top)

    def place(at: int, value: float) -> tuple[float, float]:
        return 50.0 if last == first else LEFT + (RIGHT - LEFT) * (at - first) / (last - first), y_of(value)

    parts = []
    for number in range(round(top / step) + 1):
        y = y_of(number * step)
        parts += [line(0, y, 100, y, "grid"), text(0, y - 3, _tick(number * step), "tick", "start")]
    if budget is not None:
        parts.append(line(LEFT, y_of(budget), 100, y_of(budget), "limit"))
    for index, each in enumerate(series):
        look = f"series s{index % MOST_LINES}"
        parts += draw_series([place(*point) for point in each.points], look, index)
    parts.append(text(LEFT, LINES_PX + 14, f"round {first + 1}", "tick", "start"))
    if last > first:
        parts.append(text(RIGHT, LINES_PX + 14, f"round {last + 1}", "tick", "end"))
    described = "; ".join(
        f"{each.label}: {write(each.points[0][1])} after round {each.points[0][0] + 1}, "
        f"{write(each.points[-1][1])} after round {each.points[-1][0] + 1}"
        for each in series
        if each.points
    )
    if budget is not None:
        described += f"; the whole job may cost {write(budget)}"
    return draw_chart(key, title, described, LINES_PX + AXIS_PX, parts)


@dataclass(frozen=True)
class EpsilonMark:
    """A figure between 0 and 1 with its 95 % interval at one ε (None: infinite), the job's own or another."""

    epsilon: float | None
    value: float
    low: float | None = None
    high: float | None = None
    is_own: bool = False


def draw_accuracy(
    key: str, title: str, marks: Sequence[EpsilonMark], local: float | None, chance: float | None
) -> Markup:
    """Return figures against ε on a logarithmic axis, ∞ apart at the right.

    Args:
        local: Mean of the sites' own models, a line across. chance: What guessing gives, a dashed one.
    """
    known = sorted({mark.epsilon for mark in marks if mark.epsilon})

    def x_of(epsilon: float | None) -> float:
        if epsilon is None:
            return INFINITE_EPSILON
        if len(known) < 2 or not epsilon:
            return (FIRST_EPSILON + LAST_EPSILON) / 2 if epsilon else FIRST_EPSILON
        share = math.log(epsilon / known[0]) / math.log(known[-1] / known[0])
        return FIRST_EPSILON + (LAST_EPSILON - FIRST_EPSILON) * share

    def y_of(value: float) -> float:
        return TOP_PX + PLOT_PX * (1 - min(1.0, max(0.0, value)))

    parts = []
    for at in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [line(0, y_of(at), 100, y_of(at), "grid"), text(0, y_of(at) - 3, f"{at:g}", "tick", "start")]
    if any(mark.epsilon is None for mark in marks):
        between = (LAST_EPSILON + INFINITE_EPSILON) / 2
        parts.append(line(between, TOP_PX, between, TOP_PX + PLOT_PX, "grid strong"))
    if local is not None:
        parts.append(line(LEFT, y_of(local), 100, y_of(local), "level m-local"))
    if chance is not None:
        parts.append(line(LEFT, y_of(chance), 100, y_of(chance), "chance"))
    described = []
    for mark in marks:
        said = write(mark.epsilon)
        x, whose = x_of(mark.epsilon), " (this job)" if mark.is_own else ""
        interval = ""
        if mark.low is not None and mark.high is not None:
            parts.append(line(x, y_of(mark.low), x, y_of(mark.high), "interval m-federated"))
            interval = f" ({mark.low:.2f} to {mark.high:.2f})"
        described.append(f"ε = {said}{whose}: {mark.value:.3f}{interval}")
        look = "mark m-federated" if mark.is_own else "mark m-federated other"
        parts.append(draw_sign(x, y_of(mark.value), "federated", look, described[-1]))
        parts.append(text(x, LINES_PX + 8, f"{said}", "tick", "middle"))
        if mark.is_own:
            parts.append(text(x, LINES_PX + 22, "this job", "tick own", "middle"))
    parts.append(text(0, LINES_PX + 8, "ε", "tick", "start"))
    return draw_chart(key, title, "; ".join(described), LINES_PX + AXIS_PX + 8, parts)


def _tick(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 1000 else f"{value:g}"


def _scale(greatest: float) -> tuple[float, float]:
    """Return a round step and the top of an axis from 0 that holds ``greatest`` in at most five steps."""
    if greatest <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(greatest / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= greatest * (1 - 1e-9))
    return step, step * math.ceil(greatest / step * (1 - 1e-9))
