"""Accuracy against ε as one picture: a panel for each cohort, made of the parts of the pages' charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from histoflare.report.charts import draw_series
from histoflare.report.svg import line, text

WIDTH, PANEL, HEIGHT = 960, 320, 250
LEFT, RIGHT, TOP, FLOOR = 14.0, 94.0, 40.0, 205.0
"""Of a panel's axes: in percent of its width, and in pixels."""

SERIES = {"local": "noise of each its own", "shared": "shared noise", "pooled": "all patients in one place"}
LEVELS = {"open": "no protection", "alone, open": "one hospital alone, no protection"}

STYLE = """
  text{font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#22252b;font-size:12px}
  .head{font-weight:600;font-size:13px}.tick{fill:#5a6270;font-size:11px}
  .grid{stroke:#e2e3df}.chance{stroke:#9aa3ad;stroke-dasharray:2 4}
  .open{stroke:#22252b;stroke-width:1.6}.alone{stroke:#5a6270;stroke-width:1.6;stroke-dasharray:7 4}
  .series{stroke-width:2.2;fill:none}
  .s0{stroke:#b35c00;fill:#b35c00}.s1{stroke:#1a5fb4;fill:#1a5fb4}.s2{stroke:#00795c;fill:#00795c}
"""


def draw_picture(lines: Sequence[Any]) -> str:
    """Return an SVG file's text.

    Args:
        lines: Of ``bench_private``.
    """
    panels: dict[tuple[str, int, int], list[Any]] = {}
    for each in lines:
        panels.setdefault((each.question, each.sites, each.patients), []).append(each)
    parts = [
        Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(
            PANEL * (index % 3), 34 + HEIGHT * (index // 3), PANEL, HEIGHT, _draw_panel(of_panel)
        )
        for index, of_panel in enumerate(panels.values())
    ]
    height = 40 + HEIGHT * -(-len(panels) // 3)
    said = "; ".join(f"{_title(of_panel[0])}: {_describe(of_panel)}" for of_panel in panels.values())
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img" aria-label="{said}">\n'
        '<style>{style}</style>\n<rect width="{w}" height="{h}" rx="14" fill="#fff"/>\n{legend}\n{panels}\n'
        "</svg>\n"
    ).format(
        w=WIDTH,
        h=height,
        said=f"Accuracy against ε. {said}.",
        style=Markup(STYLE),
        legend=_draw_legend(),
        panels=Markup("\n").join(parts),
    )


def _title(of: Any) -> str:
    words = {
        "tiles": "tiles",
        "wide": "8,200 weights",
        "fives": "five tiles a patient",
        "lung": "lung tiles",
        "drawn": "drawn bags",
    }
    return f"{words[of.question]}, {of.sites} × {of.patients}"


def _draw_panel(lines: Sequence[Any]) -> Markup:
    """Return the chart of one cohort."""
    found = {(each.row, each.epsilon): each.mean for each in lines}
    epsilons = sorted({epsilon for _, epsilon in found if epsilon is not None})
    chance = lines[0].chance
    highest = max(found.values())
    top = min(1.0, highest + 0.1 * (highest - chance))

    def x(epsilon: float) -> float:
        return LEFT + 8 + (RIGHT - LEFT - 16) * epsilons.index(epsilon) / max(1, len(epsilons) - 1)

    def y(value: float) -> float:
        return FLOOR - (FLOOR - TOP) * (value - chance) / (top - chance)

    parts = [text(LEFT, 22, _title(lines[0]), "head", "start")]
    step = 0.1 if top - chance > 0.25 else 0.05
    for tick in range(21):
        value = tick * step
        if chance < value <= top:
            parts += [line(LEFT, y(value), RIGHT, y(value), "grid")]
            parts += [text(LEFT - 2, y(value) + 4, f"{value:.2g}", "tick", "end")]
    parts += [line(LEFT, FLOOR, RIGHT, FLOOR, "chance")]
    parts += [text(x(epsilon), FLOOR + 18, f"ε = {epsilon:g}", "tick", "middle") for epsilon in epsilons]
    for name, look in (("alone, open", "alone"), ("open", "open")):
        if (name, None) in found:
            parts.append(line(LEFT, y(found[name, None]), RIGHT, y(found[name, None]), look))
    for index, name in enumerate(SERIES):
        points = [(x(e), y(found[name, e])) for e in epsilons if (name, e) in found]
        parts += draw_series(points, f"series s{index}", index)
    return Markup("").join(parts)


def _draw_legend() -> Markup:
    """Return the signs and what they mean, in one row."""
    parts: list[Markup] = []
    for index, (at, name) in enumerate(zip((1.5, 21.5, 36.0), SERIES.values(), strict=True)):
        parts += draw_series([(at, 20), (at + 3, 20)], f"series s{index}", index)
        parts.append(text(at + 4, 24, name, "name", "start"))
    for at, look, name in zip((57.0, 71.5), ("open", "alone"), LEVELS.values(), strict=True):
        parts += [line(at, 20, at + 3, 20, look), text(at + 3.7, 24, name, "name", "start")]
    return Markup("").join(parts)


def _describe(lines: Sequence[Any]) -> str:
    return ", ".join(
        f"{each.row} {each.mean:.3f}" + (f" at ε {each.epsilon:g}" if each.epsilon is not None else "")
        for each in lines
        if each.row in {**SERIES, **LEVELS}
    )
