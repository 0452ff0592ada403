"""Small charts as inline SVG, drawn by numbers alone.

Horizontal places are percentages and vertical ones pixels, so that a chart fills whatever width there is and
its texts keep their size. Colours are classes of the page's style sheet, which knows light and dark; every
colour comes with a shape or a pattern of its own, and every chart with a title and a description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from markupsafe import Markup

from histoflare.report.svg import at_place, draw_chart, line, rect, row_label, text, tip_of

MODELS = ("local", "federated", "pooled")
UNPROTECTED = ("local_unprotected", "pooled_unprotected")
"""Beside a protected run: the same steps, samples and clip, with noise 0. Their signs are hollow."""

STATUSES = {
    "took": "took part",
    "refused": "refused",
    "silent": "late or gone",
    "unused": "answered, not used",
    "unasked": "not asked",
}
PHASES = ("training", "waiting", "idle")

LABEL_PX = 18
MARK_PX = 14
GAP_PX = 12
STRIP_PX = 18
AXIS_PX = 22
LINES_PX = 190
MOST_CELLS = 60
"""Rounds drawn one by one; of more, neighbours of one status become one strip."""

MOST_LINES = 8
"""Sites told apart in a line chart; of more, every line is grey and their mean stands out."""


@dataclass(frozen=True)
class Mark:
    """One model's figure with its 95 % interval; without ``value`` nothing is drawn."""

    model: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MarkGroup:
    """The figures on one set of patients.

    Attributes:
        label, note: Whose patients, and how many.
        marks: One for each model.
        ticks: Values of single models whose mean is the ``local`` mark.
    """

    label: str
    note: str
    marks: Sequence[Mark]
    ticks: Sequence[float] = ()


