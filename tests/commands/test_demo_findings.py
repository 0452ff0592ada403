"""What the demo finds can be found: on its own cohort, federated beats the sites alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from histoflare.bags.encoder import load_encoder
from histoflare.bags.encoder_names import EFFICIENTNET, find_packaged_weights
from histoflare.commands.demo import CHAPTER_SETTINGS, PATCHES_WITHOUT_SLIDE, plan_cohort
from histoflare.flare.job import Job
from histoflare.flare.job_choice import choose_job
from histoflare.rounds.bounds import POOLED, plan_bounds, train_bounds
from histoflare.rounds.evaluation import evaluate, evaluate_difference, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.rounds.task import PredictionTable
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import SiteData, load_site_data
from histoflare.site.kinds import kind_of
from histoflare.synthetic.bags import FieldParameters, make_bags

pytestmark = pytest.mark.slow

METRIC = "balanced_accuracy"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Site → manifest of the demo's cohort; a bag of the cheap kind stands for each drawn slide too."""
    if find_packaged_weights() is None:
        pytest.skip("the demo's findings rest on ImageNet features: install the extra demo")
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    folder, cohort = tmp_path_factory.mktemp("cohort"), replace(plan_cohort(), external=False)
    return make_bags(folder, encoder, cohort, FieldParameters(PATCHES_WITHOUT_SLIDE))


def job_of(repository: Path, name: str) -> Job:
    """Return a chapter's job as the demo runs it, with features of ``efficientnet-lite0``."""
    encoder = load_encoder(EFFICIENTNET, device="cpu")
    changes: dict[str, Any] = {"protocol.encoder": encoder.id, "task.features": encoder.features}
    if name == "mem_dpsgd":
        changes["privacy.budget_share"] = 1.0
    return choose_job(repository / "jobs" / name, changes=changes, before=CHAPTER_SETTINGS[name]).job


@dataclass(frozen=True)
class Found:
    """What the models say of the test patients of all sites; ``pooled`` is None if it was not asked for."""

    federated: PredictionTable
    alone: list[PredictionTable]
    pooled: PredictionTable | None


def find(job: Job, manifests: Mapping[str, Path], plan: Any, *, pooled: bool) -> Found:
    """Train the federated model and the bounds, and ask each."""
    at = {
        site: SiteConfiguration(
            {"manifest": path, "bags": path.parent / "bags"}, records=path.parent / "records"
        )
        for site, path in manifests.items()
    }
    sites: dict[str, SiteData] = {site: load_site_data(site, job.task, where) for site, where in at.items()}

    def ask(state: State) -> PredictionTable:
        return merge_predictions(
            {site: predict(job.task, state, data, "test") for site, data in sites.items()}
        )

    federated = ask(run_in_process(job.task, sites, job.strategy, job.rounds, job.seed, plan).state)
    courses = plan_bounds(job.task, sites, job.strategy, job.rounds, job.seed, plan)
    courses = courses if pooled else replace(courses, pooled=None)
    pool = kind_of(job.task.data).pool(list(sites.values()), POOLED)
    bounds = train_bounds(job.task, sites, pool, courses, job.strategy, job.seed)
    assert not bounds.failed
    together = None if bounds.pooled is None else ask(bounds.pooled)
    return Found(federated, [ask(state) for state in bounds.local.values()], together)


def accuracy(table: PredictionTable) -> float:
    value = evaluate(table, bootstraps=0)[METRIC].value
    assert value is not None
    return value


def check_gain(found: Found, least: float) -> None:
    """The gain on average is a finding, all of its interval above 0, and no site's own model is better."""
    gain = evaluate_difference(found.federated, found.alone, METRIC, seed=1)
    assert gain.value is not None and gain.low is not None
    assert gain.value > least and gain.low > 0.0
    for own in found.alone:
        each = evaluate_difference(found.federated, [own], METRIC, seed=1)
        assert each.high is not None and each.high > 0.0, "not worse than this one by more than chance"


def test_without_protection_the_federated_model_beats_the_sites_own(
    manifests: Mapping[str, Path], repository: Path
) -> None:
    """And the task is as hard as docs/measured.md says."""
    job = job_of(repository, "mem_fedavg")
    found = find(job, manifests, job.plan, pooled=True)
    check_gain(found, least=0.05)
    alone = [accuracy(table) for table in found.alone]
    assert found.pooled is not None
    assert all(0.7 <= value <= 0.85 for value in alone) and accuracy(found.pooled) < 0.97


def test_under_dp_sgd_the_federated_model_beats_the_sites_own(
    manifests: Mapping[str, Path], repository: Path
) -> None:
    """At ε = 8 for each patient; the noise is seeded, so that the answer is the same each time."""
    job = job_of(repository, "mem_dpsgd")
    plan: Any = job.plan
    found = find(job, manifests, replace(plan, noise_seed=2), pooled=False)
    check_gain(found, least=0.05)
