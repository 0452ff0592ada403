"""Ranges of plain numbers, and in words what is wrong with one that is outside.

Each function returns a list with one sentence that begins with the field's name, or an empty list.
"""

from __future__ import annotations

from collections.abc import Collection

from histoflare.checks import is_above_zero, is_number, is_whole


def whole(name: str, value: object, most: int | None = None, *, or_null: bool = False) -> list[str]:
    """Return what is wrong with a whole number from 1 to ``most``.

    Args:
        name: The field.
        value: What it holds.
        most: The largest that will do; None takes any.
        or_null: Whether None will do too.
    """
    if or_null and value is None:
        return []
    if not is_whole(value, 1):
        return [f"{name}: a whole number of at least 1{' or null' if or_null else ''}, not {value!r}"]
    return [f"{name}: at most {most}, not {value}"] if most is not None and value > most else []


def above_zero(name: str, value: object, *, or_null: bool = False) -> list[str]:
    """Return what is wrong with a finite number above 0; arguments as of :func:`whole`."""
    if (or_null and value is None) or is_above_zero(value):
        return []
    return [f"{name}: a finite number above 0{' or null' if or_null else ''}, not {value!r}"]


def at_least_zero(name: str, value: object) -> list[str]:
    """Return what is wrong with a finite number of at least 0; arguments as of :func:`whole`."""
    if is_number(value) and value >= 0:
        return []
    return [f"{name}: a finite number of at least 0, not {value!r}"]


def between(
    name: str,
    value: object,
    least: float,
    most: float,
    *,
    without_least: bool = False,
    without_most: bool = False,
) -> list[str]:
    """Return what is wrong with a number from ``least`` to ``most``; arguments as of :func:`whole`.

    Args:
        without_least, without_most: Whether the bound itself will not do.
    """
    fits = is_number(value) and least <= value <= most
    if fits and not ((without_least and value == least) or (without_most and value == most)):
        return []
    low, high = "above" if without_least else "from", "below" if without_most else "to"
    return [f"{name}: a number {low} {least:g} {high} {most:g}, not {value!r}"]


def one_of(name: str, value: object, words: Collection[str]) -> list[str]:
    """Return what is wrong with one of some words; arguments as of :func:`whole`."""
    return [] if value in words else [f"{name}: one of {', '.join(words)}, not {value!r}"]


def seed(name: str, value: object) -> list[str]:
    """Return what is wrong with a seed, any whole number; arguments as of :func:`whole`."""
    return [] if is_whole(value) else [f"{name}: a whole number, not {value!r}"]
