"""What a report's figures say, in a few sentences, and what they do not.

The sentences compare intervals. Two intervals that do not overlap show a difference; two that do show none,
which is not the same as showing that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoflare.reasons import explain
from histoflare.report.bounds import say_epsilon_of
from histoflare.report.figures import NAMES, kind_of
from histoflare.report.guarantee_words import (
    ALL_COLLUDE,
    WEAK,
    WEAK_EPSILON,
    say_epsilon,
    say_guarantee,
    say_title,
)
from histoflare.report.participation import SiteRounds, finished_rounds, name_rounds, site_rounds

FEW_PATIENTS = 20
"""Below this many test patients no difference between models is spoken of."""

MUCH = 0.1
"""A threshold is called off if another one's balanced accuracy is better by so much at least."""

MOST_NAMES = 6
"""More sites than this are counted and not named."""

TOGETHER = "On the test patients of all sites together"
"""Whom the verdict is about: a site's own model may all the same do better on its own patients."""


@dataclass(frozen=True)
class Headline:
    """The result in words.

    Attributes:
        metric: The figure the sentences speak of.
        verdict: One sentence: what the run shows.
        result: The figures behind it.
        cautions: What a reader must know besides: who is missing, what cannot be told from this run.
        privacy: The run's ε in one line, with its accountants. privacy_plainly: The same without these.
    """

    metric: str
    verdict: str
    result: str
    cautions: tuple[str, ...]
    privacy: str
    privacy_plainly: str


def write_headline(report: Mapping[str, Any]) -> Headline:
    """Return the result of ``report`` in words. Any figure may be missing."""
    metric = choose_metric(report)
    federated = report["federated"]
    cautions = say_participation(report)
    privacy = (say_privacy(report["guarantee"]), say_privacy_plainly(report["guarantee"]))
    complete = all(each.complete for each in site_rounds(report))
    subset = "" if complete else "Not every site took part in every round it was asked in. "
    if not federated or federated[metric] is None:
        reason = (federated or {}).get(f"{metric}_reason") or "no site has test patients"
        return Headline(metric, f"{subset}No result: {reason}.", "", tuple(cautions), *privacy)
    local = [figures for figures in report["local_on_all_sites"].values() if _known(figures, metric)]
    cautions += _limits(report, metric)
    verdict = subset + _verdict(federated, local, metric)
    return Headline(metric, verdict, _result(report, local, metric), tuple(cautions), *privacy)


