"""How strategies serve four hospitals, as one picture: a panel for each way in which the hospitals differ.

python -m tests.benchmarks.strategies_picture docs/strategies.svg RUN/strategies.json [RUN/strategies.json …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from histoflare.report.headline import chance_of
from histoflare.report.strategies_page import draw_strategies
from histoflare.report.svg import text

PANEL, GAP, TOP, ROW, COLUMNS = 520, 24, 44, 18, 2

STYLE = """
  text{font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#5c6670;font-size:12px}
  text.head{fill:#22252b;font-weight:600;font-size:14px}text.label{fill:#22252b}
  .grid{stroke:#e2e3df}.chance{stroke:#9aa3ad;stroke-dasharray:2 4}
  .interval{stroke-width:2;opacity:.55}.mark{stroke:#fff;stroke-width:1}
  .m-local{fill:#b35c00}.interval.m-local{stroke:#b35c00}.m-federated{fill:#1a5fb4}
  .interval.m-federated{stroke:#1a5fb4}.m-pooled{fill:#5a6270}.interval.m-pooled{stroke:#5a6270}
"""


def draw_picture(found: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG file's text.

    Args:
        found: Of ``compare_strategies``; one or more.
    """
    panels = [(split, chance_of(each["figure"], each)) for each in found for split in each["splits"]]
    rows = max(len(split["rows"]) for split, _ in panels)
    height = TOP + ROW * rows + 40
    width = COLUMNS * (PANEL + GAP) + GAP
    total = height * -(-len(panels) // COLUMNS) + GAP
    parts = []
    for index, (split, chance) in enumerate(panels):
        short = [{**row, "strategy": _short(row["strategy"])} for row in split["rows"]]
        x, y = GAP + (PANEL + GAP) * (index % COLUMNS), height * (index // COLUMNS)
        parts.append(
            Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(
                x, y, PANEL, TOP, text(0, TOP - 12, split["name"], "head", "start")
            )
        )
        chart = draw_strategies(f"panel-{index}", split["name"], short, chance)
        parts.append(
            Markup('<svg x="{}" y="{}" width="{}" height="{}">{}</svg>').format(
                x, y + TOP, PANEL, height - TOP, chart
            )
        )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">\n<style>{style}</style>\n'
        '<rect width="{w}" height="{h}" rx="14" fill="#fff"/>\n{parts}\n</svg>\n'
    ).format(w=width, h=total, style=Markup(STYLE), parts=Markup("\n").join(parts))


def _short(strategy: str) -> str:
    """Return a strategy's name without its fields."""
    return strategy if "=" not in strategy else strategy.split()[0]


if __name__ == "__main__":
    where, *files = sys.argv[1:]
    Path(where).write_text(draw_picture([json.loads(Path(file).read_text()) for file in files]))
