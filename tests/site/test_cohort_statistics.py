"""Counts of patients at a site: exact ones with the policy's floor, and noised ones that are booked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from histoflare.bags.cohort_task import CohortTask
from histoflare.count_form import name_of
from histoflare.privacy.plan import Open
from histoflare.privacy.policy import POLICIES, Policy, read_policy
from histoflare.privacy.tally import TALLY, Tally
from histoflare.rounds.state import model_state
from histoflare.rounds.tally import tally_rows
from histoflare.site.bookkeeping import Bookkeeping
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.ledgers import on_workstation
from histoflare.site.messages import Arrays, EvaluateAnswer
from histoflare.site.work import SiteWork
from histoflare.slides.manifest import read_manifest, write_manifest

from ..flare.bags_on_disk import ENCODER, LABELS, write_site
from .tasks import setup_of

ASKED = CohortTask(labels=LABELS, encoder=ENCODER, mpp=None, patch_px=None, patch_edges=(4, 5, 6))
SECRET = "<b>../ward 7</b>"


@pytest.fixture
def site(tmp_path: Path) -> SiteConfiguration:
    """Eight test patients: four of one label, three of the other, and one of a word of the site's own."""
    where = write_site(tmp_path, "a", slides=20)
    rows = list(read_manifest(where.files["manifest"], check_files=False).rows)
    at = next(i for i, row in enumerate(rows) if row.split == "test" and row.label == "solid")
    rows[at] = replace(rows[at], label=SECRET)
    write_manifest(where.files["manifest"], rows)
    return where


def state() -> Arrays:
    return {name: tensor.numpy() for name, tensor in model_state(ASKED.build_model()).items()}


def ask(site: SiteConfiguration, policy: Policy) -> EvaluateAnswer:
    bookkeeping = Bookkeeping(
        on_workstation("a", site), policy, Open(), rounds=1, weights=0, run="run-1", labels=None, data="bags"
    )
    work = SiteWork(replace(setup_of(site), task=ASKED), lambda _: None)
    return bookkeeping.evaluate(state(), "test", "q", lambda: work.evaluate(state(), "test"))


def test_exact_counts_have_the_policys_floor(site: SiteConfiguration) -> None:
    open_policy = read_policy(POLICIES / "open.toml")
    answer = ask(site, replace(open_policy, minimum_patients=2))
    shown = {name: value for name, value in answer.metrics.items() if name.startswith("label/")}
    # One patient has another label: with it goes the smallest of the rest, 3 of "solid".
    assert shown == {name_of("label", "glandular"): 4.0}
    assert answer.metrics["n_patients"] == 8 and answer.cells == {}
    assert SECRET not in str(answer)
    assert open_policy.allowed_metrics(answer.metrics) == answer.metrics, "counts are let out as such"
    assert replace(open_policy, counts=False).allowed_metrics(answer.metrics) == {}
    free = ask(site, replace(open_policy, minimum_patients=1))
    assert free.metrics[name_of("label", "other")] == 1.0 and free.metrics[name_of("label", "mixed")] == 0.0


def test_noised_counts_are_those_of_the_manifest(site: SiteConfiguration) -> None:
    plan = Tally(noise_multiplier=1.0, noise_seed=7).settled(1, ASKED.tally_form.length)
    work = SiteWork(replace(setup_of(site), task=ASKED, tally=plan), lambda _: None)
    first, again = work.tally(state(), "test"), work.tally(state(), "test")
    np.testing.assert_array_equal(first.tensors[TALLY], again.tensors[TALLY])
    rows = tally_rows(ASKED, model_state(ASKED.build_model()), load_site_data("a", ASKED, site), "test")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0)
    names = list(ASKED.tally_form.blocks["label"])
    counts = dict(zip(names, rows.sum(axis=0)[: len(names)] / ASKED.tally_form.weight, strict=True))
    assert counts == pytest.approx({"glandular": 4, "solid": 3, "other": 1, "unknown": 0, "mixed": 0})
    assert abs(first.tensors[TALLY] - rows.sum(axis=0)).max() < 6 * plan.sites_noise
