"""One federation of real FLARE processes: the weights of the in-process runner, and what it survives."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from histoflare.bags.cohort import load_cohort
from histoflare.bags.task import BagTask
from histoflare.errors import HistoflareError
from histoflare.flare import processes
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.persistor import BEST_MODEL_FILE
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.record import BEST_EVALUATION_FILE
from histoflare.flare.result import read_result
from histoflare.flare.resume import read_run, write_resumed
from histoflare.model_file import GLOBAL_MODEL_FILE, read_model_file, read_model_header
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.manifest import read_manifest
from histoflare.storage import write_json
from tests.refusals import raises_reason

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b", "clinic-c")
ROUNDS = 6
METRIC = "validation/balanced_accuracy"
SLOW = Path(__file__).parent / "slow"


class Running:
    """A federation, with sites whose trainers can be told to take their time."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.original = write_variant(repository / "jobs" / "mem_fedavg", folder / "job", {"rounds": ROUNDS})
        self.sites = {site: write_site(folder / "sites", site, slides=20, validation=True) for site in SITES}
        self.sites["clinic-b"] = replace(self.sites["clinic-b"], pseudonym="river")
        self._delays = folder / "delays" / "delays.json"
        self.delay({})
        self.environment = {
            "PYTHONPATH": str(SLOW),
            "HISTOFLARE_TEST_DELAYS": str(self._delays),
            # FLARE gives a site up after minutes; here after seconds.
            "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "5",
            "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "5",
        }
        self.federation = Federation.prepare(folder / "run", self.sites, Agreement(self.original))
        resources = self.federation.kits.kit("server") / "local" / "resources.json.default"
        content = json.loads(resources.read_text())
        content["servers"][0]["heart_beat_timeout"] = 30
        write_json(resources, content)
        self.federation.kits.sign("server")
        self._count = 0

    def delay(self, seconds: Mapping[str, list[float]]) -> None:
        """Have sites sleep so long after their work in each round, the last number standing for the rest."""
        write_json(self._delays, seconds)
        for asleep in self._delays.parent.glob("clinic-*"):
            asleep.unlink()

    def until_asleep(self, site: str, index: int) -> None:
        """Wait until a site's trainer has done its work of a round and sleeps."""
        wait(self._delays.with_name(f"{site}-{index}").is_file)

    def variant(self, **changes: Any) -> Path:
        self._count += 1
        return write_variant(self.original, self.folder / f"job-{self._count}", changes)

    def submit(self, job: Path) -> str:
        return self.federation.admin.submit(job)

    def end(self, job_id: str, seconds: float = 180.0) -> tuple[str, list[dict[str, Any]], Path]:
        """Return a job's status, rows and run folder once it has ended."""
        status = self.federation.follow(job_id, timeout_s=seconds)
        folder = self.federation.admin.download(job_id, self.folder / "results") / "workspace"
        return status, read_result(folder).rounds, folder

    def until_round(self, job_id: str, index: int) -> None:
        """Wait until rounds before ``index`` are finished."""
        wait(lambda: len(self.finished(job_id)) >= index)

    def finished(self, job_id: str) -> list[dict[str, Any]]:
        return [row for row in self.federation.rounds(job_id) if row.get("finished", True)]

    def kill(self, participant: str, module: str = "") -> None:
        """Kill a participant's processes, all or those that run a module."""
        kit = str(self.federation.kits.kit(participant))
        killed = 0
        for process in processes.find(self.federation.kits.name):
            with suppress(psutil.Error):
                command = process.cmdline()
                if kit in " ".join([*command, process.cwd()]) and (not module or module in command):
                    process.kill()
                    killed += 1
        assert killed, f"{participant} has no such process"

    def in_process(self, job: Path) -> State:
        """Return the last global state of the runner without FLARE."""
        read = read_job(job)
        cohorts = {site: load(read.task, site, where) for site, where in self.sites.items()}
        return run_in_process(read.task, cohorts, read.strategy, read.rounds, read.seed).state


TRAINER = "histoflare.site.child"
JOB_PROCESS = "nvflare.private.fed.app.client.worker_process"
SITE_PROCESS = "nvflare.private.fed.app.client.client_train"


