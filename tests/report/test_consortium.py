"""The consortium's report: its shape is a promise to scripts, and it names nobody."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console

from histoflare.commands.run import summarise
from histoflare.report.consortium import FIGURES, RunFacts, build_report, results_table
from histoflare.rounds.comparison import Comparison, SiteComparison
from histoflare.rounds.evaluation import Figure, Metrics

METRICS = Metrics(10, 8, Figure(0.8, 0.6, 0.9), Figure(0.75, 0.5, 0.9), Figure(0.9, 0.7, 1.0), {})
ONE_CLASS = replace(METRICS, auc=Figure(None, reason="all slides are of one class"))
FACTS = RunFacts(
    job="mem_fedavg",
    runtime="inprocess",
    strategy={"name": "fedavg"},
    task={"encoder": "densenet121-random:v1"},
    seed=1,
    rounds=2,
    participation=[["a", "b"], ["a"]],
    privacy="Updates leave as they are.",
    seconds={"federated rounds": 1.23456},
    model_sha256="0" * 64,
)


def comparison(external: bool = True) -> Comparison:
    site = SiteComparison(20, 10, METRICS, METRICS, METRICS)
    return Comparison(
        {"a": site, "b": replace(site, local=ONE_CLASS)},
        METRICS,
        METRICS,
        {"a": METRICS, "b": ONE_CLASS},
        {"federated": METRICS, "pooled": METRICS, "local/a": METRICS, "local/b": ONE_CLASS}
        if external
        else {},
    )


def test_the_shape_scripts_rely_on() -> None:
    report = build_report(FACTS, comparison())
    assert {"runtime", "strategy", "seed", "rounds", "sites", "pooled", "external"} <= set(report)
    for site in report["sites"].values():
        assert {"n_train", "n_test", "local", "federated"} <= set(site)
    for figures in (report["sites"]["a"]["local"], report["federated"], report["pooled"], report["external"]):
        assert set(FIGURES) <= set(figures)
        assert figures["accuracy"] == 0.8
        assert figures["accuracy_ci95"] == [0.6, 0.9]
    assert [site["rounds_taken_part"] for site in report["sites"].values()] == [2, 1]
    assert report["participation"][1] == {"round": 1, "taking_part": ["a"]}
    assert set(report["external_other_models"]) == {"pooled", "local/a", "local/b"}


def test_what_does_not_exist_is_null_with_its_reason() -> None:
    figures = build_report(FACTS, comparison())["sites"]["b"]["local"]
    assert figures["auc"] is None
    assert figures["auc_reason"] == "all slides are of one class"
    json.dumps(figures, allow_nan=False)


def test_the_table_shows_every_cohort_and_survives_missing_ones() -> None:
    for external in (True, False):
        written = io.StringIO()
        Console(file=written, width=120).print(results_table(build_report(FACTS, comparison(external))))
        text = written.getvalue()
        assert ("│ external" in text) == external
        assert "0.800 · 0.900" in text
        assert "0.800 · –" in text, "an AUC that does not exist is a dash"
        assert "Updates leave as they are." in " ".join(text.split())
        assert "Rounds taken part: a 2, b 1." in " ".join(text.split())


def test_full_participation_is_said_in_one_sentence() -> None:
    written = io.StringIO()
    facts = replace(FACTS, participation=[["a", "b"], ["a", "b"]])
    Console(file=written, width=120).print(results_table(build_report(facts, comparison())))
    assert "Every site took part in every round." in " ".join(written.getvalue().split())


def test_a_site_that_cannot_be_tested_is_a_dash() -> None:
    made = comparison()
    untested = SiteComparison(20, 0, None, None, None)
    report = build_report(FACTS, replace(made, sites={**made.sites, "c": untested}))
    assert report["sites"]["c"]["federated"] is None
    written = io.StringIO()
    Console(file=written, width=120).print(results_table(report))
    assert "20 / 0" in written.getvalue()
    assert summarise([report])["cohorts"]["each site"]["federated"]["accuracy"]["mean"] == 0.8
