"""A protected federation of real FLARE processes: budgets, ledgers, resumed runs, evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from histoflare.bags.cohort import load_cohort
from histoflare.cli import app
from histoflare.flare.download import build_download_report, read_download
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import FederationResult, read_result
from histoflare.flare.resume import read_run, write_resumed
from histoflare.model_file import GLOBAL_MODEL_FILE
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import EVALUATION, Ledger
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_edit import change_own_policy
from histoflare.privacy.policy import POLICIES
from histoflare.privacy.tally import TALLY
from histoflare.rounds.evaluation import named
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.tally import tally_form_of, tally_rows
from histoflare.seeds import derive_seed
from histoflare.site.data import load_site_data
from histoflare.site.ledgers import audit_log_of, on_workstation, open_ledger
from histoflare.site.own_run import read_notes, read_own_run
from histoflare.slides.manifest import read_manifest

from .bags_on_disk import write_site
from .evaluation_jobs import write_evaluation

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b", "clinic-c")
POOR = "clinic-b"
"""Its own policy says an ε that no job here fits."""
LONG = "clinic-c"
"""Its bags are ten times as long."""
ROUNDS = 4
SECONDS = 1
"""Public time of an answer."""
BUDGET = Budget(8.0, 1e-5)


class Running:
    """Three sites with the policies dp-patient (repeatable noise allowed) and dp-update."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.jobs = repository / "jobs"
        self.original = write_variant(
            self.jobs / "mem_dpsgd", folder / "job", {"rounds": ROUNDS, "answer_seconds": SECONDS}
        )
        self.sites = {
            site: on_workstation(
                site, write_site(folder / "sites", site, slides=30, longer=10 if site == LONG else 1)
            )
            for site in SITES
        }
        policies = []
        for scope in ("dp-patient", "dp-update"):
            text = (POLICIES / f"{scope}.toml").read_text()
            text = text.replace("seeded_noise = false", "seeded_noise = true")
            text = text.replace("job_share = 0.5", "job_share = 1.0")
            policies.append(folder / f"{scope}.toml")
            policies[-1].write_text(text)
        agreement = Agreement(self.original, tuple(policies), "dp-patient")
        self.federation = Federation.prepare(folder / "run", self.sites, agreement)
        with (self.federation.kits.kit(POOR) / "local" / OWN_POLICY_FILE).open("a") as own:
            own.write("\n[scope.dp-patient]\nepsilon = 0.01\n[scope.dp-update]\nepsilon = 0.01\n")
        for site in set(SITES) - {POOR}:
            local = self.federation.kits.kit(site) / "local"
            change_own_policy(local, {"models": ["cohort_statistics", "mem"]})
        self._count = 0
        self.first: Path | None = None
        """The run folder of the first job here."""

    def variant(self, job: str = "mem_dpsgd", scope: str | None = None, **changes: Any) -> Path:
        self._count += 1
        changes = {"rounds": ROUNDS, "answer_seconds": SECONDS, "evaluate": False, **changes}
        return write_variant(self.jobs / job, self.folder / f"job-{self._count}", changes, scope=scope)

    def run(self, job: Path) -> tuple[str, Any, Path]:
        """Return a job's status, result and run folder once it has ended."""
        job_id = self.federation.admin.submit(job)
        status = self.federation.follow(job_id, timeout_s=120.0)
        folder = self.federation.admin.download(job_id, self.folder / "results") / "workspace"
        return status, read_result(folder), folder

    def ledger(self, site: str) -> Ledger:
        return open_ledger(self.sites[site])

    def events(self, site: str) -> list[str]:
        return [event["what"] for event in audit_log_of(self.sites[site]).read()]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("private"), repository)
    with running.federation as federation:
        federation.start()
        yield running


SETTINGS: dict[str, Any] = {
    "privacy.budget_epsilon": 1.0,
    "privacy.budget_share": 1.0,
    "privacy.noise_seed": 11,
    "privacy.sample_rate": 0.5,
    "privacy.batch_size": 3,
}


