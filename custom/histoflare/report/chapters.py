"""A report in two chapters: federated beside its bounds, and what the privacy of each patient costs.

Both chapters are runs of one question on the same sites, one after the other in the same federation. The
first protects nothing; the second has a privacy plan. ``report.json`` is the second one's and has besides:

- ``unprotected_run``: the first one's report, with ``gain_over_local``: site → the figures of the federated
  model less those of the site's own, on the test patients of all sites, as below; and ``gain_on_average``:
  the same less the mean of the sites' own models.
- ``cost_of_privacy``: the figures of the first one's federated model less those of the second one's, on the
  same test patients: ``{figure: number, figure_ci95: [low, high]}``.
- ``cost_of_noise``: the same of the second one's own job without noise, in place of the first one's model;
  empty if that was not trained.
- ``note``: what a reader must know of the data; empty if nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from histoflare.report.figures import NAMES
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.headline import FEW_PATIENTS, Headline, chance_of, choose_metric, count, write_headline

UNPROTECTED_RUN = "unprotected_run"
COST = "cost_of_privacy"
COST_OF_NOISE = "cost_of_noise"
GAIN = "gain_over_local"
ON_AVERAGE = "gain_on_average"
NOTE = "note"


@dataclass(frozen=True)
class Chapter:
    """What a chapter says first, and the figures that it rests on.

    Attributes:
        verdict: One short sentence.
        evidence: By how much, each sentence a line of its own.
        result: The figures behind both.
        cautions: What a reader must know besides, of this chapter's run.
    """

    title: str
    verdict: str
    evidence: tuple[str, ...]
    result: str
    cautions: tuple[str, ...] = ()


def join_chapters(
    unprotected: Mapping[str, Any],
    protected: Mapping[str, Any],
    gains: Mapping[str, Mapping[str, Any]],
    on_average: Mapping[str, Any],
    cost: Mapping[str, Any],
    cost_of_noise: Mapping[str, Any],
    note: str = "",
) -> dict[str, Any]:
    """Return the report of both, see the module's text."""
    each = {site: dict(gain) for site, gain in gains.items()}
    first = {**unprotected, GAIN: each, ON_AVERAGE: dict(on_average)}
    costs = {COST: dict(cost), COST_OF_NOISE: dict(cost_of_noise)}
    return {**protected, UNPROTECTED_RUN: first, **costs, NOTE: note}


def write_chapters(report: Mapping[str, Any]) -> list[Chapter]:
    """Return the chapters of a report; none of one that has not got two."""
    first = report.get(UNPROTECTED_RUN)
    if not first:
        return []
    before, after = write_headline(first), write_headline(report)
    title = "Federated, beside each site alone and all data in one place"
    gain, *by_how_much = say_gain(first, before)
    cost, *of_noise = say_cost(report)
    return [
        Chapter(title, gain, tuple(by_how_much), before.result, before.cautions),
        Chapter("What privacy costs", cost, tuple(of_noise), _join(after), after.cautions),
    ]


def say_gain(report: Mapping[str, Any], headline: Headline) -> tuple[str, ...]:
    """Return whether the federated model is better than the sites' own, from the paired differences.

    Returns:
        A short sentence, and where it can be told by how much.
    """
    metric = headline.metric
    gains = [
        (each[metric], *each[f"{metric}_ci95"])
        for each in report.get(GAIN, {}).values()
        if each.get(f"{metric}_ci95")
    ]
    federated = report["federated"]
    if not federated or federated["n_patients"] < FEW_PATIENTS:
        return (headline.verdict,)
    if is_at_chance(report, metric):
        patients = count(federated["n_patients"], "test patient")
        return (
            f"The unprotected model is at chance, as far as {patients} can tell: the settings or the data "
            "are the reason, not privacy.",
        )
    if not gains:
        return (headline.verdict,)
    better, total = sum(low > 0 for _, low, _ in gains), len(report[GAIN])
    worse = sum(high < 0 for *_, high in gains)
    least = min(gains, key=lambda gain: gain[1])
    between = f"{least[0]:.3f} of {NAMES[metric]} {_between(least[1], least[2])}"
    if better == total:
        whose, nearest = ("every site's own model", "the nearest") if better > 1 else ("the site's own", "it")
        return (f"The federated model is better than {whose}.", f"It is ahead of {nearest} by {between}.")
    each = f"it is better than {better} of {total}"
    each += f" and worse than {worse}" if worse else ""
    mean, interval = report.get(ON_AVERAGE, {}).get(metric), report.get(ON_AVERAGE, {}).get(f"{metric}_ci95")
    if mean is None or interval is None:
        return (f"Of the sites' own models, {each}.", f"The least difference is {between}.")
    low, high = interval
    by = f"{abs(mean):.3f} of {NAMES[metric]} on average {_between(low, high)}"
    if low <= 0 <= high:
        verdict = "The federated model and the sites' own cannot be told apart."
        return (verdict, f"They differ by {by}. Taken one by one, {each}.")
    than, way = ("better", "ahead of") if mean > 0 else ("worse", "behind")
    verdict = f"The federated model is {than} than the sites' own on average."
    return (verdict, f"It is {way} them by {by}. Taken one by one, {each}.")