def load(task: Any, site: str, where: SiteConfiguration) -> Any:
    manifest = read_manifest(where.files["manifest"], task.labels, check_files=False)
    return load_cohort(site, manifest, where.files["bags"], task.target, task.encoder)


def wait(done: Callable[[], bool], seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("federation"), repository)
    with running.federation as federation:
        federation.start(environment=running.environment)
        yield running


def read_best(folder: Path) -> dict[str, dict[str, float]]:
    best: dict[str, dict[str, float]] = json.loads((folder / BEST_EVALUATION_FILE).read_text())
    return best


def test_staggered_sites_end_with_the_weights_of_the_in_process_runner(running: Running) -> None:
    """Real MEM, six rounds, another order of arrival in each: the same bytes."""
    running.delay(
        {"clinic-a": [1.0, 0, 0.5, 0, 1.0, 0], "clinic-b": [0.5, 0.5, 0, 1.0, 0, 0.5], "clinic-c": [0, 1.0]}
    )
    job = running.variant(best_metric="balanced_accuracy")
    job_id = running.submit(job)
    status, rows, folder = running.end(job_id)
    assert status == COMPLETED
    assert [row["taking_part"] for row in rows] == [list(SITES)] * ROUNDS
    orders = {tuple(sorted(SITES, key=lambda site: row["seconds"][site]["training"])) for row in rows}
    assert orders != {SITES}, "they did not arrive in site order only"
    assert hash_state(load_file(folder / GLOBAL_MODEL_FILE)) == hash_state(running.in_process(job))
    model = read_model_file(folder, BagTask)  # as classify opens it
    assert (model.task, model.header.run, model.header.round) == (read_job(job).task, job_id, ROUNDS - 1)
    assert model.header.protocol_sha256 == hash_protocol(read_job(job).protocol)
    assert model.header.mosaic == {"mpp": model.task.mpp, "patch_px": model.task.patch_px}
    assert read_result(folder).pseudonyms == {"clinic-b": "river"}
    # The policies let the metric out: the best model is kept beside the last, and TensorBoard shows it.
    means = [statistics.fmean(site[METRIC] for site in row["metrics"].values()) for row in rows]
    best = read_model_header(folder / BEST_MODEL_FILE)
    told = (best.training["metric"], best.training["value"])
    assert told == (METRIC, pytest.approx(max(means)))
    assert best.round == means.index(max(means)) - 1, "of the model with which that round began"
    # At the end every site was asked about both.
    result = read_result(folder)
    assert result.evaluation_round is not None and result.evaluation_round["taking_part"] == list(SITES)
    task, cohorts = model.task, {site: load(model.task, site, where) for site, where in running.sites.items()}
    for file, said in ((GLOBAL_MODEL_FILE, result.evaluation), (BEST_MODEL_FILE, read_best(folder))):
        state = load_file(folder / file)
        tables = {site: predict(task, state, cohort, "test") for site, cohort in cohorts.items()}
        expected = {site: evaluate(table, bootstraps=0)["accuracy"].value for site, table in tables.items()}
        assert {site: figures["accuracy"] for site, figures in said.items()} == pytest.approx(expected)
    at_server = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {f"{METRIC}/{site}" for site in SITES} <= set(at_server.Tags()["scalars"])
    where = running.sites["clinic-a"].records / job_id / "tensorboard"
    assert {"loss", METRIC} <= set(EventAccumulator(str(where)).Reload().Tags()["scalars"])


def test_a_slow_site_is_waited_for_a_late_one_no_longer_than_said_and_a_trainer_that_dies_costs_one_round(
    running: Running,
) -> None:
    """In round 1 two fast sites wait for the slow one; in round 2 it takes longer than a round may.

    In round 4 another one's trainer is killed. Each is back in the next round. (Round 0 starts the trainers.)
    """
    running.delay({"clinic-b": [0.0, 0.0, 0.0, 0.0, 2.0, 0.0], "clinic-c": [0.0, 4.0, 30.0, 0.0]})
    job_id = running.submit(running.variant(round_seconds=25))
    running.until_asleep("clinic-b", 4)
    running.kill("clinic-b", TRAINER)
    status, rows, _ = running.end(job_id)
    assert status == COMPLETED
    assert [row["no_answer"] for row in rows] == [[], [], ["clinic-c"], [], [], []]
    assert [row["refused"] for row in rows] == [{}, {}, {}, {}, {"clinic-b": "TRAINER_DIED"}, {}]
    absent = {2: "clinic-c", 4: "clinic-b"}
    for row in rows:
        assert row["taking_part"] == [site for site in SITES if site != absent.get(row["round"])]
    assert rows[1]["seconds"]["clinic-a"]["waiting"] > 2.0
    assert 23.0 < rows[2]["unix_time"] - rows[1]["unix_time"] < 30.0


