"""Strategies beside one another: figures as a job's report has them; what cannot be tried says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.flare.job import Job
from histoflare.lab import strategy_comparison
from histoflare.lab.run import run_experiment
from histoflare.lab.strategy_comparison import (
    ALONE,
    TOGETHER,
    Choice,
    Setup,
    compare_strategies,
    parse_strategy,
)
from histoflare.lab.watch import Watch
from histoflare.privacy.plan import DpSgd, Open
from histoflare.report.consortium import own_models
from histoflare.report.strategies_page import write_strategies
from histoflare.rounds.strategies.fedprox import FedProx
from histoflare.rounds.trial import Trial
from histoflare.site.data import load_site_data
from histoflare.site.kinds import kind_of
from tests.flare.bags_on_disk import write_site
from tests.lab.test_experiment import small_job
from tests.refusals import raises_reason
from tests.report.parsed import parse

PRIVATE = DpSgd(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, batch_size=4, steps=1)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sites")
    return {site: write_site(folder, site, slides=20) for site in ("a", "b", "c")}


def of(job: Job, sites: dict[str, Any], *outside: str) -> Setup:
    data = {site: load_site_data(site, job.task, at, job.split) for site, at in sites.items()}
    inside = {site: each for site, each in data.items() if site not in outside}
    pooled = kind_of(job.task.data).pool(list(inside.values()), "pooled")
    return Setup(job, inside, pooled, *(data[site] for site in outside))


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["strategy"]: row for row in found["splits"][0]["rows"]}


def test_the_figures_are_those_of_the_job_s_report(
    repository: Path, tmp_path: Path, sites: dict[str, Any]
) -> None:
    job = small_job(repository, Open())
    split = of(job, sites, "c")
    found = compare_strategies({"all": [split]}, ["fedavg", "fedprox mu=0.5"], "balanced_accuracy")
    inside = {site: sites[site] for site in split.sites}
    report = run_experiment(job, inside, tmp_path, external={"c": sites["c"]}).report
    for row, model in ((ALONE, "local"), ("fedavg", "federated"), (TOGETHER, "pooled")):
        values = [report["sites"][site][model]["balanced_accuracy"] for site in inside]
        got = rows_of(found)[row]
        assert (got["mean"], got["worst"]) == (sum(values) / 2, min(values))
        assert (got["best"], got["spread"]) == (max(values), max(values) - min(values))
        assert got["sites"] == dict(zip(inside, values, strict=True))
        outside = [each["balanced_accuracy"] for each in own_models(report, model, external=True)]
        assert got["external"] == sum(outside) / len(outside)
    prox = rows_of(found)["fedprox mu=0.5"]
    assert prox["settings"]["mu"] == 0.5
    assert prox["bytes_up"] == report["bytes_up"] / job.rounds
    assert len(prox["course"]) == job.rounds and prox["course"][-1] == prox["mean"]


def test_what_cannot_be_tried_has_a_reason_and_costs_no_other(
    repository: Path, sites: dict[str, Any]
) -> None:
    job = small_job(repository, PRIVATE)
    said: list[str] = []
    names = ["scaffold", "fedrep", "krum", "fedavg"]
    found = compare_strategies({"all": [of(job, sites)]}, names, "auc", watch=Watch(on_warning=said.append))
    rows = rows_of(found)
    assert {name: rows[name]["refused"]["reason"] for name in names[:3]} == {
        "scaffold": "PRIVACY_INVALID",
        "fedrep": "SHARE_INVALID",
        "krum": "UPDATES_INVALID",
    }
    assert rows["fedavg"]["mean"] is not None and len(said) == 3
    with raises_reason("NOTHING_TO_EVALUATE"):
        compare_strategies({"all": [of(job, sites)]}, names[:3], "auc", watch=Watch(on_warning=said.append))


def test_over_seeds(repository: Path, sites: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: of two seeds 'quick' is near the best at once, and 'slow' in the second seed only."""
    job = small_job(repository, Open())
    means = {
        ("quick", 1): (0.8, 0.8),
        ("quick", 2): (0.6, 0.6),
        ("slow", 1): (0.5, 0.7),
        ("slow", 2): (0.5, 0.59),
    }
    names = {"fedavg": "quick", "fedprox": "slow"}

    def made_up(
        task: Any, sites: Any, strategy: Any, rounds: int, seed: int, *args: Any, **kwargs: Any
    ) -> Trial:
        served = tuple(
            {"a": mean - 0.1, "b": mean, "c": mean + 0.1} for mean in means[names[strategy.name], seed]
        )
        return Trial(served, None, (1.0, 2.0), 10.0, 20.0)

    monkeypatch.setattr(strategy_comparison, "try_strategy", made_up)
    setups = [of(replace(job, seed=seed), sites) for seed in (1, 2)]
    rows = rows_of(compare_strategies({"all": setups}, list(names), "auc"))
    quick, slow = rows["fedavg"], rows["fedprox"]
    assert (quick["mean"], quick["mean_sd"]) == pytest.approx((0.7, 0.2 / 2**0.5))
    assert (quick["worst"], quick["spread"]) == pytest.approx((0.6, 0.2))
    assert (quick["near_rounds"], quick["near_seconds"], quick["near_seeds"]) == (1.0, 1.0, 2)
    assert (slow["near_rounds"], slow["near_seconds"], slow["near_seeds"]) == (2.0, 3.0, 1)
    assert slow["course"] == pytest.approx([0.5, 0.645])