def draw_intervals(key: str, title: str, groups: Sequence[MarkGroup], chance: float | None = None) -> Markup:
    """Return a chart of figures between 0 and 1 with their intervals, one row a model.

    Args:
        key: Makes the chart's ids unique on its page.
        chance: What guessing gives; a dashed line.
    """
    parts: list[Markup] = []
    y = 4
    for group in groups:
        parts.append(row_label(y, group.label, group.note))
        y += LABEL_PX + 2
        for mark in group.marks:
            parts.append(_draw_mark(y + MARK_PX // 2, mark, group.ticks if mark.model == "local" else ()))
            y += MARK_PX
        y += GAP_PX
    grid = [
        line(100 * at, 0, 100 * at, y, "grid strong" if at in (0.0, 1.0) else "grid")
        for at in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    if chance is not None:
        grid.append(line(100 * chance, 0, 100 * chance, y, "chance"))
    axis = [text(100 * at, y + 15, f"{at:g}", "tick", _anchor(at)) for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    described = "; ".join(
        f"{group.label}: " + ", ".join(_describe(mark) for mark in group.marks) for group in groups
    )
    return draw_chart(key, title, described, y + AXIS_PX, [*grid, *parts, *axis])


def draw_participation(key: str, sites: Mapping[str, Sequence[str]]) -> Markup:
    """Return a strip a site: what it did in each round, one of :data:`STATUSES`."""
    parts: list[Markup] = []
    y = 4
    rounds = max((len(statuses) for statuses in sites.values()), default=0)
    described = []
    for site, statuses in sites.items():
        taken = sum(status == "took" for status in statuses)
        note = f"took part in {taken} of {len(statuses)}"
        parts.append(row_label(y, site, note))
        y += LABEL_PX + 2
        at = 0
        for status, length in _runs(statuses):
            parts.append(_draw_cell(at, length, max(rounds, 1), y, status, site))
            at += length
        y += STRIP_PX + GAP_PX
        described.append(f"{site}: {note} rounds")
    if rounds:
        parts += [text(0, y + 6, "round 1", "tick", "start")]
        parts += [text(100, y + 6, f"round {rounds}", "tick", "end")] if rounds > 1 else []
    return draw_chart(key, "Who took part in each round", "; ".join(described), y + 12, parts)


def draw_seconds(key: str, sites: Mapping[str, Mapping[str, float]]) -> Markup:
    """Return a bar a site: its seconds of training, waiting and idle, on one scale."""
    parts: list[Markup] = []
    described = []
    y = 4
    longest = max((sum(spent[phase] for phase in PHASES) for spent in sites.values()), default=0.0) or 1.0
    for site, spent in sites.items():
        parts.append(row_label(y, site, f"{sum(spent[phase] for phase in PHASES):.1f} s"))
        y += LABEL_PX + 2
        at = 0.0
        for phase in PHASES:
            width = 100 * spent[phase] / longest
            tip = f"{site}: {phase} {spent[phase]:.1f} s"
            parts.append(rect(at, y, width, STRIP_PX - 4, f"phase {phase}", tip))
            at += width
        y += STRIP_PX - 4 + GAP_PX
        described.append(f"{site}: " + ", ".join(f"{phase} {spent[phase]:.1f} s" for phase in PHASES))
    return draw_chart(key, "Seconds of each site", "; ".join(described), y, parts)


def draw_lines(key: str, title: str, sites: Mapping[str, Sequence[tuple[int, float]]]) -> Markup:
    """Return a line a site of (round, value); rounds are written from 1 on.

    Values between 0 and 1 get the scale from 0 to 1, others that from their least to their greatest.
    """
    points = [point for values in sites.values() for point in values]
    if not points:
        return Markup("")
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    span = (high - low) or 1.0

    def place(at: int, value: float) -> tuple[float, float]:
        x = 50.0 if last == first else 9 + 89 * (at - first) / (last - first)
        return x, 8 + (LINES_PX - 16) * (1 - (value - low) / span)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 8 + (LINES_PX - 16) * (1 - share)
        parts.append(line(0, y, 100, y, "grid"))
        parts.append(text(0, y - 3, f"{low + share * (high - low):.3g}", "tick", "start"))
    many = len(sites) > MOST_LINES
    for index, values in enumerate(sites.values()):
        look = "series many" if many else f"series s{index % MOST_LINES}"
        parts += draw_series([place(*point) for point in values], look, None if many else index)
    if many:
        parts += draw_series([place(*point) for point in _mean_line(sites)], "series mean", None)
    parts.append(text(9, LINES_PX + 14, f"round {first + 1}", "tick", "start"))
    if last > first:
        parts.append(text(98, LINES_PX + 14, f"round {last + 1}", "tick", "end"))
    described = "; ".join(
        f"{site}: {values[0][1]:.3f} in round {values[0][0] + 1}, {values[-1][1]:.3f} in round "
        f"{values[-1][0] + 1}"
        for site, values in sites.items()
        if values
    )
    return draw_chart(key, title, described, LINES_PX + AXIS_PX, parts)


def draw_key(look: str) -> Markup:
    """Return the sign that stands for ``look`` in a legend: a model, a status, a phase or ``s0`` … ``s7``."""
    if look in (*MODELS, *UNPROTECTED):
        sign = line(0, 8, 100, 8, f"interval m-{_kind(look)}") + draw_sign(50, 8, look, _look(look))
    elif look in STATUSES:
        sign = _draw_cell(0, 1, 1, 1, look, "", height=14)
    elif look in PHASES:
        sign = rect(0, 2, 100, 12, f"phase {look}", "")
    else:
        index = int(look[1:])
        sign = line(0, 8, 100, 8, f"series {look}") + _dot(50, 8, index, f"series {look}")
    return Markup('<svg class="key" width="26" height="16" aria-hidden="true">{}</svg>').format(sign)


def _draw_mark(y: int, mark: Mark, ticks: Sequence[float]) -> Markup:
    parts = [line(100 * value, y - 4, 100 * value, y + 4, "each") for value in map(_bounded, ticks)]
    if mark.value is None:
        return Markup("").join([*parts, text(0, y + 4, f"{_words(mark.model)}: –", "tick none", "start")])
    if mark.low is not None and mark.high is not None:
        low, high = _bounded(mark.low), _bounded(mark.high)
        parts.append(line(100 * low, y, 100 * high, y, f"interval m-{_kind(mark.model)}"))
    tip = _describe(mark)
    parts.append(draw_sign(100 * _bounded(mark.value), y, mark.model, _look(mark.model), tip))
    return Markup("").join(parts)


def _draw_cell(
    at: int, length: int, rounds: int, y: int, status: str, site: str, height: int = STRIP_PX
) -> Markup:
    x, width = 100 * at / rounds, 100 * length / rounds
    which = f"round {at + 1}" if length == 1 else f"rounds {at + 1} to {at + length}"
    tip = f"{site}, {which}: {STATUSES[status]}" if site else ""
    cell = rect(x, y, width, height, f"cell c-{status}", tip)
    middle, centre = x + width / 2, y + height / 2
    if length > 1 or rounds > MOST_CELLS // 2:
        return cell
    signs = {
        "refused": "M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5",
        "silent": "M-3.5 0H3.5",
        "unused": "M0-3.5V3.5M-3.5 0H3.5",
    }
    if status not in signs:
        return cell
    return cell + at_place(
        middle, centre, Markup('<path class="sign n-{}" d="{}"/>').format(status, signs[status])
    )


def _runs(statuses: Sequence[str]) -> Iterable[tuple[str, int]]:
    if len(statuses) <= MOST_CELLS:
        return [(status, 1) for status in statuses]
    return [(status, len(list(run))) for status, run in groupby(statuses)]


def _mean_line(sites: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    rounds: dict[int, list[float]] = {}
    for values in sites.values():
        for at, value in values:
            rounds.setdefault(at, []).append(value)
    return [(at, sum(values) / len(values)) for at, values in sorted(rounds.items())]


def draw_series(points: Sequence[tuple[float, float]], look: str, index: int | None) -> list[Markup]:
    """Return the line through points (x %, y px); on some of them the signs of series ``index``, if given."""
    parts = [line(*start, *end, look) for start, end in pairwise(points)]
    if index is None:
        return parts
    step = max(1, len(points) // 12)
    shown = [point for number, point in enumerate(points) if number % step == 0 or number == len(points) - 1]
    return parts + [_dot(x, y, index, look) for x, y in shown]


def _describe(mark: Mark) -> str:
    if mark.value is None:
        return f"{_words(mark.model)} –"
    interval = "" if mark.low is None or mark.high is None else f" ({mark.low:.2f} to {mark.high:.2f})"
    return f"{_words(mark.model)} {mark.value:.3f}{interval}"


def _kind(model: str) -> str:
    return model.partition("_")[0]


def _words(model: str) -> str:
    return model.replace("_", ", ")


def _look(model: str) -> str:
    return f"mark m-{_kind(model)}" + (" other" if model in UNPROTECTED else "")


def _bounded(value: float) -> float:
    return min(1.0, max(0.0, value))


def _anchor(at: float) -> str:
    return {0.0: "start", 1.0: "end"}.get(at, "middle")


def draw_sign(x: float, y: float, model: str, look: str, tip: str = "") -> Markup:
    """Return the model's sign: a diamond, a circle or a square."""
    paths = {"local": "M0-5.5 5.5 0 0 5.5-5.5 0Z", "pooled": "M-4.2-4.2H4.2V4.2H-4.2Z"}
    if _kind(model) in paths:
        drawn = Markup('<path class="{}" d="{}">{}</path>').format(look, paths[_kind(model)], tip_of(tip))
    else:
        drawn = Markup('<circle class="{}" r="5">{}</circle>').format(look, tip_of(tip))
    return at_place(x, y, drawn)


def _dot(x: float, y: float, index: int, look: str) -> Markup:
    """Return the sign of series ``index``: four shapes, filled and then hollow."""
    paths = (
        "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z",
        "M-3.5-3.5H3.5V3.5H-3.5Z",
        "M0-5 5 0 0 5-5 0Z",
        "M0-5 5 4H-5Z",
    )
    hollow = " hollow" if index % MOST_LINES >= len(paths) else ""
    drawn = Markup('<path class="{} dot{}" d="{}"/>').format(look, hollow, paths[index % len(paths)])
    return at_place(x, y, drawn)
