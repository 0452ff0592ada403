"""A report speaks of segmentation as it does of classification: its own figures, its own nouns."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from histoflare.bags.targets.class_tally import ClassTally
from histoflare.bags.targets.classes import Predictions
from histoflare.commands.run import show_summary
from histoflare.lab.summary import summarise
from histoflare.masks.dice_tally import DiceTally
from histoflare.masks.metrics import MaskPredictions
from histoflare.privacy.plan import Open, UpdateNoise
from histoflare.report.budgets import budget_entry
from histoflare.report.consortium import results_table
from histoflare.report.figures import CLASSIFICATION, KINDS, NAMES, SEGMENTATION, Kind, kind_of, title_of
from histoflare.report.guarantee_words import say_chance
from histoflare.report.headline import chance_of, write_headline
from histoflare.report.report_file import ALWAYS, PARTS
from histoflare.report.site_page import SitePage, write_site_page
from histoflare.rounds.comparison import Comparison, SiteComparison
from histoflare.rounds.evaluation import Figure
from tests.report.made import full_report, protected_report
from tests.report.made_masks import SITES, TASK, mask_metrics, segmentation_facts
from tests.report.parsed import Parsed, assert_loads_nothing, parse
from tests.report.test_page import written

QUIET = UpdateNoise(noise_multiplier=60.0)
NOBODY = Comparison({}, None, None, {}, {})


def segmentation_report(**changes: Any) -> dict[str, Any]:
    return full_report(**segmentation_facts() | changes)


def printed(table: Any, width: int = 80) -> str:
    into = io.StringIO()
    Console(file=into, width=width).print(table)
    return into.getvalue()


def charted(page: Parsed) -> list[str]:
    """The figures that have a chart, in the page's order."""
    found = (title.get("id", "") for title in page.named("title"))
    return [name.removeprefix("figures-").removesuffix("-title") for name in found if "figures-" in name]


def test_the_names_are_those_that_the_tasks_compute() -> None:
    assert list(CLASSIFICATION.names) == list(Predictions.measures)
    counts = np.ones((1, 2, 2), dtype=np.int64)
    made = MaskPredictions(["a", "b"], "a", {"confusion": counts}, ["p"], {}, ["i"])
    assert list(SEGMENTATION.names) == list(made.measures)
    assert list(SEGMENTATION.noised) == list(DiceTally((1,)).figures(np.ones(3), 0.0))
    assert list(CLASSIFICATION.names) == list(ClassTally(("a", "b")).figures(np.ones(24), 0.0))
    figures = sum(len(kind.names) + len(kind.noised) for kind in KINDS.values())
    assert len(NAMES) == figures, "no name stands for two figures"


@pytest.mark.parametrize("kind", KINDS.values())
def test_what_is_shown_exists(kind: Kind) -> None:
    assert {*kind.shown, *kind.charted, *kind.pair} <= set(kind.names)
    assert kind.main in kind.charted
    assert len(kind.charted) <= 3


def test_the_kind_of_a_report() -> None:
    assert kind_of({}) is CLASSIFICATION, "a report from before there were two"
    assert kind_of(full_report()) is CLASSIFICATION
    assert kind_of(segmentation_report()) is SEGMENTATION
    with pytest.raises(KeyError):
        kind_of({"data": "sounds"})
    assert (title_of("balanced_accuracy"), title_of("auc")) == ("Balanced accuracy", "AUC")
    assert CLASSIFICATION.say_sizes(9, 4) == "9 training and 4 test slides"
    assert SEGMENTATION.say_sizes(9, 4) == "9 training windows and 4 test images"


def test_a_segmentation_report_has_all_its_figures() -> None:
    report = segmentation_report()
    json.dumps(report, allow_nan=False)
    assert set(report) >= {*ALWAYS, *PARTS} - {"evaluated_model"}
    assert (report["data"], report["encoder"]) == ("images", "dhunet")
    sets = [report["federated"], report["pooled"], report["external"], report["sites"]["dsb-2"]["local"]]
    for figures in [*sets, report["local_on_all_sites"]["tnbc-1"]]:
        for name in SEGMENTATION.names:
            low, high = figures[f"{name}_ci95"]
            assert 0 <= low <= figures[name] <= high <= 1
        assert "auc" not in figures
        jaccard = figures["dice_pooled"] / (2 - figures["dice_pooled"])  # of one class; of the mean, a bound
        assert figures["jaccard_pooled"] >= jaccard
    assert full_report()["data"] == "bags"


def test_the_page_of_a_segmentation(tmp_path: Path) -> None:
    report = segmentation_report()
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    sets = [report["federated"], report["pooled"], report["external"]]
    sets += [site[model] for site in report["sites"].values() for model in ("local", "federated", "pooled")]
    sets += [*report["local_on_all_sites"].values(), *report["external_other_models"].values()]
    for figures in sets:
        for name in SEGMENTATION.shown:
            low, high = figures[f"{name}_ci95"]
            assert f"{figures[name]:.3f} {low:.2f}–{high:.2f}" in page.text
    for name in SEGMENTATION.shown:
        assert page.text.count(NAMES[name]) >= 3, "in each of the tables"
    assert charted(page) == list(SEGMENTATION.charted)
    assert "10 test patients, 410 training windows and 20 test images" in page.text
    assert "All images in one place" in page.text
    assert "Dice on validation patients" in page.text
    assert "network dhunet" in page.text
    for absent in ("slide", "guessing", "accuracy of", "AUC", "encoder"):
        assert absent not in page.text, absent