def say_cost(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how much less the protected job's model gives, with its interval.

    That is the price of the protected job as a whole: beside the noise it may have another model and other
    settings than the unprotected one, such as suit training under noise. What the noise alone costs follows
    as a sentence of its own, where the protected job was trained without noise, too.

    Where the unprotected model is at chance it is the settings, or the data, and not privacy: then nothing is
    said of a cost, for there was nothing to lose.
    """
    first = report[UNPROTECTED_RUN]
    metric = choose_metric(first)
    what, epsilon = NAMES[metric], _epsilon(report)
    federated = first["federated"]
    cost, interval = report[COST].get(metric), report[COST].get(f"{metric}_ci95")
    few = not federated or federated["n_patients"] < FEW_PATIENTS
    if not few and is_at_chance(first, metric):
        return (
            "What privacy costs cannot be told: the unprotected model is at chance, too, as far as "
            f"{count(federated['n_patients'], 'test patient')} can tell. The settings or the data are the "
            "reason, not privacy.",
        )
    if cost is None or interval is None or few:
        patients = count(federated["n_patients"] if federated else 0, "test patient")
        return (f"With {patients} this run cannot tell what privacy costs.",)
    low, high = interval
    between = _between(low, high)
    of_noise = _say_noise(report, metric)
    if is_at_chance(report, metric):
        patients = count(federated["n_patients"], "test patient")
        fallen = f"{what} falls by {cost:.3f}" if low > 0 else f"the difference in {what} is {cost:.3f}"
        said = f"At {epsilon} the model is at chance, as far as {patients} can tell: {fallen} {between}."
        return (said, *of_noise)
    than = "the first chapter's"
    if low > 0:
        said = f"At {epsilon}, {what} is {cost:.3f} lower than {than} {between}."
    elif high < 0:
        said = f"At {epsilon}, {what} is {-cost:.3f} higher than {than} {between}."
    else:
        said = (
            f"At {epsilon}, {what} cannot be told apart from {than}: the difference is {cost:.3f} {between}."
        )
    return (said, *of_noise)


def _say_noise(report: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    """Return what the noise alone costs, with its interval; nothing where that was not measured."""
    found = report[COST_OF_NOISE]
    cost, interval = found.get(metric), found.get(f"{metric}_ci95")
    if cost is None or interval is None:
        return ()
    low, high = interval
    between = _between(low, high)
    if low > 0:
        return (f"The noise alone costs {cost:.3f} {between}: so much more has the same job without noise.",)
    if high < 0:
        return (f"The same job without noise has {-cost:.3f} less {between}.",)
    return (f"What the noise alone costs cannot be told: without it the same job has {cost:+.3f} {between}.",)


def _between(low: float, high: float) -> str:
    return f"(95 % interval {low:.3f} to {high:.3f})"


def is_at_chance(report: Mapping[str, Any], metric: str) -> bool:
    """Return whether guessing lies within or above the federated model's interval."""
    figures, chance = report["federated"] or {}, chance_of(metric, report)
    interval = figures.get(f"{metric}_ci95")
    return interval is not None and chance is not None and bool(interval[0] <= chance)


def _epsilon(report: Mapping[str, Any]) -> str:
    guarantee = report["guarantee"]
    return f"ε = {say_epsilon(guarantee['federation']['filter'])} for each {guarantee['unit']}"


def _join(headline: Headline) -> str:
    return f"{headline.result} {headline.verdict}".strip()
