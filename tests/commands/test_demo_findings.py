"""What the demo finds can be found: on a smaller cohort of its kind, federated beats the sites alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from histoflare.bags.encoder import load_encoder
from histoflare.bags.encoder_names import EFFICIENTNET, find_packaged_weights
from histoflare.commands.demo import CHAPTER_SETTINGS, PATCHES_WITHOUT_SLIDE
from histoflare.flare.job import Job
from histoflare.flare.job_choice import choose_job
from histoflare.rounds.bounds import POOLED, plan_bounds, train_bounds
from histoflare.rounds.evaluation import evaluate, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import SiteData, load_site_data
from histoflare.site.kinds import kind_of
from histoflare.synthetic.bags import FieldParameters, make_bags
from histoflare.synthetic.cohort import SyntheticCohort

SMALLER = SyntheticCohort(external=False, slides_per_hospital=4, more_patients=40, seed=103)
SEED = 2


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Site → manifest of a cohort as the demo's, all of whose bags are of the cheap kind."""
    if find_packaged_weights() is None:
        pytest.skip("the demo's findings rest on ImageNet features: install the extra demo")
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    folder = tmp_path_factory.mktemp("cohort")
    return make_bags(folder, encoder, SMALLER, FieldParameters(PATCHES_WITHOUT_SLIDE))


def job_of(repository: Path, name: str) -> Job:
    """Return a chapter's job as the demo runs it, with features of ``efficientnet-lite0``."""
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    changes = {"protocol.encoder": encoder.id, "task.features": encoder.features, "seed": SEED}
    if name == "mem_dpsgd":
        changes["privacy.budget_share"] = 1.0
    return choose_job(repository / "jobs" / name, changes=changes, before=CHAPTER_SETTINGS[name]).job


def gains(job: Job, manifests: Mapping[str, Path], plan: Any) -> tuple[float, list[float]]:
    """Return the balanced accuracy of the federated model, and by how much it beats each site's own."""
    at = {
        site: SiteConfiguration(
            {"manifest": path, "bags": path.parent / "bags"}, records=path.parent / "records"
        )
        for site, path in manifests.items()
    }
    sites: dict[str, SiteData] = {site: load_site_data(site, job.task, where) for site, where in at.items()}

    def ask(state: State) -> float:
        tables = {site: predict(job.task, state, data, "test") for site, data in sites.items()}
        value = evaluate(merge_predictions(tables), bootstraps=0)["balanced_accuracy"].value
        assert value is not None
        return value

    federated = ask(run_in_process(job.task, sites, job.strategy, job.rounds, job.seed, plan).state)
    courses = plan_bounds(job.task, sites, job.strategy, job.rounds, job.seed, plan)
    pool = kind_of(job.task.data).pool(list(sites.values()), POOLED)
    alone = train_bounds(job.task, sites, pool, replace(courses, pooled=None), job.strategy, job.seed).local
    return federated, [federated - ask(state) for state in alone.values()]


def test_without_protection_the_federated_model_beats_the_sites_own(
    manifests: Mapping[str, Path], repository: Path
) -> None:
    """On average: with few patients to test on, a site alone may come out above it by chance."""
    job = job_of(repository, "mem_fedavg")
    federated, better = gains(job, manifests, job.plan)
    assert federated > 0.75 and np.mean(better) > 0.0


def test_under_dp_sgd_the_federated_model_beats_the_sites_own(
    manifests: Mapping[str, Path], repository: Path
) -> None:
    """At ε = 8 for each patient; the noise is seeded, so that the answer is the same each time."""
    job = job_of(repository, "mem_dpsgd")
    plan: Any = job.plan
    federated, better = gains(job, manifests, replace(plan, noise_seed=SEED))
    assert federated > 0.7 and min(better) > 0.05
