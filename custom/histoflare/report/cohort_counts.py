"""What sites said of their cohorts, as rows of a table, and whether a question about labels is feasible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from histoflare.count_form import CountForm, name_of
from histoflare.privacy.advice import advise
from histoflare.privacy.budget import Budget

Said = Mapping[str, float | None]
TOGETHER = "together"
HIDDEN = "–"
"""A count that did not leave, or that cannot be said of all sites because one of theirs did not."""


@dataclass(frozen=True)
class CountRow:
    """One cell: ``counts`` has site → (value, low, high), and None where a count did not leave."""

    block: str
    cell: str
    counts: Mapping[str, tuple[float, float, float] | None]


def list_counts(
    form: CountForm, evaluation: Mapping[str, Said], total: Mapping[str, Any] | None
) -> list[CountRow]:
    """Return the counts of each site by its name, and by :data:`TOGETHER` those of all.

    Args:
        form: What was asked.
        evaluation: Site → its figures.
        total: Of the sum of noised counts (``evaluation_total.json``); without one exact counts are added up,
            where no site held one back.
    """
    rows = []
    for block, cells in form.blocks.items():
        for cell in cells:
            name = name_of(block, cell)
            counts = {site: _read(said, name) for site, said in sorted(evaluation.items())}
            known = [each for each in counts.values() if each is not None]
            whole = bool(known) and len(known) == len(counts)
            together = (
                _read(total["figures"], name)
                if total is not None
                else (sum(each[0] for each in known),) * 3
                if whole
                else None
            )
            rows.append(CountRow(block, cell, {**counts, TOGETHER: together}))
    return rows


def _read(said: Said, name: str) -> tuple[float, float, float] | None:
    value = said.get(name)
    if value is None:
        return None
    low, high = said.get(f"{name}_low"), said.get(f"{name}_high")
    return value, value if low is None else low, value if high is None else high


def say_count(count: tuple[float, float, float] | None) -> str:
    """Return a count in words: a whole number, or a noised one with its 95 % interval."""
    if count is None:
        return HIDDEN
    value, low, high = count
    return f"{value:.0f}" if low == high else f"{value:.1f} ({low:.1f} to {high:.1f})"


def say_enough(rows: list[CountRow], labels: tuple[str, ...], least: int) -> list[str]:
    """Return for each label whether so many patients of it were counted at all sites together."""
    said = []
    for row in rows:
        if row.block != "label" or row.cell not in labels:
            continue
        count = row.counts[TOGETHER]
        if count is None:
            verdict = "not known, for a count did not leave"
        elif count[1] >= least:
            verdict = "yes"
        elif count[2] < least:
            verdict = "no"
        else:
            verdict = "cannot be told from the noise"
        said.append(f"At least {least} patients of {row.cell}: {verdict}.")
    return said


def part_left(
    rows: list[CountRow], labels: tuple[str, ...], sites: int, budget: Budget
) -> tuple[float, float] | None:
    """Return what part of the gain of training to expect under a budget, at least and at most.

    The arithmetic is that of ``privacy advise``, each site adding its own noise, for as many training
    patients as there are of all labels at the ends of their intervals.

    Returns:
        None where a count did not leave.
    """
    counts = [row.counts[TOGETHER] for row in rows if row.block == "label" and row.cell in labels]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or not sites:
        return None
    of_each = [max(1, int(sum(count[end] for count in known) / sites)) for end in (1, 2)]
    low, high = (advise(sites, each, len(labels), budget, colluders=None) for each in of_each)
    return low.part_left, high.part_left
