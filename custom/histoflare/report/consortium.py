"""The consortium's report: figures only. No pixels, no paths, no names of slides or patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from histoflare.report.bounds import name_model
from histoflare.report.charts import MODELS, UNPROTECTED
from histoflare.report.figures import CLASSIFICATION, Kind, kind_of
from histoflare.report.guarantee import build_guarantee
from histoflare.report.headline import closing_words
from histoflare.report.participation import finished_rounds, say_rounds, site_rounds
from histoflare.report.report_file import FORMAT
from histoflare.report.served import GLOBAL, say_served
from histoflare.report.site_names import SiteNames
from histoflare.rounds.comparison import Comparison
from histoflare.rounds.evaluation import Metrics

PHASES = ("training", "waiting", "idle")
"""Of a site in a round: its task sent until its reply; until the last reply; the rest of the round."""


@dataclass(frozen=True)
class RunFacts:
    """What was run.

    Attributes:
        job: Name of the job. runtime: ``"poc"``, ``"simulator"`` or ``"inprocess"``.
        strategy: Its name and arguments. task: The task's arguments.
        participation: One row per round. Either whose updates were combined, or what the server recorded:
            ``round, sites, asked, taking_part, refused {site: code}, no_answer, absent, seconds {site:
            {training, waiting, idle}}, bytes_up, bytes_down, metrics {site: {…}}, stamps {site: {scope,
            mechanism, spend, seeded_noise, trusts_ca}}``, ``voids [{sites, refused}]`` for attempts at a sum
            that did not open, and ``finished: false`` for a round that was broken off.
        privacy: One sentence on what protected the updates.
        seconds: Phase → seconds.
        model_sha256: Of the last global state (names, shapes, dtypes, bytes).
        mechanism: What protected the updates; ``"open"``: nothing did, ε = ∞.
        numbers: How many random numbers the job's noise takes at a site (``PrivacyPlan.numbers``); None if
            that is not known, and then the sampler's part of δ is not said.
        plan, spend: The job's settled privacy plan and its event of one round, as JSON. They may be None
            where ``mechanism`` is ``"open"``.
        spare_rounds: For how many rounds beside the job's own the sites reserved.
        accuracy_against_epsilon: The same job at other budgets
            (:func:`histoflare.report.budgets.budget_entry`); empty where it was not run at others.
        protocol: The protocol as agreed, with its ``sha256``; None where there is none.
        evaluated_at_sites: Site → the metrics that the site itself computed of the model and let out.
        evaluation_refused: Site → fixed reason code it answered instead.
        evaluation_noise: What an evaluation under a budget cost, and its figures of all sites together
            (:func:`histoflare.report.evaluation_noise.state_evaluation`); None: its figures have no noise.
        pseudonyms: Site's FLARE name → the name the report may use. Sites not in it keep their own.
        bytes_up, bytes_down: Of tensors, where the rows of ``participation`` do not say.
        data: Of the task: ``"bags"`` or ``"images"``.
        bounds: Model → what it was trained with (:func:`histoflare.report.bounds.state_bounds`).
    """

    job: str
    runtime: str
    strategy: Mapping[str, Any]
    task: Mapping[str, Any]
    seed: int
    rounds: int
    participation: Sequence[Sequence[str] | Mapping[str, Any]]
    privacy: str
    seconds: Mapping[str, float]
    model_sha256: str
    mechanism: str = "open"
    plan: Mapping[str, Any] | None = None
    spend: Mapping[str, Any] | None = None
    numbers: int | None = None
    spare_rounds: int = 0
    accuracy_against_epsilon: Sequence[Mapping[str, Any]] = ()
    protocol: Mapping[str, Any] | None = None
    evaluated_at_sites: Mapping[str, Mapping[str, float | None]] | None = None
    evaluation_refused: Mapping[str, str] = field(default_factory=dict)
    evaluation_noise: Mapping[str, Any] | None = None
    pseudonyms: Mapping[str, str] = field(default_factory=dict)
    bytes_up: int | None = None
    bytes_down: int | None = None
    data: str = CLASSIFICATION.data
    bounds: Mapping[str, Any] = field(default_factory=dict)


def build_report(facts: RunFacts, comparison: Comparison) -> dict[str, Any]:
    """Return the report as plain JSON.

    Each set of figures has those of ``report.figures.kind_of(report).names`` (a number, or null where it
    does not exist), each with ``<figure>_ci95`` (low, high: bootstrap over patients, see
    :mod:`histoflare.rounds.evaluation`; or null, and ``<figure>_no_interval`` why) or ``<figure>_reason``.
    Sites appear under their pseudonyms, wherever their name stands. ``guarantee`` is what
    :func:`histoflare.report.guarantee.build_guarantee` returns.
    """
    rows = [_row(index, row, facts.runtime) for index, row in enumerate(facts.participation)]
    names = SiteNames.of(_named_sites(facts, comparison, rows), facts.pseudonyms)
    external = dict(comparison.external)
    sites = {
        name: {
            "rounds_taken_part": sum(name in row["taking_part"] for row in rows),
            "n_train": site.n_train,
            "n_test": site.n_test,
            "local": flatten_metrics(site.local),
            "federated": flatten_metrics(site.federated),
            "pooled": flatten_metrics(site.pooled),
            **({GLOBAL: flatten_metrics(site.shared)} if site.shared else {}),
            **(
                {
                    "local_unprotected": flatten_metrics(site.local_unprotected),
                    "pooled_unprotected": flatten_metrics(site.pooled_unprotected),
                }
                if comparison.pooled_unprotected
                else {}
            ),
        }
        for name, site in comparison.sites.items()
    }
    guarantee = build_guarantee(
        facts.mechanism,
        facts.plan,
        facts.spend,
        facts.rounds,
        rows,
        site_rounds({"sites": comparison.sites, "participation": rows}),
        evaluations=0 if facts.evaluation_noise else len(facts.evaluated_at_sites or {}),
        numbers=facts.numbers,
        spare_rounds=facts.spare_rounds,
    )
    return {
        "format": FORMAT,
        "job": facts.job,
        "runtime": facts.runtime,
        "strategy": names.apply_each(facts.strategy),
        "task": dict(facts.task),
        "data": facts.data,
        "encoder": facts.task.get("encoder", facts.task.get("network")),
        "protocol": None if facts.protocol is None else dict(facts.protocol),
        "seed": facts.seed,
        "rounds": facts.rounds,
        "privacy": facts.privacy,
        "privacy_mechanism": facts.mechanism,
        "guarantee": guarantee | ({"sites": names.apply(guarantee["sites"])} if "sites" in guarantee else {}),
        "accuracy_against_epsilon": [dict(entry) for entry in facts.accuracy_against_epsilon],
        "participation": [names.apply_each(row) for row in rows],
        "sites": {names.of_site(name): names.apply_values(site) for name, site in sites.items()},
        "federated": names.apply_values(flatten_metrics(comparison.federated)),
        "pooled": names.apply_values(flatten_metrics(comparison.pooled)),
        "local_on_all_sites": {
            names.of_site(name): names.apply_values(flatten_metrics(metrics))
            for name, metrics in comparison.local.items()
        },
        **(
            {
                "pooled_unprotected": names.apply_values(flatten_metrics(comparison.pooled_unprotected)),
                "local_unprotected_on_all_sites": {
                    names.of_site(name): names.apply_values(flatten_metrics(metrics))
                    for name, metrics in comparison.local_unprotected.items()
                },
            }
            if comparison.pooled_unprotected
            else {}
        ),
        "bounds": {model: dict(stated) for model, stated in facts.bounds.items()},
        "external": names.apply_values(flatten_metrics(external.pop("federated", None))),
        "external_other_models": {
            names.of_model(name): names.apply_values(flatten_metrics(metrics))
            for name, metrics in external.items()
        },
        "evaluated_at_sites": None
        if facts.evaluated_at_sites is None
        else {names.of_site(name): dict(metrics) for name, metrics in facts.evaluated_at_sites.items()},
        "evaluation_refused": names.apply(dict(facts.evaluation_refused)),
        "evaluation_noise": _name_together(facts.evaluation_noise, names),
        "bytes_up": _total(rows, "bytes_up", facts.bytes_up),
        "bytes_down": _total(rows, "bytes_down", facts.bytes_down),
        "seconds": {phase: round(seconds, 3) for phase, seconds in facts.seconds.items()},
        "seconds_per_site": names.apply(_seconds_per_site(rows)),
        "model_sha256": facts.model_sha256,
    }


def _name_together(found: Mapping[str, Any] | None, names: SiteNames) -> dict[str, Any] | None:
    """Return what is said of an evaluation's noise, with the sites under the names that the report uses."""
    if found is None or found["together"] is None:
        return None if found is None else dict(found)
    together = found["together"]
    sites = [names.of_site(site) for site in together["sites"]]
    return {**found, "together": {**together, "sites": sites}}