def test_a_site_without_the_budget_drops_out_before_its_first_step_and_the_others_go_on(
    running: Running,
) -> None:
    variant = running.variant(**SETTINGS)
    status, result, running.first = running.run(variant)
    folder = running.first
    assert status == COMPLETED
    rich = [site for site in SITES if site != POOR]
    (listed,) = running.federation.admin.jobs()  # as a console's list_jobs has it
    assert listed["status"] == f"{COMPLETED} (BUDGET_EXHAUSTED: {POOR})"
    log = (running.federation.kits.kit(POOR) / "log.txt").read_text()
    assert "refused: BUDGET_EXHAUSTED" in log and "histoflare ledger close" in log
    for row in result.rounds:
        assert row["taking_part"] == rich
        assert row["refused"] == {POOR: "BUDGET_EXHAUSTED"}
    # Few or many drawn, short bags or long ones, trained or refused: no answer came before a public time.
    for row in result.rounds:
        for site in SITES:
            assert row["seconds"][site]["training"] >= SECONDS, (row["round"], site)
    # What the gates say is what the plan costs.
    job = read_job(variant)
    for site in rich:
        stamp = result.rounds[-1]["stamps"][site]
        assert stamp["spend"] == job.plan.spend().to_json()
        assert (stamp["scope"], stamp["mechanism"], stamp["seeded_noise"]) == ("dp-patient", "dp-sgd", True)
        (run,) = running.ledger(site).summary(BUDGET).runs
        assert (run.rounds, run.booked, run.released) == (ROUNDS, ROUNDS, ROUNDS)
        assert running.events(site) == ["reserved", *["released"] * ROUNDS]
    assert running.ledger(POOR).summary(BUDGET).runs == ()
    assert set(running.events(POOR)) == {"refused"}
    kept = {path.name for path in running.sites[POOR].records.rglob("*") if path.is_file()}
    assert kept <= {"pace.json"}, "it never began to train"
    # The same bytes as without FLARE: the noise is repeatable here.
    cohorts = {}
    for site in rich:
        manifest = read_manifest(running.sites[site].files["manifest"], job.task.labels, check_files=False)
        cohorts[site] = load_cohort(
            site, manifest, running.sites[site].files["bags"], job.task.target, job.task.encoder
        )
    expected = run_in_process(job.task, cohorts, job.strategy, job.rounds, job.seed, job.plan).state
    assert hash_state(load_file(folder / GLOBAL_MODEL_FILE)) == hash_state(expected)


def test_the_next_job_pays_for_the_one_before(running: Running) -> None:
    """ε = 8 fits an empty ledger, and not one that has spent 1."""
    _, result, _ = running.run(
        running.variant(**{**SETTINGS, "privacy.budget_epsilon": 8.0, "privacy.budget_share": 1.0})
    )
    assert set(result.refused.values()) == {"BUDGET_EXHAUSTED"}


def test_a_resumed_run_has_one_reservation_and_pays_each_round_once(running: Running) -> None:
    federation = running.federation
    quiet = {"mechanism": "tally", "noise_multiplier": 0.8, "noise_seed": 3}  # beside 12 test patients
    variant = running.variant(**SETTINGS, seed=5, evaluate=True, evaluation=quiet, **{"privacy.steps": 3})
    job_id = federation.admin.submit(variant)
    until = time.monotonic() + 60
    while len([row for row in federation.rounds(job_id) if row.get("finished", True)]) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    federation.admin.abort(job_id)
    federation.follow(job_id, timeout_s=60.0)
    stopped = read_run(federation.admin.download(job_id, running.folder / "results"))
    assert 2 <= stopped.next_round < ROUNDS, "it was to be stopped half-way"
    status, result, _ = running.run(write_resumed(stopped, running.folder / "resumed"))
    assert status == COMPLETED
    # At its end every site was asked about the model, and no test patient of one can afford that either.
    job = read_job(variant)
    assert result.evaluation_refused == {POOR: "BUDGET_EXHAUSTED"} and job.tally is not None
    rich = sorted(set(SITES) - {POOR})
    check_tallies(running, job, result, rich)
    for site in rich:
        run, asked = [run for run in running.ledger(site).summary(BUDGET).runs if run.run == job_id]
        assert (asked.rounds, asked.booked, asked.released) == (1, 1, 1)
        assert (asked.spend, asked.patients) == (job.tally.spend(), 12), "booked on the test patients"
        assert [left for left in running.ledger(site).disclosures() if left.run == job_id] == []
        told = [event for event in running.ledger(site).history(job_id).events if event.what == EVALUATION]
        assert len(told) == 1 and told[0].is_protected
        assert run.rounds == ROUNDS
        assert ROUNDS <= run.booked <= ROUNDS, "no round was paid for twice"


def check_tallies(running: Running, job: Job, result: FederationResult, sites: Sequence[str]) -> None:
    """Hold what the server says of each site, and of all, to counts made here with the same noise."""
    assert job.tally is not None and result.state is not None
    form, std = tally_form_of(job.task), job.tally.sites_noise
    total = np.zeros(form.length)
    for site in sites:
        manifest = read_manifest(running.sites[site].files["manifest"], job.task.labels, check_files=False)
        cohort = load_cohort(
            site, manifest, running.sites[site].files["bags"], job.task.target, job.task.encoder
        )
        rows = tally_rows(job.task, result.state, cohort, "test")
        noise = job.tally.noise_source(site, TALLY, hash_state(result.state))
        counts = job.tally.release_rows(rows, noise)[TALLY].numpy()
        total += counts
        expected = named(form.figures(counts, std, seed=derive_seed(job.seed, TALLY, site)))
        assert result.evaluation[site] == expected
        assert result.evaluation[site]["accuracy"] is not None
    assert set(result.evaluation) == set(sites)
    together = form.figures(total, std * math.sqrt(len(sites)), seed=derive_seed(job.seed, TALLY))
    assert result.evaluation_total is not None
    assert result.evaluation_total["figures"] == named(together)
    assert result.evaluation_total["counts"] == total.tolist()
    assert result.evaluation_total["sites"] == list(sites)