def test_a_job_goes_on_after_a_lost_job_process_and_then_after_a_lost_server(running: Running) -> None:
    """FLARE ends a job whose process at a site dies, and has no resume when the server does.

    ``resume`` goes on from the last round, twice, to the bytes: from what the lead has downloaded, and from
    what the server had written.
    """
    running.delay({site: [0.0, 0.0, 1.5] for site in SITES})
    job = running.variant()
    job_id = running.submit(job)
    running.until_round(job_id, 2)
    running.kill("clinic-a", JOB_PROCESS)
    status, rows, folder = running.end(job_id)
    assert status != COMPLETED
    assert len([row for row in rows if row.get("finished", True)]) < ROUNDS
    stopped = read_run(folder.parent)
    federation = running.federation
    job_id = running.submit(write_resumed(stopped, running.folder / "resumed"))
    running.until_round(job_id, stopped.next_round + 1)
    run_folder = federation.kits.kit("server") / job_id
    running.kill("server")
    wait(lambda: "server" not in federation.up())
    running.delay({})
    again = read_run(run_folder)
    assert stopped.next_round < again.next_round < ROUNDS
    resumed = write_resumed(again, running.folder / "after-the-server")
    federation.admin.disconnect()
    federation.start_one("server", environment=running.environment)
    wait(lambda: registered(federation) == set(SITES))
    status, rows, folder = running.end(running.submit(resumed))
    assert status == COMPLETED
    assert [row["round"] for row in rows] == list(range(ROUNDS)), "with the rounds of before"
    assert hash_state(load_file(folder / GLOBAL_MODEL_FILE)) == hash_state(running.in_process(job))


def registered(federation: Federation) -> set[str]:
    try:
        return set(federation.admin.registered())
    except HistoflareError:
        return set()


@pytest.mark.parametrize("name", ["comm_config.json", "config_fed_client.conf", "sub/job.toml"])
def test_a_job_with_another_file_is_refused_where_it_arrives(running: Running, name: str) -> None:
    job = running.variant()
    path = job / CONFIG_FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    before = len(running.federation.admin.jobs())
    with raises_reason("JOB_REFUSED", "JOB_INVALID"):
        running.submit(job)
    assert len(running.federation.admin.jobs()) == before


def test_sites_that_are_gone_for_good(running: Running) -> None:
    """The others go on while ``least_sites`` are there; the job ends and says why when they are not."""
    federation = running.federation
    running.delay({site: [0.0, 2.0] for site in SITES})
    job_id = running.submit(running.variant(least_sites=2))
    running.until_round(job_id, 1)
    running.kill("clinic-c")
    wait(lambda: any(row["taking_part"] == ["clinic-a", "clinic-b"] for row in running.finished(job_id)))
    running.kill("clinic-b")
    status, rows, _ = running.end(job_id)
    done = [row for row in rows if row.get("finished", True)]
    assert status != COMPLETED and len(done) < ROUNDS
    fewer = [row for row in done if row["taking_part"] != list(SITES)]
    assert fewer and fewer == done[-len(fewer) :]
    assert all(row["taking_part"] == ["clinic-a", "clinic-b"] for row in fewer), "none is closed on one"
    assert all(row["no_answer"] == ["clinic-c"] for row in fewer), "whose patients are not in it"
    assert rows[-1]["given_up"] == "1 of at least 2 sites are left"
    for site in ("clinic-b", "clinic-c"):
        federation.start_one(site, environment=running.environment)
    wait(lambda: registered(federation) == set(SITES))
