"""The page of a comparison of strategies: a chart of how well each serves the sites, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from histoflare.report.charts import draw_sign
from histoflare.report.figures import NAMES
from histoflare.report.headline import chance_of
from histoflare.report.rendering import write_template
from histoflare.report.svg import draw_chart, line, text

LEFT, RIGHT = 27.0, 96.0
"""Ends of the axis of figures, in percent."""

ROW_PX, AXIS_PX = 18, 24
BOUNDS = {"each site alone": "local", "all data in one place": "pooled"}
"""Rows that are no strategy → the sign that these models have on every page."""


def write_strategies(found: Mapping[str, Any], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        found: Of ``lab.strategy_comparison.compare_strategies``.
        path: Where to.
    """
    figure = found["figure"]
    splits = [
        {
            "name": split["name"],
            "sites": split["sites"],
            "rows": split["rows"],
            "refused": [row for row in split["rows"] if "refused" in row],
            "chart": draw_strategies(
                f"strategies-{number}",
                f"{NAMES[figure]}, {split['name']}",
                split["rows"],
                chance_of(figure, found),
            ),
            "external": any(row.get("external") is not None for row in split["rows"]),
        }
        for number, split in enumerate(found["splits"])
    ]
    write_template(
        "strategies.html", path, public=True, found=found, splits=splits, figure=figure, bounds=BOUNDS
    )


def draw_strategies(key: str, title: str, rows: Sequence[Mapping[str, Any]], chance: float | None) -> Markup:
    """Return a row for each strategy: a sign at the mean over the sites, a bar from the worst to the best.

    The axis ends a little beyond what there is to see. A strategy that was refused has no row.

    Args:
        key: Makes the chart's ids unique on its page.
        chance: What guessing gives; a dashed line.
    """
    shown = [row for row in rows if row.get("mean") is not None]
    ends: list[float] = [row[end] for row in shown for end in ("worst", "best")] + (
        [] if chance is None else [chance]
    )
    low, high = max(0.0, min(ends) - 0.02), min(1.0, max(ends) + 0.02)
    if max(ends) > 1:  # no figure between 0 and 1
        low, high = min(ends), max(ends)

    def x_of(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / ((high - low) or 1.0)

    height = ROW_PX * len(shown) + 6
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 1, 10, 100, 1e9) if (high - low) / step <= 7)
    parts = []
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = x_of(number * step)
        parts += [
            line(x, 0, x, height, "grid"),
            text(x, height + 15, f"{number * step:.3g}", "tick", "middle"),
        ]
    if chance is not None:
        parts.append(line(x_of(chance), 0, x_of(chance), height, "chance"))
    for number, row in enumerate(shown):
        y = 4 + ROW_PX * number + ROW_PX // 2
        model = BOUNDS.get(row["strategy"], "federated")
        said = f"{row['strategy']}: {row['mean']:.3f}, sites {row['worst']:.3f} to {row['best']:.3f}"
        parts += [
            text(0, y + 4, row["strategy"], "label" if model == "federated" else "note", "start"),
            line(x_of(row["worst"]), y, x_of(row["best"]), y, f"interval m-{model}"),
            draw_sign(x_of(row["mean"]), y, model, f"mark m-{model}", said),
        ]
    described = "; ".join(f"{row['strategy']} {row['mean']:.3f}, worst {row['worst']:.3f}" for row in shown)
    return draw_chart(key, title, described, height + AXIS_PX, parts)