def _row(index: int, row: Sequence[str] | Mapping[str, Any], runtime: str) -> dict[str, Any]:
    """Return a round's row in one form; what is not known of it is null. A bare list names no refusals."""
    if not isinstance(row, Mapping):
        asked = list(row) if runtime == "inprocess" else None
        return {"round": index, "asked": asked, "taking_part": list(row), "refused": {}, "no_answer": []}
    optional = (
        "sites",
        "absent",
        "seconds",
        "bytes_up",
        "bytes_down",
        "metrics",
        "stamps",
        "voids",
        "unix_time",
        "given_up",
        "validation",
        "stopped",
        "rejected",
        "contribution",
        "numbers",
    )
    known = {name: row[name] for name in optional if name in row}
    return {
        "round": row.get("round", index),
        "asked": None if row.get("asked") is None else list(row["asked"]),
        "taking_part": list(row.get("taking_part", [])),
        "refused": dict(row.get("refused", {})),
        "no_answer": list(row.get("no_answer", [])),
        **({} if row.get("finished", True) else {"finished": False}),
        **known,
    }


def _total(rows: Sequence[Mapping[str, Any]], name: str, otherwise: int | None) -> int | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) if known else otherwise


def _seconds_per_site(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, dict[str, float]] = {}
    for row in rows:
        for site, spent in (row.get("seconds") or {}).items():
            mine = total.setdefault(site, dict.fromkeys(PHASES, 0.0))
            for phase in PHASES:
                mine[phase] += spent.get(phase) or 0.0
    return {
        site: {phase: round(seconds, 3) for phase, seconds in spent.items()} for site, spent in total.items()
    }


