"""The consortium's page, made of ``report.json`` alone: no pixels, no paths, no names but the report's.

The one exception are pictures of generated images, see :mod:`histoflare.report.generated`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from histoflare.report.bounds import models_of, name_model, say_epsilon_of, say_steps
from histoflare.report.chapters import UNPROTECTED_RUN, write_chapters
from histoflare.report.charts import (
    PHASES,
    STATUSES,
    Mark,
    MarkGroup,
    draw_intervals,
    draw_lines,
    draw_participation,
    draw_seconds,
)
from histoflare.report.consortium import own_models
from histoflare.report.evaluation_noise import WHY_DROWNED, figures_together, say_evaluation_noise
from histoflare.report.figures import NAMES, WHY_WITHHELD, kind_of, put_first, title_of
from histoflare.report.generated import GeneratedImage
from histoflare.report.headline import chance_of, count, mean_of, write_headline
from histoflare.report.participation import finished_rounds, site_rounds
from histoflare.report.privacy_section import make_privacy_section
from histoflare.report.rendering import flatten, write_template
from histoflare.report.report_file import fill_missing
from histoflare.report.returned import WHICH, is_returned, write_returned_headline
from histoflare.report.served import say_served

RUNTIMES = {
    "poc": "real FLARE server and client processes on one workstation",
    "production": "FLARE in production",
    "simulator": "FLARE's simulator",
    "federation": "a FLARE server and its clients",
    "inprocess": "one process, without FLARE; nothing was sent over a network",
}
BOUND_NUMBERS = {
    "batch_size": "batch",
    "sample_rate": "sample rate",
    "clip_norm": "clip",
    "noise_multiplier": "noise multiplier",
}
UNTESTED = "no test patients"
MOST_CHARTS = 3


@dataclass(frozen=True)
class Row:
    """A line of a table of figures; where there are none (``figures`` None), ``missing`` says why."""

    label: str
    figures: Mapping[str, Any] | None
    look: str = ""
    missing: str = "no such model in this run"


@dataclass(frozen=True)
class Group:
    """Lines of a table that belong together: one set of patients, or one model.

    ``each`` holds the figures that the first line is the mean of.
    """

    label: str
    note: str
    rows: Sequence[Row]
    each: Sequence[Mapping[str, Any] | None] = ()


def write_page(report: Mapping[str, Any], path: Path, generated: Sequence[GeneratedImage] = ()) -> None:
    """Write the page of ``report`` (see :func:`histoflare.report.consortium.build_report`) to ``path``.

    Parts that a report does not have are not on its page. ``generated`` are pictures of images that no
    patient and no site is in, marked as such on the page.

    Raises:
        KeyError: It is no such report.
        OSError: The disk is full or the folder cannot be written.
    """
    report = fill_missing(report)
    headline = write_returned_headline(report) if is_returned(report) else write_headline(report)
    kind = kind_of(report)
    charted = put_first(headline.metric, kind.charted)[:MOST_CHARTS]
    rounds = site_rounds(report)
    lines = _validation_lines(report)
    shown = {status for each in rounds for status in each.statuses}
    metrics = put_first(headline.metric, kind.shown)
    evaluated, asked = _evaluated(report), [*metrics, *kind.noised]
    said = {
        metric for metric in asked for row in evaluated if row.figures and row.figures[metric] is not None
    }
    write_template(
        "page.html",
        path,
        public=True,
        report=report,
        generated=generated,
        headline=headline,
        chapters=write_chapters(report),
        first=_first_chapter(report),
        kind=kind,
        metrics=metrics,
        models={model: name_model(report, model) for model in models_of(report)},
        bounds=_bounds(report),
        bound_numbers=_bound_numbers(report),
        bounds_protected=any(stated["epsilon"] is not None for stated in report.get("bounds", {}).values()),
        tiles=_tiles(report, headline.metric),
        groups=_groups(report),
        served=say_served(report, headline.metric),
        charts={metric: _interval_chart(report, metric) for metric in charted},
        guessing=any(chance_of(metric, report) is not None for metric in charted),
        elsewhere=_elsewhere(report),
        evaluated=evaluated,
        which=WHICH[report["evaluated_model"]],
        evaluation_noise=say_evaluation_noise(report["evaluation_noise"]),
        said_metrics=[metric for metric in asked if metric in said],
        unsaid_metrics=[NAMES[metric] for metric in metrics if metric not in said],
        is_withheld=any(row.figures and None in map(row.figures.get, metrics) for row in evaluated),
        why_withheld=WHY_DROWNED if report["evaluation_noise"] else WHY_WITHHELD,
        rounds=rounds,
        finished=finished_rounds(report),
        participation=draw_participation("rounds", {each.site: each.statuses for each in rounds}),
        statuses={status: words for status, words in STATUSES.items() if status in shown},
        seconds=_seconds_chart(report),
        phases=PHASES,
        lines=lines,
        line_sites=sorted({site for chart in lines for site in chart.sites}),
        subgroups=_subgroups(report),
        suppressed=sum(1 for *_, figures in _all_subgroups(report) if figures.get("suppressed")),
        runtime=RUNTIMES.get(report["runtime"], report["runtime"]),
        privacy=make_privacy_section(report),
        settings=_settings(report),
    )


def _first_chapter(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a report's first chapter, if it has two."""
    first = report.get(UNPROTECTED_RUN)
    if not first:
        return {}
    metric = write_headline(first).metric
    return {
        "metric": metric,
        "tiles": _tiles(first, metric),
        "chart": _interval_chart(first, metric, "first-figures"),
        "groups": _groups(first),
        "models": {model: name_model(first, model) for model in models_of(first)},
        "guessing": chance_of(metric, first) is not None,
        "metrics": put_first(metric, kind_of(first).shown),
    }


