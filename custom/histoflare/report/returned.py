"""What came back of a federation, in words: for a report without figures of other models (``job result``).

There is no comparison in such a report. It has who took part, what was spent, what sites said of the model in
the rounds (the learning curve), and, where they were asked, what each says of the last or the best model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from histoflare.report.evaluation_noise import WHY_DROWNED, figures_together
from histoflare.report.figures import NAMES, WHY_WITHHELD, kind_of, put_first
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.headline import Headline, count, say_participation, say_privacy, say_privacy_plainly
from histoflare.report.participation import SiteRounds, finished_rounds, say_advice, say_refused, site_rounds

WHICH = {"last": "the last model", "best": "the best model"}
"""``evaluated_model`` of a report, in words."""


WHY_NONE_SAID = {
    False: "No site let figures on the model out.",
    True: "Of the model nothing can be said: too few test patients for the noise in their counts.",
}
"""Whether the figures have noise → why there is none."""


def is_returned(report: Mapping[str, Any]) -> bool:
    """Return whether a report has no figures of its own: nobody who wrote it saw any test patients."""
    return not report["sites"] and report["federated"] is None


def write_returned_headline(report: Mapping[str, Any]) -> Headline:
    """Return what came back of a federation in a few sentences."""
    metric = _metric_of(report)
    said = _say_evaluation(report, metric)
    curve = say_curve(report)
    cautions = [
        *say_participation(report),
        *say_refusals(report),
        *say_advice(report["evaluation_refused"].values()),
    ]
    asked = report["evaluated_at_sites"] is not None or report["evaluation_noise"] is not None
    if not said:
        unsaid = (
            WHY_NONE_SAID[report["evaluation_noise"] is not None]
            if asked
            else "Nobody has been asked yet how good the model is."
        )
        said = f"{_say_rounds(report)} {unsaid}" if finished_rounds(report) else _say_rounds(report)
    guarantee = report["guarantee"]
    privacy = say_privacy(guarantee), say_privacy_plainly(guarantee)
    return Headline(metric, said, curve, tuple(dict.fromkeys(cautions)), *privacy)


def say_refusals(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each site and code with which it refused rounds, and what a lead can do."""
    found, codes = [], []
    for each in site_rounds(report):
        for code, rounds in each.refusals.items():
            found.append(f"{each.site}: {say_refused(code, rounds)}")
            codes.append(code)
    return [*found, *say_advice(codes)]


def say_curve(report: Mapping[str, Any]) -> str:
    """Return how the sites' mean over their validation patients went; empty where it was not let out."""
    rows = [row for row in report["participation"] if row.get("validation") is not None]
    if not rows:
        return ""
    name = next((name for row in rows for of in (row.get("metrics") or {}).values() for name in of), "")
    metric = name.rpartition("/")[2]
    best = max(rows, key=lambda row: float(row["validation"]))
    first, last = rows[0], rows[-1]
    said = (
        f"Of the model that a round began with, the sites' mean {NAMES.get(metric, metric)} over their "
        f"validation patients was {first['validation']:.3f} in round {first['round'] + 1}"
    )
    if last is not first:
        said += f" and {last['validation']:.3f} in round {last['round'] + 1}"
        said += f"; the best was {best['validation']:.3f}, in round {best['round'] + 1}"
    return f"{said}."


def sites_table(report: Mapping[str, Any]) -> Table:
    """Return a line a site for a console: what it did, what its patients spent, what it says of the model."""
    metric = _metric_of(report)
    evaluated = report["evaluated_at_sites"]
    spent = report["guarantee"].get("sites", {})
    title = f"{report['job']}: {_count_rounds(report)}, {report['guarantee']['mechanism']}"
    table = Table(title=title, title_justify="left")
    table.add_column("site")
    for heading in ("took part", "refused", "late or gone"):
        table.add_column(heading, justify="right")
    if spent:
        table.add_column("ε spent", justify="right")
    if evaluated is not None:
        table.add_column(f"{NAMES[metric]}, {WHICH[report['evaluated_model']].partition(' ')[2]}")
    rounds = site_rounds(report)
    alone = sorted({*(evaluated or {}), *report["evaluation_refused"]} - {each.site for each in rounds})
    for each in [*rounds, *(SiteRounds(name, (), {}) for name in alone)]:
        cells = [escape(each.site), _share(each)]
        cells += [str(each.statuses.count(status) or "–") for status in ("refused", "silent")]
        if spent:
            cells.append(say_epsilon(spent[each.site]["filter"]) if each.site in spent else "–")
        if evaluated is not None:
            cells.append(_say_figure(report, each.site, metric))
        table.add_row(*cells)
    return table


