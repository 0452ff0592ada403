"""The consortium's report: figures only. No pixels, no paths, no names of slides or patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from histoflare.rounds.comparison import Comparison
from histoflare.rounds.evaluation import Figure, Metrics

FIGURES = ("accuracy", "balanced_accuracy", "auc")


@dataclass(frozen=True)
class RunFacts:
    """What was run.

    Attributes:
        job: Name of the job. runtime: ``"simulator"`` or ``"inprocess"``.
        strategy: Its name and arguments. task: The task's arguments.
        participation: One row per round: whose updates were combined.
        privacy: One sentence on what protected the updates.
        seconds: Phase → seconds.
        model_sha256: Of the last global state (names, shapes, dtypes, bytes).
    """

    job: str
    runtime: str
    strategy: Mapping[str, Any]
    task: Mapping[str, Any]
    seed: int
    rounds: int
    participation: Sequence[Sequence[str]]
    privacy: str
    seconds: Mapping[str, float]
    model_sha256: str


def build_report(facts: RunFacts, comparison: Comparison) -> dict[str, Any]:
    """Return the report as plain JSON.

    Each set of figures has ``accuracy``, ``balanced_accuracy`` and ``auc`` (a number, or null where it does
    not exist), each with ``<figure>_ci95`` (low, high: bootstrap over patients) or ``<figure>_reason``.
    """
    external = dict(comparison.external)
    return {
        "job": facts.job,
        "runtime": facts.runtime,
        "strategy": dict(facts.strategy),
        "task": dict(facts.task),
        "encoder": facts.task.get("encoder"),
        "seed": facts.seed,
        "rounds": facts.rounds,
        "privacy": facts.privacy,
        "participation": [
            {"round": index, "taking_part": list(sites)} for index, sites in enumerate(facts.participation)
        ],
        "sites": {
            name: {
                "rounds_taken_part": sum(name in taking_part for taking_part in facts.participation),
                "n_train": site.n_train,
                "n_test": site.n_test,
                "local": _flat(site.local),
                "federated": _flat(site.federated),
                "pooled": _flat(site.pooled),
            }
            for name, site in comparison.sites.items()
        },
        "federated": _flat(comparison.federated),
        "pooled": _flat(comparison.pooled),
        "local_on_all_sites": {name: _flat(metrics) for name, metrics in comparison.local.items()},
        "external": _flat(external.pop("federated", None)),
        "external_other_models": {name: _flat(metrics) for name, metrics in external.items()},
        "seconds": {phase: round(seconds, 3) for phase, seconds in facts.seconds.items()},
        "model_sha256": facts.model_sha256,
    }


def results_table(report: Mapping[str, Any]) -> Table:
    """Return the report's figures as a table: per cohort, the local, federated and pooled model."""
    table = Table(
        title=f"{report['job']}: {report['rounds']} rounds, {report['runtime']}, seed {report['seed']}"
    )
    table.add_column("cohort")
    table.add_column("train / test\nslides", justify="right")
    for model in ("local", "federated", "pooled"):
        table.add_column(f"{model}\nacc · AUC", justify="right")
    for name, site in report["sites"].items():
        table.add_row(
            name,
            f"{site['n_train']} / {site['n_test']}",
            *(_cell(site[model]) for model in ("local", "federated", "pooled")),
        )
    table.add_section()
    sites = list(report["sites"].values())
    models = ("local", "federated", "pooled")
    table.add_row("mean of sites", "", *(_mean([site[model] for site in sites]) for model in models))
    slides = f"{sum(site['n_train'] for site in sites)} / {sum(site['n_test'] for site in sites)}"
    elsewhere = _mean(list(report["local_on_all_sites"].values()))
    table.add_row("all sites", slides, elsewhere, _cell(report["federated"]), _cell(report["pooled"]))
    if report["external"]:
        others = report["external_other_models"]
        local = [figures for name, figures in others.items() if name.startswith("local/")]
        slides = f"– / {report['external']['n_slides']}"
        table.add_row(
            "external", slides, _mean(local), _cell(report["external"]), _cell(others.get("pooled"))
        )
    table.caption = (
        "A site's local model is its own, tested on its own patients; in the last rows local is the mean of "
        f"the sites' models, each tested on all sites' or the external patients. {_rounds(report)} "
        f"{report['privacy']}"
    )
    return table


def _rounds(report: Mapping[str, Any]) -> str:
    """Return who took part how often: a run over some of the sites is never shown as one over all."""
    taken = {name: site["rounds_taken_part"] for name, site in report["sites"].items()}
    if set(taken.values()) == {report["rounds"]}:
        return "Every site took part in every round."
    return "Rounds taken part: " + ", ".join(f"{name} {rounds}" for name, rounds in taken.items()) + "."


def _flat(metrics: Metrics | None) -> dict[str, Any] | None:
    if metrics is None:
        return None
    flat: dict[str, Any] = {"n_slides": metrics.n_slides, "n_patients": metrics.n_patients}
    for name in FIGURES:
        figure: Figure = getattr(metrics, name)
        flat[name] = figure.value
        if figure.value is None:
            flat[f"{name}_reason"] = figure.reason
        else:
            flat[f"{name}_ci95"] = None if figure.low is None else [figure.low, figure.high]
    groups = metrics.to_json().get("subgroups")
    return flat | ({"subgroups": groups} if groups else {})


def _mean(figures: Sequence[Mapping[str, Any] | None]) -> str:
    values = []
    for name in ("accuracy", "auc"):
        known = [row[name] for row in figures if row is not None and row[name] is not None]
        values.append(_number(sum(known) / len(known) if known else None))
    return " · ".join(values)


def _cell(figures: Mapping[str, Any] | None) -> str:
    return "–" if not figures else f"{_number(figures['accuracy'])} · {_number(figures['auc'])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
