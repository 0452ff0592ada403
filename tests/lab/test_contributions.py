"""What each site adds, by the trainings of all coalitions."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.errors import JobError
from histoflare.lab import contributions
from histoflare.lab.contributions import find_contributions
from histoflare.lab.run import run_experiment
from histoflare.lab.watch import Step, Watch
from histoflare.privacy.plan import Open
from histoflare.report.consortium import own_models
from tests.flare.bags_on_disk import write_site
from tests.lab.test_experiment import small_job
from tests.lab.test_strategy_comparison import PRIVATE, of
from tests.refusals import raises_reason


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sites")
    return {site: write_site(folder, site, slides=20) for site in ("a", "b", "external")}


def test_of_two_sites_by_hand(repository: Path, tmp_path: Path, sites: dict[str, Any]) -> None:
    """Half of what it adds to nobody, half of what it adds to the other; by reports of jobs of their own."""
    job = small_job(repository, Open())
    setup = of(job, sites, "external")
    steps: list[Step] = []
    found = find_contributions(setup, "auc", watch=Watch(steps.append))

    def worth(*members: str) -> float:
        inside = {site: sites[site] for site in members}
        outside = {"external": sites["external"]}
        report = run_experiment(job, inside, tmp_path / "-".join(members), external=outside).report
        (figures,) = own_models(report, "federated", external=True)
        return figures["auc"]

    both, a, b, nobody = worth("a", "b"), worth("a"), worth("b"), found["nobody"]
    assert found["all"] == both and found["asked"] == "external" and found["exact"]
    assert found["sites"]["a"]["shapley"] == pytest.approx((a - nobody + both - b) / 2)
    assert found["sites"]["b"]["shapley"] == pytest.approx((b - nobody + both - a) / 2)
    assert found["sites"]["a"]["left_out"] == both - b
    assert found["coalitions"] == 3
    assert (steps[-1].done, steps[-1].total) == (3, 3)


def test_without_an_external_cohort_the_test_patients_of_all_are_asked(
    repository: Path, sites: dict[str, Any]
) -> None:
    job = small_job(repository, Open())
    setup = replace(of(job, sites, "external"), external=None)
    found = find_contributions(setup, "accuracy")
    assert found["asked"] == "test"
    total = sum(each["shapley"] for each in found["sites"].values())
    assert total == pytest.approx(found["all"] - found["nobody"])


def test_of_more_sites_orders_are_drawn_and_no_coalition_is_trained_twice(
    repository: Path, sites: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(repository, Open())
    setup = of(job, sites, "external")
    trained: list[tuple[str, ...]] = []
    real = contributions.run_in_process

    def counted(task: Any, chosen: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(tuple(chosen))
        return real(task, chosen, *args, **kwargs)

    monkeypatch.setattr(contributions, "run_in_process", counted)
    monkeypatch.setattr(contributions, "MOST_EXACT", 1)
    found = find_contributions(setup, "auc", orders=4)
    assert not found["exact"] and len(trained) == found["coalitions"]
    assert sorted(trained) == sorted(combination for n in (1, 2) for combination in combinations("ab", n))
    monkeypatch.setattr(contributions, "MOST_EXACT", 6)
    exact = find_contributions(setup, "auc")["sites"]
    for site, each in found["sites"].items():  # of two sites, an order and its reverse are all there are
        assert each["shapley"] == each["low"] == each["high"] == pytest.approx(exact[site]["shapley"])


def test_a_protected_job_is_refused(repository: Path, sites: dict[str, Any]) -> None:
    with raises_reason("PRIVACY_INVALID"):
        find_contributions(of(small_job(repository, PRIVATE), sites, "external"), "auc")


def test_a_figure_that_there_is_not(repository: Path, sites: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="brightness"):
        find_contributions(of(small_job(repository, Open()), sites, "external"), "brightness")


def test_the_command(tmp_path: Path, sites: dict[str, Any]) -> None:
    folder = Path(sites["a"].files["manifest"]).parent.parent
    given = ["experiment", "contribution", "--sites", folder, "--out", tmp_path, "--set", "rounds=1"]
    small = ["--set", "task.model.memories=2", "--set", "task.model.dim=4", "--set", "task.model.hidden=8"]
    ran = CliRunner().invoke(app, [*map(str, given), *small])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "contributions.json").read_text())
    assert set(found["sites"]) == {"a", "b"} and found["coalitions"] == 3
