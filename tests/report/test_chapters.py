"""The report in two chapters: what its first sentences claim follows from paired intervals alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from histoflare.privacy.plan import DpSgd
from histoflare.report.chapters import join_chapters, say_cost, say_gain, write_chapters
from histoflare.report.headline import write_headline
from histoflare.report.page import write_page

from .made import full_report, protected_report
from .parsed import parse

METRIC = "balanced_accuracy"


def of(value: float, low: float, high: float) -> dict[str, Any]:
    return {METRIC: value, f"{METRIC}_ci95": [low, high]}


def at(report: dict[str, Any], value: float, half: float = 0.04) -> dict[str, Any]:
    report = deepcopy(report)
    report["federated"] |= of(value, value - half, value + half)
    return report


@pytest.fixture(scope="module")
def protected() -> dict[str, Any]:
    plan = DpSgd(noise_multiplier=2.0, delta=1e-5, clip_norm=1.0, sample_rate=0.2, batch_size=16.0, steps=2)
    return at(protected_report(plan), 0.85)


@pytest.fixture(scope="module")
def unprotected() -> dict[str, Any]:
    return at(full_report(), 0.9)


MEAN = of(0.07, 0.03, 0.11)
GAINS = {"clinic-a": of(0.1, 0.05, 0.15), "clinic-b": of(0.04, 0.01, 0.07)}


def gain(report: dict[str, Any], gains: dict[str, Any], mean: dict[str, Any] | None = None) -> str:
    report = report | {"gain_over_local": gains, "gain_on_average": mean or MEAN}
    return " ".join(say_gain(report, write_headline(report)))


def test_better_than_every_site_needs_every_interval_above_zero(unprotected: dict[str, Any]) -> None:
    assert "every site's own" in gain(unprotected, GAINS) and "0.040" in gain(unprotected, GAINS)
    undecided = GAINS | {"clinic-b": of(0.02, -0.01, 0.05)}
    assert "every site's own" not in gain(unprotected, undecided)
    assert "better than 1 of 2" in gain(unprotected, undecided)
    assert "worse than 1" in gain(unprotected, GAINS | {"clinic-b": of(-0.05, -0.08, -0.02)})


def test_on_average_it_takes_the_interval_of_the_mean(unprotected: dict[str, Any]) -> None:
    undecided = GAINS | {"clinic-b": of(0.02, -0.01, 0.05)}
    assert "ahead of them by 0.070" in gain(unprotected, undecided)
    assert "cannot be told apart" in gain(unprotected, undecided, of(0.02, -0.01, 0.05))
    assert "behind them by 0.040" in gain(unprotected, undecided, of(-0.04, -0.06, -0.01))


def test_what_privacy_costs(unprotected: dict[str, Any], protected: dict[str, Any]) -> None:
    def said(cost: dict[str, Any], report: dict[str, Any] = protected) -> str:
        return " ".join(say_cost(join_chapters(unprotected, report, GAINS, MEAN, cost, {})))

    lower = said(of(0.05, 0.02, 0.08))
    assert "0.050 lower than the first chapter's" in lower, "what it is compared with"
    assert "cannot be told apart" in said(of(0.02, -0.02, 0.06))
    higher = said(of(-0.05, -0.08, -0.02))
    assert "0.050 higher than the first chapter's" in higher
    chance = said(of(0.4, 0.35, 0.45), at(protected, 0.5))
    assert "at chance, as far as" in chance and "falls by 0.400" in chance
    wide = said(of(-0.02, -0.1, 0.06), at(protected, 0.7, half=0.21))
    assert "falls" not in wide and "as far as" in wide, "a wide interval is no certainty"
    assert "cannot tell" in said({})


def test_what_the_noise_alone_costs(unprotected: dict[str, Any], protected: dict[str, Any]) -> None:
    """Said beside the first chapter's model, whose settings are others, and only where it was measured."""

    def said(of_noise: dict[str, Any], report: dict[str, Any] = protected) -> str:
        cost = of(0.05, 0.02, 0.08)
        return " ".join(say_cost(join_chapters(unprotected, report, GAINS, MEAN, cost, of_noise)))

    assert "costs 0.030 (95 % interval 0.010 to 0.050)" in said(of(0.03, 0.01, 0.05))
    assert "has 0.030 less" in said(of(-0.03, -0.05, -0.01))
    assert "cannot be told: without it the same job has +0.010" in said(of(0.01, -0.01, 0.03))
    assert "costs 0.030" in said(of(0.03, 0.01, 0.05), at(protected, 0.5))
    assert "without noise" not in said({})


def test_an_unprotected_model_at_chance_is_no_cost_of_privacy(
    unprotected: dict[str, Any], protected: dict[str, Any]
) -> None:
    """The settings are the reason then, and no figure of a cost is given."""
    joined = join_chapters(at(unprotected, 0.5), at(protected, 0.5), GAINS, MEAN, of(0.0, -0.02, 0.02), {})
    for chapter in write_chapters(joined):
        assert "not privacy" in chapter.verdict
        assert not chapter.evidence


def test_the_page_has_both_chapters(
    tmp_path: Path, unprotected: dict[str, Any], protected: dict[str, Any]
) -> None:
    joined = join_chapters(unprotected, protected, GAINS, MEAN, of(0.05, 0.02, 0.08), of(0.03, 0.01, 0.05))
    write_page(joined, tmp_path / "page.html")
    parsed, page = parse(tmp_path / "page.html"), (tmp_path / "page.html").read_text()
    for chapter in write_chapters(joined):
        assert len(chapter.verdict) < 120 and chapter.evidence
        for sentence in (chapter.verdict, *chapter.evidence, *chapter.cautions):
            assert sentence in parsed.text
    assert parsed.text.count("one site's own model") == 2, "each chapter's chart has its legend"
    assert unprotected["job"] in page and "Nor is the first chapter covered" in parsed.text
    assert page.count("Chapter 1") == page.count("Chapter 2") == 1
    write_page(protected, tmp_path / "page.html")
    assert "first chapter" not in (tmp_path / "page.html").read_text()
    assert "Chapter 1" not in (tmp_path / "page.html").read_text()