def test_an_evaluation_later_is_booked_on_the_test_patients(running: Running) -> None:
    variant = running.variant(**SETTINGS)
    assert running.first is not None
    model = running.first / GLOBAL_MODEL_FILE
    evaluation = write_evaluation(
        running.jobs / "mem_evaluate",
        running.folder / "evaluation",
        read_job(variant),
        "first",
        model,
        SITES,
        {"evaluation": {"mechanism": "tally", "budget_share": 0.1}},
    )
    status, result, folder = running.run(evaluation)
    assert status == COMPLETED
    rich = set(SITES) - {POOR}
    assert set(result.evaluation) == rich and result.refused == {POOR: "BUDGET_EXHAUSTED"}
    # What the lead makes of both downloads.
    trained = read_download(model.parents[1])
    report = build_download_report(trained, read_download(folder.parent))
    assert report["evaluated_at_sites"].keys() == rich
    assert report["evaluation_noise"]["together"]["sites"] == sorted(rich)
    assert report["guarantee"]["not_covered"]["evaluations"] == 0
    assert "evaluated_model" not in report, "the last one is meant unless it says the best"
    took = {site for row in report["participation"] for site in row["taking_part"]}
    spent = {site for site, each in report["guarantee"]["sites"].items() if each["updates"]}
    assert took == spent == rich
    # What a site has of the same run, without anything of the lead's.
    own = running.sites["clinic-a"]
    history = read_own_run(own, trained.run, Path(), read_notes(own, trained.run))
    updates = [row.round_number for row in history.left if row.what == "update"]
    assert updates == [row["round"] + 1 for row in trained.result.rounds]
    (refused,) = read_own_run(
        running.sites[POOR], trained.run, Path(), read_notes(running.sites[POOR], trained.run)
    ).refused
    assert refused.code == "BUDGET_EXHAUSTED"
    assert not {"n_patients", "n_slides"} & set(result.evaluation["clinic-a"]), "counts stay"


def test_counts_of_cohorts_are_those_made_here_and_are_paid_for_each_time(running: Running) -> None:
    """Without a model; a site whose own policy does not list the question answers nothing."""
    protocol = read_job(running.original).protocol
    changes: dict[str, Any] = {f"protocol.{name}": value for name, value in protocol.items()}
    changes |= {
        "answer_seconds": SECONDS,
        "evaluation": {"mechanism": "tally", "budget_share": 0.01, "noise_seed": 5},
    }
    rich = [site for site in SITES if site != POOR]
    before = {site: len(running.ledger(site).summary(BUDGET).runs) for site in rich}
    for again in range(2):
        folder = running.folder / f"cohort-{again}" / "cohort_statistics"
        job_folder = write_variant(running.jobs / "cohort_statistics", folder, changes, scope="dp-patient")
        status, result, downloaded = running.run(job_folder)
        assert status == COMPLETED and result.refused == {POOR: "MODEL_NOT_ALLOWED"}
        job = read_job(job_folder)
        assert job.tally is not None
        form, state = tally_form_of(job.task), model_state(job.task.build_model())
        total = np.zeros(form.length)
        for site in rich:
            cohort = load_site_data(site, job.task, running.sites[site], job.split)
            noise = job.tally.noise_source(site, TALLY, hash_state(state))
            counts = job.tally.release_rows(tally_rows(job.task, state, cohort, "test"), noise)[TALLY].numpy()
            assert result.evaluation[site] == named(form.figures(counts, job.tally.sites_noise, seed=0))
            total += counts
            assert len(running.ledger(site).summary(BUDGET).runs) == before[site] + again + 1
        assert result.evaluation_total is not None
        assert result.evaluation_total["counts"] == total.tolist()
    said = CliRunner().invoke(app, ["job", "result", str(downloaded.parent), "--least", "1000"])
    assert said.exit_code == 0, said.output
    assert "At least 1000 patients of glandular: no." in said.output


def test_what_a_site_s_processes_wrote_is_for_their_user_alone(running: Running) -> None:
    """FLARE's own logs and folders of jobs too: they name slides. What the kit came with does not."""
    for site in SITES:
        kit = running.federation.kits.kit(site)
        came = [kit / name for name in ("startup", "local", "transfer", "readme.txt")]
        written = [path for path in kit.rglob("*") if not any(path.is_relative_to(each) for each in came)]
        assert [path for path in written if path.name.startswith("log")], "FLARE has logs there"
        looked_at = [
            *written,
            *running.sites[site].ledger.parent.rglob("*"),
            *running.sites[site].records.rglob("*"),
            running.federation.log(site),
        ]
        assert [path for path in looked_at if path.stat().st_mode & 0o077] == []
