"""Shared noise through all shims in one process: admission, executor, gate, workflow, aggregator, ledger."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from histoflare.bags.cohort import load_cohort
from histoflare.flare import capabilities
from histoflare.flare import executor as executor_module
from histoflare.flare.admission import Admission
from histoflare.flare.aggregator import SiteOrderAggregator
from histoflare.flare.executor import SiteExecutor
from histoflare.flare.gate import Gate
from histoflare.flare.header_names import ATTEMPT, TOTAL_ROUNDS
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kit_signature import sign_kit
from histoflare.flare.site_keys import SiteKeys
from histoflare.flare.site_policy import policy_file, write_first_policy
from histoflare.flare.tensors import as_arrays, as_state
from histoflare.flare.workflow import AskingScatterAndGather
from histoflare.privacy.own_policy_edit import pin_sites
from histoflare.privacy.policy import POLICIES, read_policy
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, hash_state, model_state
from histoflare.site.ledgers import on_workstation, open_ledger
from histoflare.site.pace import Pace
from histoflare.site.site_file import SITE_FILE, write_site_file
from histoflare.site.work import SiteWork
from histoflare.slides.manifest import read_manifest

from .bags_on_disk import write_site
from .certified import Consortium
from .stand_in import StandInEngine, come_from
from .test_secure_sum import SHARED, SMALL

SITES = ("clinic-a", "clinic-b", "clinic-c")
ROUNDS = 2
SCOPE = "dp-shared"


class NearTrainer:
    """Trains here, and not in a process of its own."""

    pid: int | None = None

    def __init__(self, setup: Any, say: Any) -> None:
        self._work = SiteWork(setup, say)

    def prepare(self, *, to_train: bool = True, left_out: Any, stopped: Any) -> None:
        self._work.prepare(to_train, left_out)
        self.pid = 1

    def train(self, state: Any, index: int, total: int, *, metrics: Any, left_out: Any, stopped: Any) -> Any:
        return self._work.train(state, index, total, metrics, left_out)


class Consortium3:
    """Three sites with kits, pins and ledgers, and a server; tasks go from one to the other by hand."""

    def __init__(self, folder: Path, repository: Path) -> None:
        changes = {"transport.name": "masked_sum", "rounds": ROUNDS, "least_sites": 3, **SMALL, **SHARED}
        deployed = write_variant(repository / "jobs" / "mem_dpsgd", folder / "job", changes, scope=SCOPE)
        self.job = read_job(deployed)
        self.where = {site: on_workstation(site, write_site(folder / "data", site)) for site in SITES}
        self.engines, self.executors = {}, {site: SiteExecutor() for site in SITES}
        consortium = Consortium(folder / "kits")
        kits = {site: consortium.kit(site) for site in SITES}
        pins = {site: SiteKeys.of_kit(kit).fingerprint for site, kit in kits.items()}
        for site, kit in kits.items():
            local = kit / "local"
            local.mkdir()
            text = (POLICIES / f"{SCOPE}.toml").read_text()
            (local / policy_file(SCOPE)).write_text(
                text.replace("seeded_noise = false", "seeded_noise = true")
            )
            write_first_policy(local)
            pin_sites(local, pins)
            write_protocols(local / PROTOCOL_FILE, [self.job.protocol])
            write_site_file(local / SITE_FILE, self.where[site])
            sign_kit(kit, consortium.key)
            self.engines[site] = StandInEngine(local, configuration=deployed / CONFIG_FOLDER)
        self.server = StandInEngine(folder / "server", SITES, configuration=deployed / CONFIG_FOLDER)
        self.server.folder.mkdir()
        self.aggregator = SiteOrderAggregator()
        self.workflow = AskingScatterAndGather(str(deployed / "app" / "custom"))
        self.workflow._engine, self.workflow.communicator = self.server, self
        self.workflow.aggregator = self.aggregator
        self.lost: tuple[str, int, int] | None = None
        """Site, round and attempt whose training comes to nothing."""
        self.answered: list[tuple[str, str, str]] = []

    def get_client_disconnect_time(self, site: str) -> None:
        return None

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, targets: list[str], *_: Any) -> None:
        for site in targets:
            index = task.data.get_header(AppConstants.CURRENT_ROUND)
            if task.name == "train" and (site, index, task.data.get_header(ATTEMPT)) == self.lost:
                continue
            result = self.ask(site, task.name, task.data)
            self.answered.append((site, task.name, str(result.get_return_code())))
            client_task = SimpleNamespace(client=SimpleNamespace(name=site), task=task, result=result)
            task.before_task_sent_cb(client_task, fl_ctx)
            task.result_received_cb(client_task, come_from(site, fl_ctx))

    def ask(self, site: str, name: str, sent: Shareable) -> Shareable:
        """Return a site's answer to a task, as FLARE has its parts called."""
        fl_ctx, task = self.engines[site].context(site), copy.deepcopy(sent)
        fl_ctx.set_prop(FLContextKey.TASK_NAME, name, private=True, sticky=False)
        fl_ctx.set_prop(FLContextKey.JOB_META, {"scope": SCOPE}, private=True, sticky=False)
        admission = self.admissions.setdefault(site, Admission(policy_file(SCOPE)))
        admission.process(task, fl_ctx)
        reply = self.executors[site].execute(name, task, fl_ctx, Signal())
        left = Gate(policy_file(SCOPE)).process(reply, fl_ctx)
        assert capabilities.is_permitted(left)
        left.set_cookie_jar(dict(task.get_cookie_jar() or {}))
        return left

    def run(self) -> State:
        """Run all rounds and return the last model."""
        self.admissions: dict[str, Admission] = {}
        state = model_state(self.job.task.build_model())
        for index in range(ROUNDS):
            fl_ctx = self.server.context("server")
            weights = as_arrays(state)
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, {ModelLearnableKey.WEIGHTS: weights}, private=True)
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, index, private=True)
            self.workflow._current_round = index
            data = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
            data.set_header(TOTAL_ROUNDS, ROUNDS)
            data.set_header(AppConstants.CURRENT_ROUND, index)
            data.add_cookie(AppConstants.CONTRIBUTION_ROUND, index)
            task = Task(
                "train",
                data,
                timeout=self.job.round_seconds,
                before_task_sent_cb=self.workflow._prepare_train_task_data,
                result_received_cb=self.workflow._process_train_result,
            )
            self.workflow.broadcast_and_wait(task, fl_ctx, abort_signal=Signal())
            state = as_state(from_shareable(self.aggregator.aggregate(fl_ctx)).data)
            self.workflow.handle_event(AppEventType.ROUND_DONE, fl_ctx)
            self.aggregator.reset(fl_ctx)
        return state