def test_the_headline_of_a_segmentation() -> None:
    report = segmentation_report()
    headline = write_headline(report)
    assert headline.metric == "dice"
    assert f"reaches a Dice of {report['federated']['dice']:.3f} (95 % interval" in headline.result
    assert "trained on all their images in one place" in headline.result
    assert any("all images in one place" in caution for caution in headline.cautions)
    assert not any("Guessing" in caution for caution in headline.cautions)
    assert chance_of("dice", report) is None
    said = " ".join([headline.verdict, headline.result, *headline.cautions])
    assert "slide" not in said


def test_another_agreed_figure_comes_first_even_where_tables_do_not_show_it(tmp_path: Path) -> None:
    report = segmentation_report(protocol={"metric": "jaccard_pooled", "sha256": "0"})
    page = written(report, tmp_path)
    assert f"reaches a pooled Jaccard of {report['federated']['jaccard_pooled']:.3f}" in page.text
    assert "model pooled Jaccard Dice Jaccard pooled Dice pixel accuracy authors' Dice" in page.text
    assert charted(page) == ["jaccard_pooled", "dice", "dice_pooled"]


def test_a_dice_that_does_not_exist_is_said(tmp_path: Path) -> None:
    why = "no class is in the truth or in the predictions"
    made = mask_metrics(0.7)
    missing = {name: Figure(None, reason=why) for name in made.figures if name != "pixel_accuracy"}
    report = segmentation_report(federated=replace(made, figures={**made.figures, **missing}))
    headline = write_headline(report)
    assert headline.metric == "pixel_accuracy"
    assert f"The agreed figure, Dice, does not exist here: {why}." in headline.cautions
    assert f"– {why}" in written(report, tmp_path).text


def test_dice_against_epsilon(tmp_path: Path) -> None:
    sites = {
        "a": SiteComparison(10, 5, mask_metrics(0.5, seed=1), mask_metrics(0.2, seed=2), None),
        "b": SiteComparison(10, 5, mask_metrics(0.6, seed=3), mask_metrics(0.3, seed=4), None),
    }
    found = replace(NOBODY, sites=sites, federated=mask_metrics(0.2))
    own = budget_entry(QUIET, 30, found, found, is_own=True, data="images")
    assert own["dice"] == mask_metrics(0.2)["dice"].value
    for model, key in (("federated", "site_mean"), ("local", "local_mean")):
        values = [getattr(site, model)["dice"].value for site in sites.values()]
        assert own[key] == pytest.approx(sum(values) / 2)
    untested = budget_entry(Open(), 30, NOBODY, NOBODY, data="images")
    assert untested["dice"] is None
    assert "balanced_accuracy" not in own | untested
    report = protected_report(QUIET, **segmentation_facts(), accuracy_against_epsilon=[own, untested])
    page = written(report, tmp_path)
    assert_loads_nothing(tmp_path / "report.html")
    low, high = own["dice_ci95"]
    assert f"this job 60 {own['dice']:.3f} {low:.2f}–{high:.2f}" in page.text
    assert "Dice against ε" in page.text
    assert "rounds and images in one process" in page.text
    assert "one patient (with all images) was in the training" in page.text
    assert f"the interval is {low:.2f} to {high:.2f}. What guessing gives cannot be said" in page.text
    assert not [line for line in page.named("line") if line["class"] == "chance"]
    assert "slide" not in page.text


def test_without_a_figure_for_guessing_the_interval_is_still_said() -> None:
    entry = {"epsilon": 8.0, "epsilon_is_infinite": False, "dice_ci95": [0.02, 0.1]}
    assert "ε = 8.0 the interval is 0.02 to 0.10. What guessing gives" in say_chance(entry, "dice", None)
    assert "there is no interval" in say_chance(entry, "jaccard", None)


def test_the_tables_for_the_terminal_fit_into_it() -> None:
    report = segmentation_report()
    shown = printed(results_table(report))
    figures = report["sites"]["tnbc-1"]["local"]
    assert f"{figures['dice']:.3f} · {figures['pixel_accuracy']:.3f}" in shown, "not wrapped"
    assert "Dice · pixels" in shown
    assert "test images" in shown
    assert "slide" not in shown
    summary = summarise([report, segmentation_report(federated=mask_metrics(0.6, 46))])
    everywhere = summary["cohorts"]["all sites"]["federated"]
    assert list(everywhere) == list(SEGMENTATION.names)
    shown = printed(show_summary(summary))
    for name in SEGMENTATION.charted:
        assert f"{everywhere[name]['mean']:.3f} ± {everywhere[name]['sd']:.3f}" in shown, "not wrapped"
        assert NAMES[name] in shown


def test_a_sites_own_page_counts_windows_and_images(tmp_path: Path) -> None:
    write_site_page(SitePage(SITES[0], segmentation_report(), [], [], []), tmp_path / "site.html")
    page = parse(tmp_path / "site.html")
    assert "410 training windows and 20 test images" in page.text
    assert "No image and no patch left a site" in page.text


def test_a_task_without_an_encoder_or_network_has_none() -> None:
    assert segmentation_report(task={"labels": TASK["labels"]})["encoder"] is None
    assert full_report()["encoder"] == "densenet121-random:v1"