def _tiles(report: Mapping[str, Any], metric: str) -> list[Row]:
    """Return the headline's figures: on all sites' test patients, and on the external cohort."""
    local = _mean(list(report["local_on_all_sites"].values()))
    place = f"All {kind_of(report).tested}s in one place"
    rows = [
        Row("Federated", report["federated"], "federated"),
        Row(f"Each site alone, on average{say_epsilon_of(report, 'local')}", local, "local"),
        Row(f"{place}{say_epsilon_of(report, 'pooled')}", report["pooled"], "pooled"),
        Row(f"{place}, unprotected", report.get("pooled_unprotected"), "pooled_unprotected"),
    ]
    if report["external"]:
        rows.append(Row("Federated, external cohort", report["external"], "federated"))
    return [row for row in rows if row.figures and row.figures.get(metric) is not None]


def _groups(report: Mapping[str, Any]) -> list[Group]:
    """Return the table of figures: each site, their mean, all sites together, the external cohort."""
    kind = kind_of(report)
    models = {model: name_model(report, model) for model in models_of(report)}
    groups = [
        Group(
            name,
            f"{_patients(site['federated'])}{kind.say_sizes(site['n_train'], site['n_test'])}",
            [
                Row(words, site[model], model, *([] if site["n_test"] else [UNTESTED]))
                for model, words in models.items()
            ],
        )
        for name, site in report["sites"].items()
    ]
    sites = list(report["sites"].values())
    if len(sites) > 1:
        means = [Row(words, _mean([site[model] for site in sites]), model) for model, words in models.items()]
        groups.append(Group("Mean of the sites", "each site counts the same", means))
    if report["federated"] or report["pooled"]:
        trained, tested = (sum(site[name] for site in sites) for name in ("n_train", "n_test"))
        note = f"{_patients(report['federated'])}{kind.say_sizes(trained, tested)}"
        groups.append(Group("All sites together", note, _everywhere(report), own_models(report, "local")))
    if report["external"]:
        note = f"{_patients(report['external'])}{count(report['external']['n_slides'], kind.tested)}"
        own = own_models(report, "local", external=True)
        rows = _everywhere(report, external=True)
        groups.append(Group("External cohort", f"{note}; seen by no model", rows, own))
    return groups


