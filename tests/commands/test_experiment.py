"""An experiment evaluates the models that its sites really have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from histoflare.bags.cohort import load_cohort
from histoflare.commands.clock import PhaseClock
from histoflare.commands.console import progress
from histoflare.commands.experiment import run_experiment
from histoflare.commands.options import Runtime
from histoflare.commands.runtimes import Experiment
from histoflare.flare.job import read_job
from histoflare.rounds.comparison import compare
from histoflare.rounds.fedavg import FedAvg
from histoflare.rounds.runner import run_in_process
from histoflare.slides.manifest import read_manifest
from tests.flare.bags_on_disk import write_site


def test_personal_layers_are_evaluated(tmp_path: Path, repository: Path) -> None:
    job = read_job(repository / "jobs" / "mem_fedavg")
    task = replace(job.task, memories=2, dim=4, hidden=8, learning_rate=0.02)
    job = replace(job, task=task, strategy=FedAvg(share=["head"]), rounds=2)
    sites = {site: write_site(tmp_path, site, slides=20) for site in ("a", "b")}
    experiment = Experiment(job, sites, {}, Runtime.INPROCESS)
    with progress() as bars:
        report = run_experiment(experiment, tmp_path / "out", bars, PhaseClock()).report
    cohorts = {
        site: load_cohort(
            site, read_manifest(w.manifest, task.labels, False), w.bags, task.labels, task.encoder
        )
        for site, w in sites.items()
    }
    run = run_in_process(task, cohorts, job.strategy, job.rounds, job.seed)
    own = compare(task, job.strategy, run.state, cohorts, site_states=run.site_states, seed=job.seed)
    shared = compare(task, job.strategy, run.state, cohorts, seed=job.seed)
    assert own.federated != shared.federated, "the blocks matter here"
    assert report["federated"]["accuracy"] == own.federated.accuracy.value
    assert report["federated"]["auc"] == own.federated.auc.value
