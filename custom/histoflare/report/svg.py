"""What charts are drawn of: SVG elements with places in percent (across) and pixels (down).

Every text is escaped; an element's ``look`` is a class of the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

LONGEST_LABEL = 34


def draw_chart(key: str, title: str, description: str, height: int, parts: Iterable[Markup]) -> Markup:
    """Return a chart of ``height`` pixels; title and description are for those who do not see it."""
    return Markup(
        '<svg class="chart" role="img" width="100%" height="{h}" aria-labelledby="{k}-title {k}-desc">'
        '<title id="{k}-title">{t}</title><desc id="{k}-desc">{d}</desc>{parts}</svg>'
    ).format(k=key, t=title, d=description, h=height, parts=Markup("").join(parts))


def row_label(y: int, label: str, note: str) -> Markup:
    """Return a row's name at the left and a remark at the right; a long name is cut, its tip is not."""
    short = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
    name = Markup('<text class="label" x="0" y="{}">{}<title>{}</title></text>').format(y + 13, short, label)
    return name + text(100, y + 13, note, "note", "end")


def text(x: float, y: float, written: str, look: str, anchor: str) -> Markup:
    """Return a text; ``anchor`` is start, middle or end."""
    return Markup('<text class="{}" x="{}%" y="{}" text-anchor="{}">{}</text>').format(
        look, _short(x), _short(y), anchor, written
    )


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> Markup:
    """Return a line from (x1, y1) to (x2, y2)."""
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(
        look, _short(x1), _short(y1), _short(x2), _short(y2)
    )


def rect(x: float, y: float, width: float, height: float, look: str, tip: str) -> Markup:
    """Return a rectangle with its upper left corner at (x, y)."""
    return Markup('<rect class="{}" x="{}%" y="{}" width="{}%" height="{}">{}</rect>').format(
        look, _short(x), _short(y), _short(width), _short(height), tip_of(tip)
    )


def at_place(x: float, y: float, drawn: Markup) -> Markup:
    """Return ``drawn`` about (x %, y px): a nested drawing is what percentages can move."""
    return Markup('<svg x="{}%" y="{}" overflow="visible">{}</svg>').format(_short(x), _short(y), drawn)


def tip_of(text: str) -> Markup:
    """Return what is shown where the pointer rests; nothing for an empty text."""
    return Markup("<title>{}</title>").format(text) if text else Markup("")


def _short(value: float) -> str:
    return escape(f"{value:.3f}".rstrip("0").rstrip("."))
