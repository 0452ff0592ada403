"""Several runs of one job, each with another seed: means and standard deviations."""

from __future__ import annotations

import statistics
from typing import Any

from histoflare.report.bounds import models_of
from histoflare.report.consortium import own_models, say_missing
from histoflare.report.figures import kind_of
from histoflare.report.participation import finished_rounds


def summarise(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds' reports, per cohort, model and figure.

    ``rounds`` were planned; ``rounds_run`` were brought to their end, seed by seed.

    ``data`` is the kind of task, as in the reports. ``missing`` says which figures do not exist, and why.

    ``each site``: the mean over the sites, each model on that site's test patients. ``all sites``: on the
    test patients of all sites together; there, and on the external cohort, ``local`` is the mean over the
    sites' own models.
    """
    kind, models = kind_of(reports[0]), models_of(reports[0])
    missing = {sentence: None for report in reports for sentence in say_missing(report)}
    cohorts: dict[str, list[dict[str, Any]]] = {
        "each site": [
            {model: [site[model] for site in report["sites"].values()] for model in models}
            for report in reports
        ],
        "all sites": [{model: own_models(report, model) for model in models} for report in reports],
    }
    if all(report["external"] for report in reports):
        cohorts["external"] = [
            {model: own_models(report, model, external=True) for model in models} for report in reports
        ]
    return {
        "seeds": [report["seed"] for report in reports],
        "rounds": reports[0]["rounds"],
        "rounds_run": [finished_rounds(report) for report in reports],
        "job": reports[0]["job"],
        "data": kind.data,
        "missing": list(missing),
        "cohorts": {
            cohort: {
                model: {figure: _spread([row[model] for row in rows], figure) for figure in kind.names}
                for model in models
            }
            for cohort, rows in cohorts.items()
        },
    }


def _spread(rows: list[list[dict[str, Any]]], figure: str) -> dict[str, float | None]:
    """Return mean and standard deviation over seeds; each seed's value is the mean over its models."""
    known = [[row[figure] for row in seed if row and row[figure] is not None] for seed in rows]
    values = [statistics.fmean(seed) for seed in known if seed]
    if not values:
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