def _share(each: SiteRounds) -> str:
    return f"{each.taken} of {each.asked}" if each.statuses else "–"


def say_withheld(report: Mapping[str, Any]) -> str:
    """Return why a figure that the table shows may be missing; empty if none is."""
    metric = _metric_of(report)
    said = (report["evaluated_at_sites"] or {}).values()
    if all(of.get(metric) is not None for of in said):
        return ""
    return WHY_WITHHELD if report["evaluation_noise"] is None else WHY_DROWNED


def _say_figure(report: Mapping[str, Any], site: str, metric: str) -> str:
    said = (report["evaluated_at_sites"] or {}).get(site)
    if said is None:
        return str(report["evaluation_refused"].get(site, "–"))
    if said.get(metric) is None:
        return "not let out" if report["evaluation_noise"] is None else "drowned in noise"
    return f"{said[metric]:.3f}{say_interval(said, metric)}"


def say_interval(figures: Mapping[str, float | None], metric: str) -> str:
    """Return a figure's interval in brackets, after a blank; empty where there is none."""
    low, high = (figures.get(f"{metric}{end}") for end in ("_low", "_high"))
    return "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"


def _metric_of(report: Mapping[str, Any]) -> str:
    """Return the protocol's metric, or another one where no site let that out."""
    kind = kind_of(report)
    agreed = str((report.get("protocol") or {}).get("metric"))
    shown = [*kind.shown, *kind.noised]
    wanted = put_first(agreed, shown) if agreed in kind.names else shown
    figures = list((report["evaluated_at_sites"] or {}).values())
    together = figures_together(report)
    if together is not None:
        figures.insert(0, together[1])
    return next((each for each in wanted if any(of.get(each) is not None for of in figures)), wanted[0])


def _say_evaluation(report: Mapping[str, Any], metric: str) -> str:
    """Return what the sites say of the model; empty if none says anything."""
    which, together = WHICH[report["evaluated_model"]], figures_together(report)
    if together is not None and together[1].get(metric) is not None:
        sites, all_say = together
        interval = say_interval(all_say, metric)
        return (
            f"On the test patients of {count(len(sites), 'site')} together {which} has {NAMES[metric]} "
            f"{all_say[metric]:.3f}{interval}, from counts with noise."
        )
    figures = report["evaluated_at_sites"] or {}
    values = [float(of[metric]) for of in figures.values() if of.get(metric) is not None]
    if not values:
        return ""
    who = f"{len(values)} of {count(len(figures) + len(report['evaluation_refused']), 'site')}"
    if len(values) == 1:
        return f"{who} says of {which}, on its own test patients: {NAMES[metric]} {values[0]:.3f}."
    return (
        f"{who} say of {which}, each on its own test patients: {NAMES[metric]} {min(values):.3f} to "
        f"{max(values):.3f}, {sum(values) / len(values):.3f} on average (each site counts the same)."
    )


def _say_rounds(report: Mapping[str, Any]) -> str:
    done = finished_rounds(report)
    if not done:
        return "No round was finished, so there is no model."
    stopped = bool(report["participation"][-1].get("stopped"))
    if stopped or done >= report["rounds"]:
        return f"The job did what it was to do, in {count(done, 'round')}."
    return f"The job ended after {done} of {count(report['rounds'], 'round')}."


def _count_rounds(report: Mapping[str, Any]) -> str:
    return f"{finished_rounds(report)} of {count(report['rounds'], 'round')}"
