"""How evenly sites are served: by hand, and in the report of a run whose sites keep something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.lab.run import run_experiment
from histoflare.privacy.plan import Open
from histoflare.report.consortium import results_table
from histoflare.report.served import GLOBAL, figures_of, say_served
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.site.data import load_site_data
from tests.flare.bags_on_disk import write_site
from tests.lab.test_experiment import small_job


def made(**sites: dict[str, float | None]) -> dict[str, Any]:
    return {
        "sites": {
            name: {model: {"auc": value} for model, value in figures.items()}
            for name, figures in sites.items()
        }
    }


def test_the_spread_and_who_is_better_off_alone() -> None:
    report = made(
        a={"federated": 0.9, "local": 0.7}, b={"federated": 0.6, "local": 0.65}, c={"federated": None}
    )
    spread, alone = say_served(report, "auc")
    assert all(text in spread for text in ("0.300", "0.600 (b)", "0.900 (a)")) and "c" not in figures_of(
        report, "federated", "auc"
    )
    assert "b (0.650 for 0.600)" in alone and "a (" not in alone


def test_where_nobody_is() -> None:
    report = made(a={"federated": 0.9, "local": 0.7}, b={"federated": 0.8, "local": 0.8})
    assert say_served(report, "auc")[1].startswith("No site")


def test_of_one_site_there_is_nothing_to_say() -> None:
    assert say_served(made(a={"federated": 0.9}, b={"federated": None}), "auc") == []


def test_what_sites_keep_beside_the_global_model() -> None:
    report = made(
        a={"federated": 0.9, "local": 0.7, GLOBAL: 0.8}, b={"federated": 0.6, "local": 0.5, GLOBAL: 0.66}
    )
    kept = say_served(report, "auc")[2]
    assert "+0.020" in kept and "without: b." in kept


@pytest.mark.parametrize("share", [["head"], None])
def test_a_run_s_report_has_both(repository: Path, tmp_path: Path, share: list[str] | None) -> None:
    job = replace(small_job(repository, Open()), strategy=FedAvg(share=share))
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    report = run_experiment(job, sites, tmp_path / "out").report
    caption = str(results_table(report).caption)
    page = (tmp_path / "out" / "report.html").read_text()
    for sentence in say_served(report):
        assert sentence in caption
    assert "Between the sites" in page
    if share is None:
        assert all(GLOBAL not in site for site in report["sites"].values())
        return
    data = {site: load_site_data(site, job.task, at, job.split) for site, at in sites.items()}
    run = run_in_process(job.task, data, job.strategy, job.rounds, job.seed)
    for site, entry in report["sites"].items():
        expected = evaluate(predict(job.task, run.handed_out, data[site], "test"), bootstraps=0)
        assert entry[GLOBAL]["auc"] == expected["auc"].value
        assert entry["federated"] != entry[GLOBAL]