def _everywhere(report: Mapping[str, Any], *, external: bool = False) -> list[Row]:
    """Return each model on the patients of all sites or of the external cohort; of local models the mean."""
    rows = []
    for model in models_of(report):
        found = own_models(report, model, external=external)
        words = name_model(report, model)
        if model.startswith("local"):
            rows.append(Row(words.replace("local", "local, mean", 1), _mean(found), model))
        else:
            rows.append(Row(words, found[0] if found else None, model))
    return rows


def _bounds(report: Mapping[str, Any]) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Return (model, its name, its steps, what it was trained with) of the bounds, those that are known."""
    stated = report.get("bounds", {})
    return [
        (model, name_model(report, model), say_steps(stated[model]), stated[model])
        for model in models_of(report)
        if model in stated
    ]


def _bound_numbers(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what bounds were trained with, name → heading, of which at least one model has a number."""
    stated = report.get("bounds", {}).values()
    return {
        name: words
        for name, words in BOUND_NUMBERS.items()
        if any(each.get(name) is not None for each in stated)
    }


def _patients(figures: Mapping[str, Any] | None) -> str:
    return f"{count(figures['n_patients'], 'test patient')}, " if figures else ""


def _mean(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the mean of each figure over those that exist; no interval."""
    if not any(rows):
        return None
    metrics = [name for name in NAMES if any(row and name in row for row in rows)]
    means: dict[str, Any] = {metric: mean_of(rows, metric) for metric in metrics}
    missing = {f"{metric}_reason": "exists at no site" for metric in metrics if means[metric] is None}
    return means | missing


def _interval_chart(report: Mapping[str, Any], metric: str, name: str = "figures") -> Markup:
    groups = []
    for group in _groups(report):
        marks = []
        for model, row in zip(models_of(report), group.rows, strict=True):
            figures = row.figures or {}
            low, high = figures.get(f"{metric}_ci95") or (None, None)
            marks.append(Mark(model, figures.get(metric), low, high))
        each = [figures[metric] for figures in group.each if figures and figures[metric] is not None]
        note = group.note.partition(",")[0] if "patient" in group.note else ""
        groups.append(MarkGroup(group.label, note, marks, each))
    return draw_intervals(f"{name}-{metric}", title_of(metric), groups, chance_of(metric, report))


def _elsewhere(report: Mapping[str, Any]) -> list[Group]:
    """Return each site's own models, on its own patients, on all sites' and on the external cohort."""
    groups = []
    for model in (each for each in models_of(report) if each.startswith("local")):
        for name, everywhere in report[f"{model}_on_all_sites"].items():
            own = report["sites"].get(name, {}).get(model)
            rows = [Row("its own test patients", own), Row("all sites' test patients", everywhere)]
            if f"{model}/{name}" in report["external_other_models"]:
                rows.append(Row("external cohort", report["external_other_models"][f"{model}/{name}"]))
            end = ", unprotected" if model != "local" else ""
            groups.append(Group(f"Model of {name} alone{end}", "", rows))
    return groups


WHY_NOT_SAID = "not let out by the site, or does not exist there"


def _evaluated(report: Mapping[str, Any]) -> list[Row]:
    """Return what the sites themselves said of the model."""
    rows = []
    together = figures_together(report)
    is_noised = report.get("evaluation_noise") is not None
    told = {} if together is None else {"all sites together": together[1]}
    for name, said in {**told, **(report.get("evaluated_at_sites") or {})}.items():
        figures: dict[str, Any] = {"n_patients": said.get("n_patients"), "n_slides": said.get("n_slides")}
        for metric in (*kind_of(report).names, *kind_of(report).noised):
            figures[metric] = said.get(metric)
            ends = (said.get(f"{metric}_low"), said.get(f"{metric}_high"))
            if figures[metric] is None:
                figures[f"{metric}_reason"] = "drowned in noise" if is_noised else WHY_NOT_SAID
            elif None not in ends:
                figures[f"{metric}_ci95"] = ends
        rows.append(Row(name, figures))
    return rows


@dataclass(frozen=True)
class LineChart:
    """A metric round by round, and whose lines are in it, in their order."""

    title: str
    sites: Sequence[str]
    chart: Markup


def _validation_lines(report: Mapping[str, Any]) -> list[LineChart]:
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in report["participation"]:
        for site, metrics in (row.get("metrics") or {}).items():
            for name, value in metrics.items():
                if value is not None:
                    found.setdefault(name, {}).setdefault(site, []).append((row["round"], value))
    charts = []
    for index, (name, sites) in enumerate(sorted(found.items())):
        split, _, metric = name.rpartition("/")
        words = NAMES.get(metric, metric.replace("_", " "))
        title = f"{words[0].upper()}{words[1:]}" + (f" on {split} patients" if split else "")
        ordered = dict(sorted(sites.items()))
        charts.append(LineChart(title, list(ordered), draw_lines(f"line-{index}", title, ordered)))
    return charts


def _seconds_chart(report: Mapping[str, Any]) -> Markup | None:
    spent = report.get("seconds_per_site")
    return draw_seconds("seconds", spent) if spent else None


def _all_subgroups(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, Mapping[str, Any]]]:
    """Yield (column, group, patients, model, figures) of every subgroup in the report."""
    models = {model: name_model(report, model) for model in models_of(report)}
    sets = [
        (name, words, site[model])
        for name, site in report["sites"].items()
        for model, words in models.items()
    ]
    for model, words in models.items():
        if not model.startswith("local"):
            sets.append(("all sites", words, report[model]))
            continue
        own = report[f"{model}_on_all_sites"]
        sets += [("all sites", f"{words}, of {name}", figures) for name, figures in own.items()]
    sets.append(("external", "federated", report["external"]))
    for name, figures in report["external_other_models"].items():
        model, _, site = name.partition("/")
        words = models.get(model, model)
        sets.append(("external", f"{words}, of {site}" if site else words, figures))
    for cohort, model, figures in sets:
        for column, groups in ((figures or {}).get("subgroups") or {}).items():
            for group, inside in groups.items():
                yield column, group, cohort, model, inside


def _subgroups(report: Mapping[str, Any]) -> dict[str, list[Group]]:
    """Return column → one group of lines a subgroup, those with too few patients left out."""
    found: dict[str, dict[str, list[Row]]] = {}
    for column, group, cohort, model, inside in _all_subgroups(report):
        if not inside.get("suppressed"):
            row = Row(f"{cohort}: {model}", _flatten_metrics(inside))
            found.setdefault(column, {}).setdefault(group, []).append(row)
    return {
        column: [Group(f"{column.replace('_', ' ')} {group}", "", rows) for group, rows in groups.items()]
        for column, groups in found.items()
    }


def _flatten_metrics(inside: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {"n_patients": inside["n_patients"], "n_slides": inside["n_slides"]}
    for metric in (name for name in NAMES if name in inside):
        figure = inside[metric]
        figures[metric] = figure["value"]
        figures[f"{metric}_no_interval"] = figure.get("no_interval")
        if figure["value"] is None:
            figures[f"{metric}_reason"] = figure["reason"]
        elif figure["low"] is not None:
            figures[f"{metric}_ci95"] = (figure["low"], figure["high"])
    return figures


def _settings(report: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    run = {
        "job": report["job"],
        "runtime": RUNTIMES.get(report["runtime"], report["runtime"]),
        "rounds": report["rounds"],
        "seed": report["seed"],
        kind_of(report).model: report["encoder"],
        "SHA-256 of the model": report["model_sha256"],
    }
    run = {name: value for name, value in run.items() if value is not None}
    parts = {"Run": run, "Strategy": report["strategy"], "Task": report["task"]}
    if report["guarantee"].get("plan"):
        parts["Privacy plan"] = report["guarantee"]["plan"]
    if report.get("protocol"):
        parts["Protocol"] = report["protocol"]
    return {name: list(flatten(values)) for name, values in parts.items()}
