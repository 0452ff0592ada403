"""What the page says of privacy: each site's ε, how it grew, and what accuracy it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from histoflare.report.beside_updates import say_uncovered_chapter
from histoflare.report.charts import MOST_LINES
from histoflare.report.figures import kind_of, title_of
from histoflare.report.guarantee_words import (
    ACCOUNTANTS,
    say_chance,
    say_guarantee,
    say_how,
    say_not_covered,
    say_sampler,
    say_title,
)
from histoflare.report.headline import chance_of, mean_of
from histoflare.report.privacy_charts import EpsilonMark, EpsilonSeries, draw_accuracy, draw_epsilon

MOST_NAMES = 4
"""Sites of one curve that a legend names; of more, it counts them."""


@dataclass(frozen=True)
class Tradeoff:
    """How good the model is against ε: the table's entries, the chart, what the job's own is beside guessing.

    Attributes:
        title: Of the chart. metrics: The two figures in the table; the first is the chart's.
        guessing: Whether the chart has the line of guessing; ``chance`` says what follows from it.
    """

    title: str
    metrics: Sequence[str]

    entries: Sequence[Mapping[str, Any]]
    chart: Markup
    guessing: bool
    chance: str
    note: str


@dataclass(frozen=True)
class PrivacySection:
    """What the section shows: one figure, and in ``how`` and by ``tight``, an accountant, how else to count.

    ``legend`` names the chart's lines.
    """

    guarantee: Mapping[str, Any]
    is_open: bool
    is_void: bool
    title: str
    sentence: str
    tight: str = ""
    tight_name: str = ""
    how: Sequence[str] = ()
    not_covered: str = ""
    sampler: str = ""
    chart: Markup | None = None
    legend: Sequence[str] = ()
    tradeoff: Tradeoff | None = None


def make_privacy_section(report: Mapping[str, Any]) -> PrivacySection:
    """Return what is to be shown of a report."""
    guarantee, said = report["guarantee"], say_guarantee(report["guarantee"])
    if guarantee["mechanism"] == "open":
        return PrivacySection(guarantee, True, False, say_title(guarantee), said)
    tight = guarantee["accountants"][-1]
    series = _series(guarantee)
    reserved = guarantee["reserved"]["filter"]
    return PrivacySection(
        guarantee=guarantee,
        is_open=False,
        is_void=guarantee["seeded_noise"],
        title=say_title(guarantee),
        sentence=said,
        tight=tight,
        tight_name=ACCOUNTANTS[tight],
        how=say_how(guarantee),
        not_covered=f"{say_not_covered(guarantee)} {say_uncovered_chapter(report)}".strip(),
        sampler=say_sampler(guarantee),
        chart=draw_epsilon("epsilon", "ε of each site over the rounds", series, reserved["epsilon"]),
        legend=[each.label for each in series],
        tradeoff=_tradeoff(report),
    )


def _series(guarantee: Mapping[str, Any]) -> list[EpsilonSeries]:
    """Return the curves of ε, sites of one curve as one; of too many curves the highest and the lowest."""
    found: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for site, spent in guarantee["sites"].items():
        points = _points(spent)
        if spent["filter"]["epsilon"] in (None, 0):
            continue  # infinite, or nothing was spent
        found.setdefault(points, []).append(site)
    if len(found) > MOST_LINES:
        ordered = sorted(found, key=lambda points: points[-1][1], reverse=True)
        named = {ordered[0]: "the site that spent most", ordered[-1]: "the site that spent least"}
    else:
        named = {points: _name(sites) for points, sites in found.items()}
    return [EpsilonSeries(name, points) for points, name in named.items()]


def _points(spent: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    figures = [(row["round"], row["filter"]["epsilon"]) for row in spent["after_round"]]
    return tuple((at, epsilon) for at, epsilon in figures if epsilon is not None)


def _name(sites: Sequence[str]) -> str:
    return ", ".join(sites) if len(sites) <= MOST_NAMES else f"{len(sites)} sites"


def _tradeoff(report: Mapping[str, Any]) -> Tradeoff | None:
    entries = report["accuracy_against_epsilon"]
    if not entries:
        return None
    kind = kind_of(report)
    metric, title = kind.main, f"{title_of(kind.main)} against ε"
    marks = []
    for entry in entries:
        if entry[metric] is None:
            continue
        low, high = entry.get(f"{metric}_ci95") or (None, None)
        marks.append(EpsilonMark(entry["epsilon"], entry[metric], low, high, is_own=entry["is_own"]))
    chance = chance_of(metric, report)
    own_models = report.get("local_unprotected_on_all_sites") or report["local_on_all_sites"]
    local = mean_of(list(own_models.values()), metric)
    own = next((entry for entry in entries if entry["is_own"]), None)
    return Tradeoff(
        title=title,
        metrics=(metric, kind.pair[1]),
        entries=sorted(entries, key=_order),
        chart=draw_accuracy("tradeoff", title, marks, local, chance),
        guessing=chance is not None,
        chance=say_chance(own, metric, chance) if own else "",
        note="At ε = ∞ the same job runs with its clip and without noise; so do the sites' own models here.",
    )


def _order(entry: Mapping[str, Any]) -> float:
    return float("inf") if entry["epsilon"] is None else float(entry["epsilon"])
