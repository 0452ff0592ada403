"""Segmentation through real FLARE processes: DHUnet at full size under noise, a small one to the last bit.

And a part of a small one under DP-SGD.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import FederationResult, load_site_states, read_result
from histoflare.flare.site_policy import policy_file
from histoflare.flare.workstation import write_policy
from histoflare.masks.task import MaskTask
from histoflare.model_file import GLOBAL_MODEL_FILE, read_model_file
from histoflare.privacy.budget import Budget
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, is_finite, n_bytes
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.ledgers import on_workstation, open_ledger

from ..masks.made import LABELS, make_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b")
NUCLEI: dict[str, Any] = {
    "task.labels": list(LABELS),
    "task.background": "background",
    "task.local_steps": 1,
    "task.batch_size": 2,
    "answer_seconds": 1,
}
SMALL = NUCLEI | {"task.width": 24, "task.window_px": 64, "task.stride_px": 64, "task.patch_px": 64}
FULL = NUCLEI | {"rounds": 1, "task.window_px": 224, "task.stride_px": 224, "task.patch_px": 224}


class Running:
    """Two sites with images, that have agreed to three protocols."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        jobs = repository / "jobs"
        self.small = write_variant(
            jobs / "dhunet_fedavg",
            folder / "small",
            {**SMALL, "rounds": 2, "strategy.batch_norm": "local-statistics", "transport.name": "float16"},
        )
        self.full = write_variant(jobs / "dhunet_feddp", folder / "full", FULL | {"evaluate": False})
        self.by_patient = write_variant(
            jobs / "dhunet_dpsgd", folder / "by_patient", {**SMALL, "rounds": 2, "task.train": "head"}
        )
        self.sites = {
            site: on_workstation(
                site,
                SiteConfiguration({"images": make_site(folder / "sites" / site, seed, side_px=224)}),
            )
            for seed, site in enumerate(SITES)
        }
        policies = []
        for scope in ("open", "dp-update", "dp-patient"):
            policies.append(folder / "policies" / policy_file(scope))
            write_policy(scope, policies[-1])
        agreement = Agreement(self.small, tuple(policies), more=(self.full, self.by_patient))
        self.federation = Federation.prepare(folder / "run", self.sites, agreement)

    def run(self, job: Path) -> tuple[str, FederationResult, Path]:
        """Return a job's id, result and run folder once it has ended."""
        job_id = self.federation.admin.submit(job)
        assert self.federation.follow(job_id, timeout_s=240.0) == COMPLETED
        folder = self.federation.admin.download(job_id, self.folder / "results") / "workspace"
        return job_id, read_result(folder), folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("masks"), repository)
    with running.federation as federation:
        federation.start()
        yield running


def test_a_small_network_ends_with_the_weights_of_the_in_process_runner(running: Running) -> None:
    """Two rounds, statistics of BatchNorm at home, updates in half precision: the same bytes; then asked."""
    run, result, folder = running.run(running.small)
    job = read_job(running.small)
    cohorts = {site: load_site_data(site, job.task, where) for site, where in running.sites.items()}
    expected = run_in_process(job.task, cohorts, job.strategy, job.rounds, job.seed, transport=job.transport)
    state = load_file(folder / GLOBAL_MODEL_FILE)
    assert hash_state(state) == hash_state(expected.state)
    assert hash_state(read_model_file(folder, MaskTask).state) == hash_state(expected.state), (
        "as segment opens it"
    )
    kept = load_site_states(running.sites, run)
    assert {site: hash_state(each) for site, each in kept.items()} == {
        site: hash_state(each) for site, each in expected.site_states.items()
    }
    assert sum(row["bytes_up"] for row in result.rounds) == expected.bytes_up
    assert result.evaluation is not None and set(result.evaluation) == set(SITES)
    for said in result.evaluation.values():
        assert {"dice", "dice_low", "dice_authors", "pixel_accuracy", "n_patients"} <= set(said)


def test_the_full_network_goes_through_gate_and_ledger(running: Running) -> None:
    """One round of 55 million parameters: clipped, noised, booked, released, combined."""
    run, result, folder = running.run(running.full)
    job = read_job(running.full)
    (row,) = result.rounds
    assert row["taking_part"] == list(SITES)
    state = load_file(folder / GLOBAL_MODEL_FILE)
    model = job.task.build_model()
    assert sum(each.numel() for each in model.parameters()) > 55_000_000
    floating = {name: each for name, each in state.items() if each.is_floating_point()}
    assert row["bytes_up"] == len(SITES) * n_bytes(floating)
    assert all(map(is_finite, state.values()))
    for site in SITES:
        stamp = row["stamps"][site]
        assert stamp["spend"] == job.plan.spend().to_json()
        ledger = open_ledger(running.sites[site])
        (booked,) = (each for each in ledger.summary(Budget(8.0, 1e-5)).runs if each.run == run)
        assert (booked.run, booked.rounds, booked.booked, booked.released) == (run, 1, 1, 1)
    # The mean of two clipped updates with noise of z·C each: what moved is that noise, little else shows.
    first = model.state_dict()
    moved = sum(float((state[name] - first[name]).double().square().sum()) for name in floating)
    count = sum(each.numel() for each in floating.values())
    plan: Any = job.plan
    assert (moved / count) ** 0.5 == pytest.approx(plan.noise_multiplier * plan.clip_norm / 2**0.5, rel=0.01)


def test_of_a_partly_trained_network_no_other_weight_leaves(running: Running) -> None:
    """Two rounds of DP-SGD with the patient as record, booked before the first gradient."""
    run, result, folder = running.run(running.by_patient)
    job = read_job(running.by_patient)
    state, first = load_file(folder / GLOBAL_MODEL_FILE), job.task.build_model().state_dict()
    assert {name for name in first if not torch.equal(state[name], first[name])} == {"head.weight"}
    assert job.weights == state["head.weight"].numel()
    for row in result.rounds:
        assert row["taking_part"] == list(SITES)
        assert row["bytes_up"] == len(SITES) * n_bytes({"head": state["head.weight"]})
    for site in SITES:
        runs = open_ledger(running.sites[site]).summary(Budget(8.0, 1e-5)).runs
        booked, asked = (each for each in runs if each.run == run)
        assert (booked.rounds, booked.booked, booked.released) == (2, 2, 2)
        assert booked.spend == job.plan.spend()
        assert (asked.rounds, asked.booked, asked.released) == (1, 1, 1)
    # So few test patients drown in the noise, and that is said.
    assert {site: said["dice_patients"] for site, said in result.evaluation.items()} == dict.fromkeys(SITES)
    assert result.evaluation_total is not None and result.evaluation_total["sites"] == list(SITES)