def test_shared_noise_ends_with_the_bytes_of_the_runner_and_a_void_round_is_paid_for(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "Trainer", NearTrainer)
    monkeypatch.setattr(Pace, "close", lambda *_: True)
    made = Consortium3(tmp_path, repository)
    made.lost = ("clinic-b", 1, 0)
    state = made.run()
    assert {code for *_, code in made.answered} <= {"None", ReturnCode.OK}, made.answered
    cohorts = {}
    for site, where in made.where.items():
        task = made.job.task
        manifest = read_manifest(where.files["manifest"], task.labels, check_files=False)
        cohorts[site] = load_cohort(site, manifest, where.files["bags"], task.target, task.encoder)
    job = made.job
    run = run_in_process(job.task, cohorts, job.strategy, ROUNDS, job.seed, job.plan, transport=job.transport)
    assert hash_state(state) == hash_state(run.state)
    budget = read_policy(POLICIES / f"{SCOPE}.toml").protection.budget()  # type: ignore[union-attr]
    paid = {}
    for site in SITES:
        (booked,) = open_ledger(made.where[site]).summary(budget).runs
        paid[site] = (booked.rounds, booked.booked, booked.released)
        events = [
            each["body"] for each in open_ledger(made.where[site]).events() if each["kind"] == "booking"
        ]
        assert {each["mechanism"]["countable"] for each in events} == {len(SITES)}
        assert len({each["model"] for each in events}) == booked.booked, "each under its own transcript"
    assert paid == {"clinic-a": (3, 3, 3), "clinic-b": (3, 2, 2), "clinic-c": (3, 3, 3)}
