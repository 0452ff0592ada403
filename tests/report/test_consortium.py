"""The consortium's report: its shape is a promise to scripts, and it names nobody."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console

from histoflare.commands.run import show_summary
from histoflare.lab.summary import summarise
from histoflare.privacy.budget import Budget
from histoflare.privacy.plan import DpSgd, UpdateNoise
from histoflare.report.consortium import RunFacts, build_report, results_table
from histoflare.report.figures import CLASSIFICATION
from histoflare.report.guarantee import state_epsilon
from histoflare.report.guarantee_words import say_epsilon
from histoflare.report.report_file import ALWAYS, PARTS
from histoflare.rounds.comparison import Comparison, SiteComparison
from histoflare.rounds.evaluation import Figure, Metrics
from tests.refusals import raises_reason
from tests.report.made import full_report, row

FIGURES = {
    "accuracy": Figure(0.8, 0.6, 0.9),
    "balanced_accuracy": Figure(0.75, 0.5, 0.9),
    "auc": Figure(0.9, 0.7, 1.0),
}
METRICS = Metrics(10, 8, FIGURES, {})
ONE_CLASS = replace(METRICS, figures=FIGURES | {"auc": Figure(None, reason="all slides are of one class")})
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


def test_what_a_strategy_says_of_sites_is_under_their_pseudonyms() -> None:
    row = {"round": 0, "asked": ["a", "b"], "taking_part": ["a", "b"], "refused": {}, "no_answer": []}
    row |= {"rejected": {"b": "UPDATES_INVALID"}, "contribution": {"a": 1.0, "b": 0.0}}
    report = build_report(replace(FACTS, participation=[row], pseudonyms={"b": "north"}), comparison())
    assert report["participation"][0]["rejected"] == {"north": "UPDATES_INVALID"}
    assert report["participation"][0]["contribution"] == {"a": 1.0, "north": 0.0}


def test_attempts_at_a_sum_that_did_not_open_are_in_the_report_and_paid_for() -> None:
    plan = DpSgd(noise="shared", honest=2, noise_multiplier=4.0, delta=1e-4)
    row = {"round": 0, "asked": ["a", "b"], "taking_part": ["a", "b"], "refused": {}, "no_answer": []}
    voids = [{"sites": ["a", "b"], "no_answer": ["b"], "refused": {"b": "STOPPED"}}]
    facts = replace(FACTS, mechanism=plan.mechanism, plan=plan.to_json(), spend=plan.spend().to_json())
    facts = replace(facts, participation=[row | {"voids": voids}], pseudonyms={"b": "north"})
    report = build_report(facts, comparison())
    (kept,) = report["participation"]
    assert kept["voids"] == [
        {"sites": ["a", "north"], "no_answer": ["north"], "refused": {"north": "STOPPED"}}
    ]
    assert report["guarantee"]["sites"]["a"]["updates"] == 2


def test_the_shape_scripts_rely_on() -> None:
    report = build_report(FACTS, comparison())
    assert {"runtime", "strategy", "seed", "rounds", "sites", "pooled", "external"} <= set(report)
    for site in report["sites"].values():
        assert {"n_train", "n_test", "local", "federated"} <= set(site)
    for figures in (report["sites"]["a"]["local"], report["federated"], report["pooled"], report["external"]):
        assert set(CLASSIFICATION.names) <= set(figures)
        assert figures["accuracy"] == 0.8
        assert figures["accuracy_ci95"] == [0.6, 0.9]
    assert [site["rounds_taken_part"] for site in report["sites"].values()] == [2, 1]
    assert report["participation"][1] == {
        "round": 1,
        "asked": ["a"],
        "taking_part": ["a"],
        "refused": {},
        "no_answer": [],
    }
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
        assert "0.750 · 0.900" in text
        assert "0.750 · –" in text, "an AUC that does not exist is a dash"
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


RECORDED = [
    {
        "round": index,
        "sites": ["a", "b", "training"],
        "asked": ["a", "b", "training"],
        "taking_part": ["a"],
        "refused": {"b": "TOO_FEW_PATIENTS"},
        "no_answer": ["training"],
        "seconds": {site: {"training": 1.5, "waiting": 0.25, "idle": 0.125} for site in ("a", "b")},
        "bytes_up": 100,
        "bytes_down": 300,
        "metrics": {"a": {"validation/auc": 0.5}},
    }
    for index in range(2)
]


def test_what_the_server_recorded_is_added_up() -> None:
    report = build_report(replace(FACTS, participation=RECORDED), comparison())
    assert report["participation"][0]["refused"] == {"b": "TOO_FEW_PATIENTS"}
    assert report["participation"][1]["no_answer"] == ["training"]
    assert (report["bytes_up"], report["bytes_down"]) == (200, 600)
    assert report["seconds_per_site"]["b"] == {"training": 3.0, "waiting": 0.5, "idle": 0.25}
    assert report["sites"]["b"]["rounds_taken_part"] == 0


def test_bytes_nobody_counted_are_null_and_not_zero() -> None:
    assert build_report(FACTS, comparison())["bytes_up"] is None
    assert build_report(replace(FACTS, bytes_up=7), comparison())["bytes_up"] == 7


def test_pseudonyms_stand_everywhere_a_name_stood() -> None:
    made = comparison()
    grouped = replace(METRICS, subgroups={"site": {"b": METRICS}})
    made = replace(made, federated=grouped)
    facts = replace(
        FACTS,
        participation=RECORDED,
        strategy={"name": "fedavg", "weights": {"a": 0.5, "b": 0.5}},
        evaluated_at_sites={"b": {"auc": 0.5}},
        evaluation_refused={"training": "EVALUATION_ONLY"},
        pseudonyms={"b": "north", "training": "south"},
    )
    report = build_report(facts, made)
    assert set(report["sites"]) == {"a", "north"}
    assert report["strategy"]["weights"] == {"a": 0.5, "north": 0.5}
    assert report["participation"][0]["refused"] == {"north": "TOO_FEW_PATIENTS"}
    assert report["participation"][0]["no_answer"] == ["south"]
    assert report["seconds_per_site"]["north"]["training"] == 3.0, "a site's name is no phase's"
    assert set(report["external_other_models"]) == {"pooled", "local/a", "local/north"}
    assert set(report["local_on_all_sites"]) == {"a", "north"}
    assert list(report["federated"]["subgroups"]["site"]) == ["north"]
    assert report["evaluated_at_sites"] == {"north": {"auc": 0.5}}
    assert report["evaluation_refused"] == {"south": "EVALUATION_ONLY"}
    assert '"b"' not in json.dumps(report)


def test_two_sites_of_one_pseudonym_stay_two() -> None:
    facts = replace(FACTS, pseudonyms={"a": "north", "b": "north"})
    assert set(build_report(facts, comparison())["sites"]) == {"north", "north (2)"}
    facts = replace(FACTS, pseudonyms={"a": "b"})
    report = build_report(facts, comparison())
    assert set(report["sites"]) == {"b", "b (2)"}
    assert report["sites"]["b"]["rounds_taken_part"] == 1, "b keeps its own name"


def test_the_table_says_what_the_run_cost() -> None:
    plan = UpdateNoise(noise_multiplier=60.0, published_epsilon=1.0)

    def shown(plan: UpdateNoise, colours: bool = False) -> str:
        facts = replace(
            FACTS,
            mechanism=plan.mechanism,
            plan=plan.to_json(),
            spend=plan.spend().to_json(),
            pseudonyms={"b": "[bold]b"},
        )
        report = build_report(facts, comparison())
        written = io.StringIO()
        Console(file=written, width=120, force_terminal=colours).print(results_table(report))
        return " ".join(written.getvalue().split())

    true = say_epsilon(state_epsilon(Budget(8.0, plan.delta).spent([plan.spend().times(2)])))
    assert f"This job spends ε = {true} of 8 for each patient, at δ = 1e-5" in shown(plan)
    assert "states ε = 1; what a patient of a site spends" in shown(plan)
    assert shown(plan).count("[bold]b") == 2, "a name is no markup"
    seeded = replace(plan, noise_seed=1)
    assert "There is no guarantee" in shown(seeded)
    assert "\x1b[1;31m" in shown(seeded, colours=True)
    assert "\x1b[1;31m" not in shown(plan, colours=True)


def test_a_report_always_has_a_guarantee() -> None:
    assert set(build_report(FACTS, comparison())) >= {*ALWAYS, *PARTS} - {"evaluated_model"}
    assert build_report(FACTS, comparison())["guarantee"]["epsilon_is_infinite"] is True
    with raises_reason("PRIVACY_INVALID", "dp-sgd"):
        build_report(replace(FACTS, mechanism="dp-sgd"), comparison())


def test_the_table_says_how_many_rounds_ran() -> None:
    rows = [row(index, ["a"]) for index in range(3)]
    stopped = full_report(participation=rows, rounds=30)
    assert "3 of 30 rounds" in str(results_table(stopped).title)
    assert ": 3 rounds," in str(results_table(full_report(participation=rows, rounds=3)).title)
    summary = summarise([stopped | {"job": "j"}])
    assert summary["rounds_run"] == [3]
    assert "3 of 30 rounds" in str(show_summary(summary).title)