def closing_words(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return what a console says below the figures of a run, or of one job with several seeds.

    The ε where something protects the updates, which sites were late, whether the run ended before its last
    round, and whether the model is at chance: the sentences of the page.
    """
    found: dict[str, list[int]] = {}
    for report in reports:
        headline = write_headline(report)
        said = [headline.privacy] if report["guarantee"]["mechanism"] != "open" else []
        said += [*_late_sites(report), *_unfinished(report)]
        if _known(report["federated"], headline.metric):
            at_chance = _at_chance(report, headline.metric)
            said += [f"At chance: {' '.join(at_chance)}"] if at_chance else []
        for sentence in said:
            found.setdefault(sentence, []).append(report["seed"])
    return " ".join(
        sentence if len(seeds) == len(reports) else f"Seed {', '.join(map(str, seeds))}: {sentence}"
        for sentence, seeds in found.items()
    )


def say_participation(report: Mapping[str, Any]) -> list[str]:
    """Return who is missing, who was late, and whether the run ended before its last round."""
    return [*_missing_sites(report), *_late_sites(report), *_unfinished(report)]


def say_late(each: SiteRounds, report: Mapping[str, Any], whose: str | None = None) -> str:
    """Return in which rounds a site was late or not there, and what that cost; nothing if it never was.

    A round's row names under ``absent`` who was sent no task. One without it does not tell: all were late.

    Args:
        whose: The words for the site; None takes its name.
    """
    late: list[int] = []
    absent: list[int] = []
    for row, status in zip(report["participation"], each.statuses, strict=True):
        if status == "silent":
            (absent if each.site in row.get("absent", []) else late).append(row["round"] + 1)
    found = []
    if late:
        where = name_rounds(late)
        said = f"{whose or each.site} was late in {where}: no update came in time"
        if report["guarantee"]["mechanism"] != "open":
            said += f"; its ε of {where} is spent all the same, and not in the figures here"
        found.append(f"{said}.")
    if absent:
        found.append(f"{whose or each.site} was not there in {name_rounds(absent)}, and was sent no task.")
    return " ".join(found)


def choose_metric(report: Mapping[str, Any]) -> str:
    """Return the protocol's metric, or the kind's main figure; another one where it does not exist."""
    kind = kind_of(report)
    agreed = str((report.get("protocol") or {}).get("metric"))
    wanted = [agreed] if agreed in kind.names else []
    for metric in [*wanted, *kind.shown, *kind.names]:
        if _known(report["federated"], metric):
            return metric
    return wanted[0] if wanted else kind.main


def chance_of(metric: str, report: Mapping[str, Any]) -> float | None:
    """Return what guessing gives, or None where that depends on how frequent the classes are (Dice)."""
    if metric == "auc":
        return 0.5
    classes = len(report["task"].get("labels", []))
    return 1 / classes if metric == "balanced_accuracy" and classes >= 2 else None


def say_figure(figures: Mapping[str, Any], metric: str) -> str:
    """Return a figure with its interval in words."""
    interval = figures.get(f"{metric}_ci95")
    if interval:
        return f"{figures[metric]:.3f} (95 % interval {' to '.join(write_ends(interval))})"
    why = figures.get(f"{metric}_no_interval")
    return f"{figures[metric]:.3f}{f' ({why})' if why else ''}"


def write_ends(interval: Sequence[float]) -> tuple[str, str]:
    """Return the ends of an interval with two decimals, or with three where two would show one number."""
    low, high = (f"{end:.2f}" for end in interval)
    return (low, high) if low != high else (f"{interval[0]:.3f}", f"{interval[1]:.3f}")


def mean_of(rows: Sequence[Mapping[str, Any] | None], metric: str) -> float | None:
    """Return the mean of the figures that exist."""
    known = [row[metric] for row in rows if row and row[metric] is not None]
    return sum(known) / len(known) if known else None


def _known(figures: Mapping[str, Any] | None, metric: str) -> bool:
    return bool(figures) and figures is not None and figures.get(metric) is not None


def _result(report: Mapping[str, Any], local: Sequence[Mapping[str, Any]], metric: str) -> str:
    federated, pooled = report["federated"], report["pooled"]
    tested = [name for name, site in report["sites"].items() if site["federated"]]
    text = (
        f"On the {count(federated['n_patients'], 'test patient')} of "
        f"{'the only site' if len(tested) == 1 else f'{len(tested)} sites'} the federated model reaches "
        f"{_article(metric)} of {say_figure(federated, metric)}"
    )
    others = []
    mean = mean_of(local, metric)
    if mean is not None:
        others.append(f"the sites' own models{say_epsilon_of(report, 'local')} reach {mean:.3f} on average")
    place = f"all their {kind_of(report).tested}s in one place"
    if _known(pooled, metric):
        others.append(
            f"a model trained on {place}{say_epsilon_of(report, 'pooled')} {say_figure(pooled, metric)}"
        )
    text += f"; there {' and '.join(others)}." if others else "."
    free = report.get("pooled_unprotected")
    if free and _known(free, metric):
        text += f" Without noise the model trained on {place} reaches {say_figure(free, metric)}."
    external = report["external"]
    if external and _known(external, metric):
        cohort = count(external["n_patients"], "patient")
        text += f" On {cohort} of an external cohort the federated model reaches"
        text += f" {say_figure(external, metric)}"
        elsewhere = [
            figures for name, figures in report["external_other_models"].items() if name.startswith("local/")
        ]
        mean = mean_of(elsewhere, metric)
        text += "." if mean is None else f", the sites' own models {mean:.3f} on average."
    return text


def _verdict(federated: Mapping[str, Any], local: Sequence[Mapping[str, Any]], metric: str) -> str:
    interval = federated.get(f"{metric}_ci95")
    if federated["n_patients"] < FEW_PATIENTS or not interval:
        patients = count(federated["n_patients"], "test patient")
        why = "" if interval else f" ({federated.get(f'{metric}_no_interval') or 'no interval'})"
        return f"With {patients} this run cannot tell which model is better{why}."
    intervals = [figures.get(f"{metric}_ci95") for figures in local]
    known = [each for each in intervals if each]
    if not known:
        return "There are no models of single sites to compare the federated model with."
    below = sum(each[1] < interval[0] for each in known)
    above = sum(each[0] > interval[1] for each in known)
    if below == len(known):
        whose = "the site's own model" if len(known) == 1 else "every site's own model"
        return f"{TOGETHER} the federated model is better than {whose}: the intervals do not overlap."
    if above == len(known):
        whose = "every site's own model"
        return f"{TOGETHER} the federated model is worse than {whose}: the intervals do not overlap."
    if not below and not above:
        return _undecided(federated[metric], mean_of(local, metric) or 0.0)
    parts = [f"better than {below} of {len(known)} sites' own models"] if below else []
    parts += [f"worse than {above} of them" if below else f"worse than {above} of {len(known)} sites' own"]
    said = " and ".join(parts if above else parts[:1])
    rest = len(known) - below - above
    if not rest:
        return f"{TOGETHER} the federated model is {said}."
    return f"{TOGETHER} the federated model is {said}; with the other {rest} the intervals overlap."


def _undecided(federated: float, local: float) -> str:
    if abs(federated - local) < 0.0005:
        beginning = "The federated model scores the same as the sites' own models do on average, and"
    else:
        side = "higher" if federated > local else "lower"
        beginning = f"The federated model scores {side} than the sites' own models do on average, but"
    return f"{beginning} the intervals overlap: this run does not show a difference."


def _limits(report: Mapping[str, Any], metric: str) -> list[str]:
    """Return what the figures cannot tell."""
    federated, pooled = report["federated"], report["pooled"]
    found = []
    agreed = str((report.get("protocol") or {}).get("metric"))
    if agreed in kind_of(report).names and agreed != metric:
        reason = federated.get(f"{agreed}_reason") or "unknown reason"
        found.append(f"The agreed figure, {NAMES[agreed]}, does not exist here: {reason}.")
    interval = federated.get(f"{metric}_ci95")
    found += _at_chance(report, metric)
    for figures, whose in ((federated, "on the sites' test patients"), (report["external"], "externally")):
        if said := say_threshold(figures, report["task"].get("labels", ()), whose):
            found.append(said)
    if interval and federated["n_patients"] >= FEW_PATIENTS and pooled and pooled.get(f"{metric}_ci95"):
        other = pooled[f"{metric}_ci95"]
        place = f"all {kind_of(report).tested}s in one place"
        if other[0] > interval[1]:
            found.append(f"The model trained on {place} is better; the intervals are apart.")
        elif other[1] < interval[0]:
            found.append(f"The model trained on {place} is worse; the intervals are apart.")
        else:
            found.append(
                f"The intervals of the federated model and of the one trained on {place} overlap: which is "
                "better this run does not show."
            )
    found += _better_at_home(report, metric)
    untested = [name for name, site in report["sites"].items() if not site["federated"]]
    if untested:
        found.append(f"No test patients, so not in the figures: {', '.join(untested)}.")
    return found


def _better_at_home(report: Mapping[str, Any], metric: str) -> list[str]:
    """Return at which sites the own model scores higher on the own test patients."""
    said = [
        f"{name} {site['local'][metric]:.3f} (federated {site['federated'][metric]:.3f})"
        for name, site in report["sites"].items()
        if _known(site["local"], metric)
        and _known(site["federated"], metric)
        and site["local"][metric] > site["federated"][metric]
    ]
    if not said:
        return []
    if len(said) > MOST_NAMES:
        return [
            f"On their own test patients {len(said)} sites' own models score higher than the federated one."
        ]
    return [f"On its own test patients a site's own model scores higher: {'; '.join(said)}."]


def say_threshold(figures: Mapping[str, Any] | None, labels: Sequence[str], where: str) -> str:
    """Return what it means that the AUC is much better than the balanced accuracy; nothing if it is not.

    The AUC rates how a model of two classes ranks slides, the balanced accuracy its answers, which it gives
    at a probability of 0.5. A ranking has a threshold whose balanced accuracy on the same slides is at least
    1 - sqrt((1 - AUC) / 2): if no threshold is above b, the ROC curve is nowhere above TPR = FPR + 2 b - 1,
    and the area below that line is 1 - 2 (1 - b)². Where that is :data:`MUCH` above the balanced accuracy,
    the threshold is off. Of so few patients that they have no interval nothing is said.

    Args:
        figures: A set of figures of the report.
        labels: Of the task.
        where: Whose slides they are, in words.
    """
    if len(labels) != 2 or not (_known(figures, "auc") and _known(figures, "balanced_accuracy")):
        return ""
    assert figures is not None
    if figures.get("balanced_accuracy_no_interval"):
        return ""
    auc, balanced = float(figures["auc"]), float(figures["balanced_accuracy"])
    best = 1 - math.sqrt(max(0.0, 1 - auc) / 2)
    if best - balanced < MUCH:
        return ""
    return (
        f"AUC {auc:.3f} and balanced accuracy {balanced:.3f} ({where}): the model ranks slides of the two "
        f"classes well, but says {labels[1]} from a probability of 0.5 on, and that is not where they part. "
        f"Another threshold gives a balanced accuracy of at least {best:.2f} on these slides; choose it on "
        "patients who are not for testing."
    )


def say_privacy_plainly(guarantee: Mapping[str, Any]) -> str:
    """Return a run's privacy for a reader who knows ε; accountants and noise come later on the page."""
    if guarantee["mechanism"] == "open" or guarantee["seeded_noise"]:
        return say_guarantee(guarantee)
    said = f"{say_title(guarantee)}."
    if guarantee["epsilon_is_infinite"]:
        return f"{said} Nothing protects the updates."
    if guarantee["against_server"]["epsilon_is_infinite"]:
        said += " It holds against whoever sees the combined models only; against the server ε = ∞."
    if second := guarantee.get("if_all_collude"):
        said += f" {ALL_COLLUDE}, ε = {say_epsilon(second['federation'])}."
    if guarantee["epsilon"] > WEAK_EPSILON:
        said += f" {WEAK}"
    return f"{said} It holds if {guarantee['holds_if']}." if len(guarantee["sites"]) > 1 else said


def say_privacy(guarantee: Mapping[str, Any]) -> str:
    """Return the run's ε in one line."""
    said = say_guarantee(guarantee)
    bounded = guarantee["mechanism"] != "open" and not guarantee["epsilon_is_infinite"]
    return f"{said} It holds if {guarantee['holds_if']}." if bounded and len(guarantee["sites"]) > 1 else said


def _at_chance(report: Mapping[str, Any], metric: str) -> list[str]:
    interval, chance = report["federated"].get(f"{metric}_ci95"), chance_of(metric, report)
    if not interval or chance is None or not interval[0] <= chance <= interval[1]:
        return []
    said = f"Guessing gives {chance:.2g}, which lies within the federated model's interval."
    return [said, *_why_at_chance(report, metric, chance)]


def _late_sites(report: Mapping[str, Any]) -> list[str]:
    found = [said for each in site_rounds(report) if (said := say_late(each, report))]
    if len(found) > MOST_NAMES:
        return [
            f"{len(found)} sites were late or not there in some rounds; what a late round cost them is spent "
            "all the same."
        ]
    return found


def _why_at_chance(report: Mapping[str, Any], metric: str, chance: float) -> list[str]:
    """Return whether it is the noise that makes a protected model guess: not if it guesses without, too."""
    same = [
        each for each in report["accuracy_against_epsilon"] if each["epsilon"] is None and not each["is_own"]
    ]
    place = f"the model trained on all {kind_of(report).tested}s in one place"
    models = [("the federated model", each) for each in same]
    models += [(place, each) for each in (report.get("pooled_unprotected"),) if each]
    found = []
    for name, figures in models:
        low, high = figures.get(f"{metric}_ci95") or (math.nan, math.nan)
        if low <= chance <= high:
            found.append(
                f"Without noise {name} is at chance, too: the settings or the data are the reason, not "
                "privacy."
            )
        elif low > chance:
            found.append(f"Without noise {name} is above chance: there is something to learn.")
    return found


def _missing_sites(report: Mapping[str, Any]) -> list[str]:
    """Return who did not take part although asked: a run on some of the sites is not one on all."""
    sites = site_rounds(report)
    found = []
    never = [each.site for each in sites if not each.taken]
    if never:
        found.append(f"Never took part: {', '.join(never)}.")
    partly = [each for each in sites if each.taken and not each.complete]
    if len(partly) > MOST_NAMES:
        fewest = min(partly, key=lambda each: each.taken)
        found.append(
            f"{len(partly)} sites took part in some of the rounds only; the fewest: {_share(fewest)}."
        )
    elif partly:
        found.append(f"Took part in some of the rounds only: {', '.join(map(_share, partly))}.")
    if not never and not partly and any(each.asked < len(each.statuses) for each in sites):
        found.append("The strategy asks only some of the sites in each round; all that were asked took part.")
    refused = report.get("evaluation_refused") or {}
    found += [
        f"{site} gave no figures on the model: {explain(code)}"
        for site, code in refused.items()
        if site not in never
    ]
    unknown = [each.site for each in sites if each.site not in report["sites"]]
    if unknown and report["sites"]:
        found.append(f"Not in the figures: {', '.join(unknown)}.")
    nobody = sum(not row["taking_part"] for row in report["participation"] if row.get("finished", True))
    if nobody:
        found.append(f"In {count(nobody, 'round')} nobody took part; the model stayed as it was.")
    return found


def _share(each: SiteRounds) -> str:
    return f"{each.site} {each.taken} of {each.asked}"


def _unfinished(report: Mapping[str, Any]) -> list[str]:
    done = finished_rounds(report)
    stopped = report["participation"][-1].get("stopped") if report["participation"] else None
    if stopped:
        return [
            f"Stopped after {done} of {count(report['rounds'], 'round')}, as the protocol has it: the sites' "
            f"mean {stopped['metric']} had not risen above {stopped['best']:.3f} for "
            f"{count(stopped['patience'], 'round')}."
        ]
    if done >= report["rounds"]:
        asked = ((report.get("protocol") or {}).get("stop") or {}).get("patience")
        if asked and all(row.get("validation") is None for row in report["participation"]):
            return [
                "The protocol's patience never counted: in no round did every site have a figure of "
                "validation patients that it may let out."
            ]
        return []
    why = next((row["given_up"] for row in report["participation"] if row.get("given_up")), "")
    return [
        f"Only {done} of {count(report['rounds'], 'round')} were finished{f' ({why})' if why else ''}; the "
        "figures are of that model."
    ]


def _article(metric: str) -> str:
    return f"{'an' if NAMES[metric][0] in 'aA' else 'a'} {NAMES[metric]}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 patient``, ``2 patients``; ``plural`` where that is no noun with an s."""
    written = f"{number:,}".replace(",", "\u202f")
    return f"{written} {noun if number == 1 else plural or noun + 's'}"
