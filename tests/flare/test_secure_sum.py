"""A federation of real FLARE processes whose server sees nothing but the sum of the updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from histoflare.bags.cohort import Cohort, load_cohort
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import FederationResult, read_result
from histoflare.model_file import GLOBAL_MODEL_FILE
from histoflare.privacy.ledger import UPDATE, Ledger
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.tally import TALLY
from histoflare.rounds.evaluation import named
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state
from histoflare.rounds.tally import tally_form_of, tally_rows
from histoflare.seeds import derive_seed
from histoflare.site.ledgers import on_workstation, open_ledger
from histoflare.slides.manifest import read_manifest
from histoflare.storage import write_json

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")
LOST = "clinic-d"
ROUNDS = 2
SUMS = Path(__file__).parent / "sums"
SMALL = {"task.model.memories": 2, "task.model.dim": 8, "task.model.hidden": 16}


class Running:
    """Four sites that know each other's certificates, as ``histoflare poc`` makes them."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.jobs = repository / "jobs"
        self.original = write_variant(
            self.jobs / "mem_fedavg", folder / "job", {"rounds": ROUNDS, "evaluate": False}
        )
        self.sites = {
            site: on_workstation(site, write_site(folder / "sites", site, slides=15 + 5 * index))
            for index, site in enumerate(SITES)
        }
        shared = folder / "dp-shared.toml"
        text = (POLICIES / shared.name).read_text()
        shared.write_text(text.replace("seeded_noise = false", "seeded_noise = true"))
        agreement = Agreement(self.original, (POLICIES / "open.toml", shared))
        self.federation = Federation.prepare(folder / "run", self.sites, agreement)
        self.held = folder / "held"
        self.held.mkdir()
        self.lost = folder / "lost.json"
        self.lost.write_text("{}")
        self.environment = {
            "PYTHONPATH": str(SUMS),
            "HISTOFLARE_TEST_LOST": str(self.lost),
            "HISTOFLARE_TEST_HELD": str(self.held),
            # FLARE gives a site up after minutes; here after seconds.
            "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "5",
            "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "2",
            "NVFLARE_DEAD_CLIENT_CHECK_LEAD_TIME": "5",
        }
        resources = self.federation.kits.kit("server") / "local" / "resources.json.default"
        content = json.loads(resources.read_text())
        content["servers"][0]["heart_beat_timeout"] = 10
        write_json(resources, content)
        self.federation.kits.sign("server")
        self._count = 0

    def run(self, job: str = "mem_fedavg", scope: str = "open", **changes: Any) -> tuple[str, Any, Job, Path]:
        """Return a job's id, its result, the job and its run folder, once it is completed."""
        self._count += 1
        said = {"transport.name": "masked_sum", "rounds": ROUNDS, "least_sites": 3, "evaluate": False}
        said |= {**SMALL, **changes}
        made = write_variant(self.jobs / job, self.folder / f"job-{self._count}", said, scope=scope)
        job_id = self.federation.admin.submit(made)
        status = self.federation.follow(job_id, timeout_s=120.0)
        folder = self.federation.admin.download(job_id, self.folder / "results") / "workspace"
        assert status == COMPLETED
        return job_id, read_result(folder), read_job(made), folder

    def cohorts(self, job: Job) -> dict[str, Cohort]:
        found = {}
        for site, where in self.sites.items():
            manifest = read_manifest(where.files["manifest"], job.task.labels, check_files=False)
            found[site] = load_cohort(site, manifest, where.files["bags"], job.task.target, job.task.encoder)
        return found

    def in_process(self, job: Job, last: Sequence[str] = SITES) -> str:
        """Return the hash of the model that the runner without FLARE makes.

        Args:
            last: The sites of the last round.
        """
        cohorts = self.cohorts(job)
        run = partial(run_in_process, plan=job.plan, transport=job.transport)
        first = run(job.task, cohorts, job.strategy, ROUNDS - 1, job.seed)
        end = run(
            job.task,
            {site: cohorts[site] for site in last},
            job.strategy,
            ROUNDS,
            job.seed,
            start_round=ROUNDS - 1,
            initial_state=first.state,
            initial_own=first.own,
        )
        return hash_state(end.state)

    def ledger(self, site: str) -> Ledger:
        return open_ledger(self.sites[site])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("sums"), repository)
    with running.federation as federation:
        federation.start(environment=running.environment)
        yield running