def _named_sites(facts: RunFacts, comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the FLARE name of every site that the report speaks of."""
    sites = set(comparison.sites) | set(comparison.local) | set(facts.pseudonyms)
    sites |= set(facts.evaluated_at_sites or {}) | set(facts.evaluation_refused)
    for row in rows:
        sites |= {*row["taking_part"], *row["refused"], *row["no_answer"], *(row["asked"] or [])}
        sites |= set(row.get("sites") or [])
        sites |= {*(row.get("seconds") or {}), *(row.get("stamps") or {})}
    return sites


def results_table(report: Mapping[str, Any]) -> Table:
    """Return the report's figures as a table: per cohort, the local, federated and pooled model.

    Below it stand the bounds without noise, beside a protected run.
    """
    kind, models = kind_of(report), MODELS
    table = Table(title=f"{report['job']}: {say_rounds(report)}, {report['runtime']}, seed {report['seed']}")
    table.add_column("cohort")
    table.add_column(_sizes_heading(kind), justify="right")
    for model in models:
        table.add_column(_heading(report, model, kind), justify="right")
    for name, site in report["sites"].items():
        sizes = f"{site['n_train']} / {site['n_test']}"
        table.add_row(escape(name), sizes, *(_cell(site[model], kind) for model in models))
    table.add_section()
    sites = list(report["sites"].values())
    table.add_row("mean of sites", "", *(_mean([site[model] for site in sites], kind) for model in models))
    sizes = f"{sum(site['n_train'] for site in sites)} / {sum(site['n_test'] for site in sites)}"
    table.add_row("all sites", sizes, *(_mean(own_models(report, model), kind) for model in models))
    if report["external"]:
        sizes = f"– / {report['external']['n_slides']}"
        cells = (_mean(own_models(report, model, external=True), kind) for model in models)
        table.add_row("external", sizes, *cells)
    table.caption = Text(
        "A site's local model is its own, tested on its own patients; in the last rows local is the mean of "
        f"the sites' models, each tested on all sites' or the external patients. {_rounds(report)} "
        f"{report['privacy']}"
    )
    table.caption.append("".join(f" {sentence}" for sentence in [*say_served(report), *say_missing(report)]))
    void = report["guarantee"].get("seeded_noise", False)
    if words := closing_words([report]):
        table.caption.append(f" {words}", style="bold red" if void else "")
    if note := report["guarantee"].get("published_note"):
        table.caption.append(f" {note}")
    if report.get("pooled_unprotected"):
        free = (f"{name_model(report, each)} {_mean(own_models(report, each), kind)}" for each in UNPROTECTED)
        table.caption.append(f" On all sites' patients, with the same clip and no noise: {'; '.join(free)}.")
    return table


def own_models(
    report: Mapping[str, Any], model: str, *, external: bool = False
) -> list[Mapping[str, Any] | None]:
    """Return a model's figures on the test patients of all sites, or on the external cohort.

    One set; of local models one for each site's own.
    """
    if external:
        others = report["external_other_models"]
        if model == "federated":
            return [report["external"]]
        return [each for name, each in others.items() if name.partition("/")[0] == model]
    if model.startswith("local"):
        return list(report.get(f"{model}_on_all_sites", {}).values())
    return [report.get(model)]


def _heading(report: Mapping[str, Any], model: str, kind: Kind) -> str:
    """Return a column's heading, the model's ε in a line of its own."""
    name = name_model(report, model).replace(" (", "\n").replace(")", "")
    return f"{name}\n{kind.pair_heading}"


def say_missing(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each figure that does not exist for some test patients: whose, and why."""
    kind = kind_of(report)
    cohorts = {name: site["federated"] for name, site in report["sites"].items()}
    cohorts |= {"all sites": report["federated"]}
    cohorts |= {"external": report["external"]} if report["external"] else {}
    found: dict[tuple[str, str], list[str]] = {}
    for name, figures in cohorts.items():
        if figures is None:
            found.setdefault(("figures", "there are no test patients"), []).append(name)
            continue
        for figure in kind.names:
            if figures[figure] is None:
                reason = str(figures.get(f"{figure}_reason"))
                found.setdefault((kind.names[figure], reason), []).append(name)
    return [f"No {what} for {', '.join(names)}: {why}." for (what, why), names in found.items()]


def _rounds(report: Mapping[str, Any]) -> str:
    """Return who took part how often: a run over some of the sites is never shown as one over all."""
    taken = {name: site["rounds_taken_part"] for name, site in report["sites"].items()}
    if set(taken.values()) == {finished_rounds(report)}:
        return "Every site took part in every round."
    return "Rounds taken part: " + ", ".join(f"{name} {rounds}" for name, rounds in taken.items()) + "."


def flatten_metrics(metrics: Metrics | None) -> dict[str, Any] | None:
    """Return a set of figures as :func:`build_report` says."""
    if metrics is None:
        return None
    flat: dict[str, Any] = {"n_slides": metrics.n_slides, "n_patients": metrics.n_patients}
    for name, figure in metrics.figures.items():
        flat[name] = figure.value
        if figure.value is None:
            flat[f"{name}_reason"] = figure.reason
        else:
            flat[f"{name}_ci95"] = None if figure.low is None else [figure.low, figure.high]
            if figure.no_interval is not None:
                flat[f"{name}_no_interval"] = figure.no_interval
    groups = metrics.to_json().get("subgroups")
    return flat | ({"subgroups": groups} if groups else {})


def _sizes_heading(kind: Kind) -> str:
    if kind.trained == kind.tested:
        return f"train / test\n{kind.tested}s"
    return f"{kind.trained}s /\ntest {kind.tested}s"


def _mean(figures: Sequence[Mapping[str, Any] | None], kind: Kind) -> str:
    values = []
    for name in kind.pair:
        known = [row[name] for row in figures if row is not None and row[name] is not None]
        values.append(_number(sum(known) / len(known) if known else None))
    return " · ".join(values)


def _cell(figures: Mapping[str, Any] | None, kind: Kind) -> str:
    return " · ".join(_number(figures[name]) for name in kind.pair) if figures else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