def test_a_strategy_is_named_with_its_fields(repository: Path) -> None:
    assert parse_strategy("fedprox mu=0.1", ["a"]) == Choice(FedProx(mu=0.1), {})
    assert parse_strategy("afl", ["a", "b"]).strategy.sites == ["a", "b"]  # type: ignore[attr-defined]
    slower = parse_strategy("fedprox task.learning_rate=0.01", ["a"])
    assert (slower.strategy, slower.of_task) == (FedProx(), {"learning_rate": 0.01})
    task = small_job(repository, Open()).task
    assert slower.task(task) == replace(task, learning_rate=0.01)
    for text in ("fedprox task.speed=1", "fedprox task.learning_rate=fast"):
        with pytest.raises(JobError):
            parse_strategy(text, ["a"]).task(task)
    for text in ("fedprox mu", "fedprox =1", "no-such", "fedprox nu=1"):
        with pytest.raises(JobError):
            parse_strategy(text, ["a"])


def test_the_same_twice_is_no_second_run(repository: Path, sites: dict[str, Any]) -> None:
    job = small_job(repository, Open())
    with pytest.raises(JobError, match="twice"):
        compare_strategies({"all": [of(job, sites)]}, ["fedavg", "fedavg"], "auc")


def test_the_command_writes_figures_and_a_page(
    tmp_path: Path, sites: dict[str, Any], repository: Path
) -> None:
    folder = Path(next(iter(sites.values())).files["manifest"]).parent.parent
    out = tmp_path / "out"
    given = [
        "experiment",
        "strategies",
        "--sites",
        folder,
        "--out",
        out,
        "--seeds",
        "1,2",
        "--set",
        "rounds=2",
    ]
    small = ["--set", "task.model.memories=2", "--set", "task.model.dim=4", "--set", "task.model.hidden=8"]
    named = ["--strategy", "fedavg", "--strategy", "fedprox mu=0.1", "--strategy", "krum"]
    ran = CliRunner().invoke(app, [*map(str, given), *small, *named])
    assert ran.exit_code == 0, ran.output
    found = json.loads((out / "strategies.json").read_text())
    assert set(rows_of(found)) == {ALONE, "fedavg", "fedprox mu=0.1", "krum", TOGETHER}
    assert found["seeds"] == [1, 2]
    page = parse(out / "strategies.html")
    text = (out / "strategies.html").read_text()
    assert "fedprox mu=0.1" in text and "UPDATES_INVALID" in text and page is not None
    wrong = CliRunner().invoke(app, [*map(str, given), *small, "--strategy", "fedprox nu=1"])
    assert wrong.exit_code != 0 and isinstance(wrong.exception, JobError)


def test_a_page_needs_no_external_cohort_and_no_seed_beside(
    repository: Path, tmp_path: Path, sites: dict[str, Any]
) -> None:
    job = small_job(repository, Open())
    found = compare_strategies({"<b>": [of(job, sites)]}, ["fedavg"], "auc")
    write_strategies(found, tmp_path / "page.html")
    assert "<b>" not in (tmp_path / "page.html").read_text()