def held(folder: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the vectors that the server held of a job, each as one."""
    for file in folder.glob("*.npz"):
        with np.load(file) as content:
            yield np.concatenate([content[name].reshape(-1) for name in sorted(content.files)])


def test_the_sum_ends_with_the_bytes_of_the_in_process_runner_and_the_server_holds_noise(
    running: Running,
) -> None:
    """Each site by its number of samples, which stands in the sum too."""
    job_id, result, job, folder = running.run(**{"strategy.weighting": "samples"})
    assert [row["taking_part"] for row in result.rounds] == [list(SITES)] * ROUNDS
    assert hash_state(load_file(folder / GLOBAL_MODEL_FILE)) == running.in_process(job)
    vectors = list(held(running.held / job_id))
    assert len(vectors) == ROUNDS * len(SITES)
    for vector in vectors:
        bits = np.unpackbits(vector.view(np.uint8)).reshape(-1, 64).mean(0)
        # Of 64 bits, each as often 0 as 1: 6 standard deviations.
        assert abs(bits - 0.5).max() < 3 / np.sqrt(len(vector))
        assert len(np.unique(vector)) == len(vector), "no weight and no 1 is seen among them"
    for site in SITES:
        noted = [each for each in running.ledger(site).disclosures() if each.run == job_id]
        assert [each.what for each in noted] == [UPDATE] and noted[0].times == ROUNDS


HONEST = 2
SHARED: dict[str, Any] = {
    "privacy.noise": "shared",
    "privacy.honest": HONEST,
    "privacy.steps": 1,
    "privacy.noise_seed": 11,
    "privacy.sample_rate": 0.5,
    "privacy.batch_size": 12,
    "privacy.budget_share": 0.25,
    "strategy": {"name": "fedsgd", "weighting": "uniform", "learning_rate": 0.5},
    "answer_seconds": 1,
    "round_seconds": 45,
    "spare_rounds": 1,
}


def test_noise_that_the_sites_share_and_a_site_that_is_lost_between_hello_and_training(
    running: Running,
) -> None:
    """DP-SGD on the patients of all sites, with the bytes of the runner: of four sites and then of three.

    The round from which one is lost is void, and its next attempt works; what the others sent in vain is paid
    for. Last: the site stays away.
    """
    running.lost.write_text(json.dumps({"site": LOST, "round": 1}))
    job_id, result, job, folder = running.run("mem_dpsgd", "dp-shared", **SHARED, evaluate=True)
    others = [site for site in SITES if site != LOST]
    assert [row["taking_part"] for row in result.rounds] == [list(SITES), others]
    assert "voids" not in result.rounds[0]
    assert result.rounds[1]["voids"] == [{"sites": list(SITES), "no_answer": [LOST], "refused": {}}]
    assert hash_state(load_file(folder / GLOBAL_MODEL_FILE)) == running.in_process(job, others)
    budget = read_policy(POLICIES / "dp-shared.toml").protection.budget()  # type: ignore[union-attr]
    for site in others:
        stamp = result.rounds[-1]["stamps"][site]
        assert (stamp["scope"], stamp["mechanism"]) == ("dp-shared", "dp-sgd-shared")
        assert stamp["spend"] == job.plan.spend().to_json() and job.plan.spend().honest == HONEST
        runs = [run for run in running.ledger(site).summary(budget).runs if run.run == job_id]
        counted = [(run.rounds, run.booked, run.released) for run in runs]
        assert counted == [(ROUNDS + 1,) * 3, (1, 1, 1)], "the training, and the evaluation of its model"
        booked = [each["body"] for each in running.ledger(site).events() if each["kind"] == "booking"]
        assert [each["mechanism"]["countable"] for each in booked] == [4, 4, 3, 3]
        assert len({each["model"] for each in booked}) == ROUNDS + 2, "each under its own transcript"
    check_evaluation(running, job, result, others, load_file(folder / GLOBAL_MODEL_FILE))


def check_evaluation(
    running: Running, job: Job, result: FederationResult, sites: Sequence[str], model: dict[str, Any]
) -> None:
    """Hold what the server made of the sum to the counts of each site, made here with the same noise."""
    tally = job.tally
    assert tally is not None and tally.honest == HONEST
    cohorts, total = running.cohorts(job), np.zeros(tally_form_of(job.task).length)
    for site in sites:
        rows = tally_rows(job.task, model, cohorts[site], "test")
        noise = tally.noise_source(site, TALLY, hash_state(model))
        total = total + tally.release_rows(rows, noise)[TALLY].numpy()
    std = tally.sites_noise * math.sqrt(len(sites))
    expected = tally_form_of(job.task).figures(total, std, seed=derive_seed(job.seed, TALLY))
    assert result.evaluation == {}, "of no site by itself"
    said = {"sites": sites, "noise_std": std, "figures": named(expected), "counts": total.tolist()}
    assert result.evaluation_total == said
    row = result.evaluation_round
    assert row is not None and row["taking_part"] == sites
    assert row["stamps"][sites[0]]["spend"] == tally.spend().to_json()
