"""Templates to pages, and how numbers are written on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from histoflare.privacy.words import IF_CA_IS_HONEST, say_delta
from histoflare.reasons import explain
from histoflare.report.charts import draw_key
from histoflare.report.figures import NAMES, title_of
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.headline import count, write_ends
from histoflare.report.participation import list_rounds
from histoflare.storage import write_text

NOTHING = "–"


def write_template(name: str, path: Path, *, public: bool = False, **content: Any) -> None:
    """Render the template ``name`` and write it to ``path``, whole or not at all.

    Every text is escaped. A page loads nothing: no script, no font, no picture from elsewhere, and its
    content security policy says so to the browser. Others can read a page only if it is ``public``.
    """
    environment = Environment(
        loader=PackageLoader("histoflare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=write_number,
        interval=write_interval,
        size=write_size,
        seconds=write_seconds,
        epsilon=say_epsilon,
        delta=say_delta,
    )
    environment.globals.update(
        explain=explain,
        key=draw_key,
        names=NAMES,
        title_of=title_of,
        count=count,
        list_rounds=list_rounds,
        if_ca_is_honest=IF_CA_IS_HONEST,
    )
    write_text(path, environment.get_template(name).render(content), public=public)


def write_number(value: float | None) -> str:
    """Return a figure with three decimals, or a dash."""
    return NOTHING if value is None else f"{value:.3f}"


def write_interval(interval: tuple[float, float] | None) -> str:
    """Return the ends of an interval."""
    return "" if interval is None else "–".join(write_ends(interval))


def write_size(size_bytes: int | None) -> str:
    """Return a number of bytes, short and in full."""
    if size_bytes is None:
        return NOTHING
    exact = f"{size_bytes:,}".replace(",", "\u202f") + " bytes"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit} ({exact})"
    return exact


def write_seconds(seconds: float) -> str:
    """Return a time; minutes from two minutes on."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) for every entry of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _write_setting(value)


def _write_setting(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_write_setting, value)) or NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)
