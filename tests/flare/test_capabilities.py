"""Admission, Gate and Guard by themselves: what is admitted, what leaves, what is stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, STREAM_DATA_TOPIC, StreamHeaderKey

from histoflare.flare import capabilities
from histoflare.flare.admission import Admission
from histoflare.flare.gate import Gate
from histoflare.flare.guard import Guard
from histoflare.flare.header_names import METRICS, NUMBERS, PSEUDONYM, RELEASE, WEIGHT
from histoflare.flare.job import read_application, read_job
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.site_keys import SimulatedKeys
from histoflare.flare.site_policy import policy_file, write_first_policy
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import Ledger
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import read_own_policy
from histoflare.privacy.plan import Open
from histoflare.privacy.policy import POLICIES
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.rounds.strategies import STRATEGIES
from histoflare.site.messages import TrainAnswer, digest_of
from histoflare.site.site_file import SITE_FILE, SITES_VARIABLE
from tests.privacy.ledgers import paths, site_lines

from ..rounds.throwaway import Paced
from .certified import hello_of
from .stand_in import StandInEngine

SECRET = "patient Doe"
TENSORS = {"w": np.array([0.5, -0.5], dtype=np.float32)}
NUMBERS_LISTED = 'numbers = ["steps", "loss_before", "loss_after"]'
NO_NUMBERS = "numbers = []"


class Site:
    """A site's job process: its kit, a deployed job, and the three parts of its policy."""

    def __init__(
        self,
        root: Path,
        repository: Path,
        changes: dict[str, Any] | None = None,
        job: str = "mem_fedavg",
        scope: str = "open",
    ) -> None:
        self.kit = root / "kit"
        self.scope = scope
        root.mkdir(parents=True, exist_ok=True)
        self.file = policy_file(scope)
        deployed = write_variant(repository / "jobs" / job, root / "job", changes or {})
        self.configuration = deployed / CONFIG_FOLDER
        self.kit.mkdir()
        lines = site_lines(root / "site", "clinic-a")
        (self.kit / SITE_FILE).write_text(f'manifest = "m.csv"\nbags = "bags"\n{lines}')
        self.ledger, self.ledger_key = paths(root / "site")
        (self.kit / policy_file(scope)).write_text((POLICIES / f"{scope}.toml").read_text())
        write_first_policy(self.kit)
        write_protocols(self.kit / PROTOCOL_FILE, [read_job(repository / "jobs" / "mem_fedavg").protocol])
        self.engine = StandInEngine(self.kit, configuration=self.configuration)
        self.guard = Guard()

    def policy(self, *change: str) -> None:
        path = self.kit / policy_file(self.scope)
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))

    def rewrite(self, name: str, *change: str) -> None:
        path = self.configuration / name
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))

    def own(self, *change: str) -> None:
        path = self.kit / OWN_POLICY_FILE
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))

    def admit(self, task_name: str = "train") -> FLContext:
        fl_ctx = self.engine.context("clinic-a")
        fl_ctx.set_prop(FLContextKey.TASK_NAME, task_name, private=True, sticky=False)
        fl_ctx.set_prop(FLContextKey.JOB_META, {"scope": self.scope}, private=True, sticky=False)
        task = Shareable()
        task.add_cookie("round", 3)
        assert Admission(self.file).process(task, fl_ctx) is task
        return fl_ctx

    def reply(self, answer: Shareable, fl_ctx: FLContext | None = None) -> Shareable:
        return Gate(self.file).process(answer, fl_ctx or self.admit())


@pytest.fixture
def site(tmp_path: Path, repository: Path) -> Site:
    return Site(tmp_path, repository)


@pytest.fixture
def telling(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose policy lists the numbers of the job's strategy."""
    site = Site(tmp_path, repository, {"strategy": {"name": "feddg_ga", "sites": ["clinic-a", "clinic-b"]}})
    site.policy(NUMBERS_LISTED, NO_NUMBERS)
    assert capabilities.refusal(site.admit()) == "NUMBER_NOT_ALLOWED", "none, unless it is listed"
    site.policy(NO_NUMBERS, NUMBERS_LISTED)
    assert capabilities.redeem(site.admit()) is not None
    return site


@pytest.fixture(autouse=True)
def _own_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(SITES_VARIABLE, raising=False)
    yield
    capabilities._issued.clear()
    capabilities._released.clear()


def update(tensors: dict[str, Any] = TENSORS, released: bool = True, **meta: Any) -> Shareable:
    if released:
        capabilities.release(tensors, 10, Open())
    return DXO(DataKind.WEIGHT_DIFF, data=tensors, meta={WEIGHT: 1.0, **meta}).to_shareable()


def with_numbers(numbers: Any, released: bool = True) -> Shareable:
    """Return an update with numbers beside it, as the executor lets both go."""
    if isinstance(numbers, dict) and SECRET not in numbers.values():
        capabilities.release(numbers, 10)
    return update(released=released, **{NUMBERS: numbers})


def code(reply: Shareable) -> str:
    return str(reply.get_return_code())


class TestAdmission:
    def test_admits_a_job_the_site_agreed_to_once_per_task(self, site: Site) -> None:
        fl_ctx = site.admit()
        admitted = capabilities.redeem(fl_ctx)
        assert admitted is not None and admitted.policy.name == "open" and admitted.rounds == 30
        assert capabilities.redeem(fl_ctx) is None, "a token works once"

    def test_what_was_released_in_one_task_cannot_leave_in_the_next(self, site: Site) -> None:
        capabilities.redeem(site.admit())
        capabilities.release(TENSORS, 10, Open())
        capabilities.redeem(site.admit())
        assert capabilities.take_release(TENSORS) is None

    def test_a_token_of_the_job_s_own_making_is_none(self, site: Site) -> None:
        fl_ctx = site.engine.context("clinic-a")
        fl_ctx.set_prop("histoflare_admitted", "0" * 32, private=True, sticky=False)
        assert capabilities.redeem(fl_ctx) is None
        assert capabilities.refusal(fl_ctx) == "NOT_ADMITTED"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"purpose": "marketing"}, "PURPOSE_NOT_ALLOWED"),
            ({"purpose": None}, "JOB_INVALID"),
            ({"protocol.mpp": 0.25}, "PROTOCOL_MISMATCH"),
            ({"rounds": 31}, "PROTOCOL_MISMATCH"),
            ({"protocol.metric": "auc"}, "PROTOCOL_MISMATCH"),
            ({"protocol.labels": ["a", "b"]}, "PROTOCOL_MISMATCH"),
        ],
    )
    def test_refuses_what_the_site_did_not_agree_to(
        self, tmp_path: Path, repository: Path, changes: dict[str, Any], reason: str
    ) -> None:
        site = Site(tmp_path, repository, changes)
        fl_ctx = site.admit()
        assert capabilities.redeem(fl_ctx) is None
        assert capabilities.refusal(fl_ctx) == reason

    @pytest.mark.parametrize("line", ["mpp = 0.25", 'labels = ["a", "b"]', "seed = 7", 'network = "unet"'])
    def test_a_task_cannot_say_what_the_protocol_decides(self, site: Site, line: str) -> None:
        site.rewrite("job.toml", "[task]\n", f"[task]\n{line}\n")
        assert capabilities.refusal(site.admit()) == "JOB_INVALID"

    def test_only_a_training_that_says_so_asks_about_its_model(
        self, tmp_path: Path, repository: Path
    ) -> None:
        asks = Site(tmp_path / "asks", repository)
        assert capabilities.redeem(asks.admit("train")) is not None
        assert capabilities.redeem(asks.admit("evaluate")) is not None
        for task in ("submit_model", "validate"):
            assert capabilities.refusal(asks.admit(task)) == "TASK_UNEXPECTED"
        silent = Site(tmp_path / "silent", repository, {"evaluate": False})
        assert capabilities.redeem(silent.admit("train")) is not None
        assert capabilities.refusal(silent.admit("evaluate")) == "TASK_UNEXPECTED"

    def test_images_of_a_stated_resolution_want_a_protocol_that_names_one(
        self, tmp_path: Path, repository: Path
    ) -> None:
        """The site cannot compare its scale with that of the others; what to set stands in its own log."""
        site = Site(tmp_path, repository, job="dhunet_fedavg")
        write_protocols(site.kit / PROTOCOL_FILE, [read_job(repository / "jobs" / "dhunet_fedavg").protocol])
        file = site.kit / SITE_FILE
        file.write_text(file.read_text() + 'images = "images.csv"\n')
        images = site.kit / "images.csv"
        images.write_text("image,mask,patient\ni.png,m.png,p\n")
        assert capabilities.redeem(site.admit()) is not None
        images.write_text("image,mask,patient,mpp\ni.png,m.png,p,0.25\n")
        fl_ctx = site.admit()
        assert capabilities.redeem(fl_ctx) is None and capabilities.refusal(fl_ctx) == "RESOLUTION_NOT_NAMED"
        (event,) = AuditLog(site.ledger.with_name("ledger.audit.jsonl")).read()
        assert "protocol.mpp" in event["detail"] and "0.25" in event["detail"] and event["do"]

    @pytest.mark.parametrize(
        "line",
        [
            'include file("/etc/passwd")',
            'include url("http://consortium.example/job.conf")',
            "seed = ${HOME}",
            'seed = "{$HOME}"',
            "seed = 1979-05-27",
            "seed = nan",
            'other = "research"',
        ],
    )
    def test_refuses_what_no_job_says(self, site: Site, line: str) -> None:
        site.rewrite("job.toml", "seed = 1\n", f"{line}\n")
        assert capabilities.refusal(site.admit()) == "JOB_INVALID"

    @pytest.mark.parametrize("text", ["{manifest[0]}", "${HOME}", "{$HOME}", "{WORKSPACE}"])
    def test_a_reference_is_a_text_like_any_other(self, site: Site, text: str) -> None:
        site.rewrite("job.toml", 'purpose = "research"', f'purpose = "{text}"')
        assert capabilities.refusal(site.admit()) == "PURPOSE_NOT_ALLOWED"
        assert read_application(site.configuration).purpose == text

    @pytest.mark.parametrize(
        "name", ["config_fed_client.conf", "comm_config.json", "sub/job.toml", "../custom/x.py"]
    )
    def test_refuses_a_job_with_other_files(self, site: Site, name: str) -> None:
        path = site.configuration / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        assert capabilities.refusal(site.admit()) == "JOB_INVALID"

    def test_flare_s_signatures_belong_to_a_job(self, site: Site) -> None:
        (site.configuration / ".__nvfl_sig.json").write_text("{}")
        assert capabilities.redeem(site.admit()) is not None

    def test_refuses_another_scope(self, site: Site) -> None:
        site.scope = "trusted"
        assert capabilities.refusal(site.admit()) == "SCOPE_UNKNOWN"

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("policy_open.toml", "POLICY_INVALID"),
            (OWN_POLICY_FILE, "POLICY_INVALID"),
            (PROTOCOL_FILE, "PROTOCOL_MISSING"),
        ],
    )
    def test_without_its_files_a_site_takes_no_job(self, site: Site, name: str, reason: str) -> None:
        (site.kit / name).unlink()
        assert capabilities.refusal(site.admit()) == reason

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (('"research"', '"teaching"'), "PURPOSE_NOT_ALLOWED"),
            (('"fedavg", ', ""), "STRATEGY_NOT_ALLOWED"),
            (('"mem", ', ""), "MODEL_NOT_ALLOWED"),
            (("# scopes = [", 'scopes = [] # ["'), "SCOPE_NOT_ALLOWED"),
            (("# minimum_patients = 10", "minimum_patients = 1"), "POLICY_INVALID"),
            (("purposes", "purposess"), "POLICY_INVALID"),
        ],
    )
    def test_the_steward_s_own_policy_says_what_the_site_takes_part_in(
        self, site: Site, change: tuple[str, str], reason: str
    ) -> None:
        site.own(*change)
        for task in ("train", "evaluate"):
            fl_ctx = site.admit(task)
            assert capabilities.redeem(fl_ctx) is None
            assert capabilities.refusal(fl_ctx) == reason

    def test_what_it_cannot_check_it_refuses_and_says_nothing_aloud(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(site.engine, "get_workspace", lambda: None)
        assert capabilities.refusal(site.admit()) == "NOT_ADMITTED"
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("ledger", "reason"),
    [("none", "LEDGER_MISSING"), ("a workstation's", "LEDGER_FOREIGN"), ("another's", "LEDGER_FOREIGN")],
)
def test_a_site_with_no_ledger_of_its_own_takes_no_job(site: Site, ledger: str, reason: str) -> None:
    path, key = paths(site.kit.parent / "other")
    if ledger == "a workstation's":
        Ledger.open_or_create(path, key, "clinic-a")
    elif ledger == "another's":
        Ledger.create(path, key, "clinic-b")
    text = 'manifest = "m.csv"\nbags = "bags"\n'
    named = "" if ledger == "none" else f'ledger = "{path}"\nledger_key = "{key}"\n'
    (site.kit / SITE_FILE).write_text(text + named)
    fl_ctx = site.admit()
    assert capabilities.redeem(fl_ctx) is None
    assert capabilities.refusal(fl_ctx) == reason
    log = site.kit / "records" / "audit.jsonl" if ledger == "none" else path.with_name("ledger.audit.jsonl")
    assert [event["reason"] for event in AuditLog(log).read()] == [reason]


class TestAdmissionUnderProtection:
    """The whole job is reserved with its first training task, or nothing is."""

    def site(self, tmp_path: Path, repository: Path, changes: dict[str, Any] | None = None) -> Site:
        site = Site(tmp_path, repository, changes, job="mem_dpsgd", scope="dp-patient")
        rows = [
            f"{n}.tif,p{n},{'solid' if n % 2 else 'glandular'},{'test' if n > 5 else 'train'}"
            for n in range(8)
        ]
        (site.kit / "m.csv").write_text("\n".join(["slide,patient,label,split", *rows]) + "\n")
        return site

    def test_reserves_the_job_with_its_training_and_not_before(
        self, tmp_path: Path, repository: Path
    ) -> None:
        site = self.site(tmp_path, repository, {"evaluate": False})
        ledger = Ledger(site.ledger, site.ledger_key)
        assert capabilities.redeem(site.admit("evaluate")) is None
        assert ledger.verify().entries == 1
        admitted = capabilities.redeem(site.admit("train"))
        assert admitted is not None and admitted.rounds == 30
        (run,) = ledger.summary(admitted.bookkeeping.budget).runs
        assert (run.rounds, run.booked, run.patients) == (30, 0, 6)
        assert run.spend == admitted.bookkeeping.plan.spend()
        assert run.epsilon <= 8.0

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"strategy.weighting": "samples"}, "WEIGHT_NOT_ALLOWED"),
            ({"privacy.budget_epsilon": 8.1, "privacy.budget_share": 1.0}, "BUDGET_EXHAUSTED"),
            ({"privacy.noise_multiplier": 0.0, "privacy.budget_share": None}, "BUDGET_EXHAUSTED"),
            ({"privacy.noise_seed": 1}, "PRIVACY_MISMATCH"),
            ({"privacy.record": "slide", "privacy.slides_per_patient": 1}, "PRIVACY_MISMATCH"),
        ],
    )
    def test_refuses_what_the_policy_does_not_allow(
        self, tmp_path: Path, repository: Path, changes: dict[str, Any], reason: str
    ) -> None:
        site = self.site(tmp_path, repository, changes)
        fl_ctx = site.admit("train")
        assert capabilities.redeem(fl_ctx) is None
        assert capabilities.refusal(fl_ctx) == reason
        events = list(AuditLog(site.ledger.with_name("ledger.audit.jsonl")).read())
        assert [event["reason"] for event in events] == [reason], "the detail is in the site's own log"

    def test_a_listed_strategy_that_the_plan_refuses_stays_refused(
        self, tmp_path: Path, repository: Path
    ) -> None:
        """It keeps layers at the site: booked steps could start from what nobody booked."""
        site = self.site(tmp_path, repository, {"strategy.share": ["head"]})
        listed = read_own_policy(site.kit / OWN_POLICY_FILE).strategies
        assert "fedavg" in listed
        assert capabilities.refusal(site.admit("train")) == "PRIVACY_INVALID"

    def test_the_steward_s_own_budget_is_the_one_that_counts(self, tmp_path: Path, repository: Path) -> None:
        site = self.site(tmp_path, repository)  # a quarter of the kit's 8
        site.own("# epsilon = 4.0", "epsilon = 2.0")
        assert capabilities.refusal(site.admit("train")) == "BUDGET_EXHAUSTED"
        site = self.site(tmp_path / "share", repository)
        site.own("# job_share = 0.25", "job_share = 0.2")
        assert capabilities.refusal(site.admit("train")) == "JOB_SHARE_EXCEEDED"
        site = self.site(tmp_path / "other", repository)
        site.own("# epsilon = 4.0", "epsilon = 7.5")
        admitted = capabilities.redeem(site.admit("train"))
        assert admitted is not None and admitted.bookkeeping.budget.epsilon == 7.5

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"protocol.max_patches": None}, "PRIVACY_INVALID"),
            ({"answer_seconds": None}, "JOB_INVALID"),
            ({"answer_seconds": 0}, "JOB_INVALID"),
        ],
    )
    def test_refuses_a_job_whose_time_would_tell(
        self, tmp_path: Path, repository: Path, changes: dict[str, Any], reason: str
    ) -> None:
        assert capabilities.refusal(self.site(tmp_path, repository, changes).admit("train")) == reason

    @pytest.mark.parametrize(("seconds", "reason"), [(None, "PRIVACY_INVALID"), (5, "NOT_ADMITTED")])
    def test_an_evaluation_says_when_it_is_answered(
        self, tmp_path: Path, repository: Path, seconds: int | None, reason: str
    ) -> None:
        site = Site(tmp_path, repository, {"answer_seconds": seconds}, job="mem_evaluate", scope="dp-patient")
        fl_ctx = site.admit("evaluate")
        assert (capabilities.redeem(fl_ctx) is None) == (seconds is None)
        assert capabilities.refusal(fl_ctx) == reason

    def test_a_new_kit_finds_what_its_patients_have_spent(self, tmp_path: Path, repository: Path) -> None:
        half = {"privacy.budget_share": 0.5}
        first = self.site(tmp_path / "first", repository, half)
        assert capabilities.redeem(first.admit("train")) is not None
        for kit in ("second", "third", "fourth"):
            site = self.site(tmp_path / kit, repository, half | {"run": kit})
            own = (first.kit / SITE_FILE).read_text()
            (site.kit / SITE_FILE).write_text(own)  # as the steward carries it over
            admitted = site.admit("train")
            assert (capabilities.redeem(admitted) is not None) == (kit == "second"), "two halves"
            assert kit == "second" or capabilities.refusal(admitted) == "BUDGET_EXHAUSTED"

    def test_where_the_exhausted_are_left_out_a_used_up_budget_shows_nowhere(
        self, tmp_path: Path, repository: Path
    ) -> None:
        """The third job has nobody left to train on: it is admitted as the first, and so is its update."""
        half = {"privacy.budget_share": 0.5}
        first = self.site(tmp_path / "first", repository, half)
        said = []
        for name in ("first", "second", "third"):
            site = first if name == "first" else self.site(tmp_path / name, repository, half | {"run": name})
            if site is not first:
                (site.kit / SITE_FILE).write_text((first.kit / SITE_FILE).read_text())
            site.policy('exhausted = "refuse"', 'exhausted = "leave out"')
            fl_ctx = site.admit("train")
            admitted = capabilities.redeem(fl_ctx)
            assert admitted is not None, capabilities.refusal(fl_ctx)
            bookkeeping = admitted.bookkeeping
            assert bookkeeping.roles is not None
            trained_on = {name for name, role in bookkeeping.roles.items() if role == "train"}
            assert bookkeeping.left_out == (trained_on if name == "third" else frozenset())

            def train() -> TrainAnswer:
                return TrainAnswer(dict(TENSORS), 1.0, {}, patients=6)

            answer = bookkeeping.train({"w": np.zeros(2, np.float32)}, 0, train).answer
            capabilities.release(answer.tensors, answer.patients, bookkeeping.plan)
            reply = site.reply(update(answer.tensors, released=False), fl_ctx)
            said.append((code(reply), repr(from_shareable(reply).meta)))
        assert said[0] == said[1] == said[2]
        told = AuditLog(first.ledger.with_suffix(".audit.jsonl")).read()
        assert [each["left_out"] for each in told if each["what"] == "reserved"] == [0, 0, len(trained_on)]

    def test_something_else_in_the_place_of_the_plan_is_refused(
        self, tmp_path: Path, repository: Path
    ) -> None:
        site = self.site(tmp_path, repository, {"privacy.mechanism": "fedavg"})
        assert capabilities.refusal(site.admit("train")) == "JOB_INVALID"

    def test_a_run_s_name_is_no_path(self, tmp_path: Path, repository: Path) -> None:
        site = self.site(tmp_path, repository, {"run": "../../elsewhere"})
        assert capabilities.refusal(site.admit("train")) == "JOB_INVALID"

    def test_only_what_the_ledger_holds_as_released_leaves(self, tmp_path: Path, repository: Path) -> None:
        site = self.site(tmp_path, repository)
        fl_ctx = site.admit("train")
        admitted = capabilities.redeem(fl_ctx)
        assert admitted is not None
        reply = site.reply(update(), fl_ctx)  # noted in this process, and unknown to the ledger
        assert code(reply) == "REFUSED_NOT_RELEASED"

        def train() -> TrainAnswer:
            return TrainAnswer(dict(TENSORS), 1.0, {}, patients=6)

        answer = admitted.bookkeeping.train({"w": np.zeros(2, np.float32)}, 0, train).answer
        capabilities.release(answer.tensors, answer.patients, admitted.bookkeeping.plan)
        sent = site.reply(update(answer.tensors, released=False), fl_ctx)
        assert code(sent) == ReturnCode.OK
        stamp = from_shareable(sent).meta[RELEASE]
        assert (stamp["mechanism"], stamp["spend"]) == ("dp-sgd", admitted.bookkeeping.plan.spend().to_json())

    def test_only_numbers_without_data_leave_beside_a_protected_update(
        self, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(STRATEGIES, "fedavg", f"{Paced.__module__}:Paced")
        monkeypatch.setattr(Paced, "name", "fedavg")
        site = self.site(tmp_path, repository, {"strategy": {"name": "fedavg"}})
        assert capabilities.refusal(site.admit("train")) == "NUMBER_NOT_ALLOWED"
        site.policy("counts = false", 'counts = false\nnumbers = ["planned_steps"]')
        fl_ctx = site.admit("train")
        admitted = capabilities.redeem(fl_ctx)
        assert admitted is not None

        def train() -> TrainAnswer:
            return TrainAnswer(dict(TENSORS), 1.0, {}, patients=6, numbers={"planned_steps": 3.0})

        for again in (False, True):  # the second is what was released, from the disk
            answer = admitted.bookkeeping.train({"w": np.zeros(2, np.float32)}, 0, train)
            assert answer.again is again and answer.answer.numbers == {"planned_steps": 3.0}
            capabilities.release(answer.answer.tensors, 6, admitted.bookkeeping.plan)
            sent = site.reply(with_numbers(answer.answer.numbers, released=False), fl_ctx)
            assert code(sent) == ReturnCode.OK
            assert from_shareable(sent).meta[NUMBERS] == {"planned_steps": 3.0}
        monkeypatch.setattr(Paced, "numbers", {"planned_steps": True})
        assert capabilities.refusal(site.admit("train")) == "PRIVACY_INVALID"
        capabilities.release(answer.answer.tensors, 6, admitted.bookkeeping.plan)
        sent = site.reply(with_numbers({"planned_steps": 3.0}, released=False), fl_ctx)
        assert code(sent) == "REFUSED_NUMBER_NOT_ALLOWED", "the gate does not rely on the door"


class TestGate:
    def test_an_update_leaves_as_it_was_released_with_its_stamp(self, site: Site) -> None:
        reply = site.reply(update())
        dxo = from_shareable(reply)
        assert code(reply) == ReturnCode.OK
        np.testing.assert_array_equal(dxo.data["w"], TENSORS["w"])
        stamp = {"digest": digest_of(TENSORS), "scope": "open", "mechanism": "open"}
        stamp |= {"spend": Open().spend().to_json(), "seeded_noise": False}
        assert dxo.meta == {WEIGHT: 1.0, RELEASE: stamp}

    def test_nothing_planted_in_a_reply_leaves(self, site: Site) -> None:
        fl_ctx = site.admit()
        answer = update(note=SECRET, initial_metrics={SECRET: 1.0})
        answer.set_header("x", SECRET)
        answer.add_cookie("x", SECRET)
        answer["x"] = SECRET
        task = capabilities.kept_task(fl_ctx)
        assert task is not None
        task.data.add_cookie("x", SECRET)
        reply = site.reply(answer, fl_ctx)
        assert code(reply) == ReturnCode.OK
        assert SECRET not in repr(dict(reply))
        assert task.data.get_cookie_jar() == {"round": 3}, "FLARE copies these onto the reply"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (lambda: update(released=False), "NOT_RELEASED"),
            (lambda: update({"w": np.array([np.nan], dtype=np.float32)}), "NOT_FINITE"),
            (lambda: update({SECRET: TENSORS["w"]}, released=False), "NOT_RELEASED"),
            (lambda: update(**{WEIGHT: SECRET}), "WEIGHTS_INVALID"),
            (lambda: update(**{WEIGHT: -1.0}), "WEIGHTS_INVALID"),
            (lambda: update(**{WEIGHT: float("nan")}), "WEIGHTS_INVALID"),
            (lambda: update(**{METRICS: {"auc": 1.0}}), "NOT_RELEASED"),
            (lambda: DXO(DataKind.WEIGHTS, data=TENSORS).to_shareable(), "REPLY_NOT_ALLOWED"),
            (lambda: DXO(DataKind.ANALYTIC, data={"x": SECRET}).to_shareable(), "REPLY_NOT_ALLOWED"),
            (lambda: DXO(DataKind.METRICS, data={SECRET: 1.0}).to_shareable(), "NOT_RELEASED"),
            (lambda: Shareable({"x": SECRET}), "REPLY_NOT_ALLOWED"),
            (lambda: make_reply(SECRET), "REPLY_NOT_ALLOWED"),
            (lambda: make_reply(f"REFUSED_{SECRET}"), "REPLY_NOT_ALLOWED"),
            (lambda: make_reply("REFUSED_TRAINING_FAILED", headers={"x": SECRET}), "TRAINING_FAILED"),
            (lambda: make_reply(ReturnCode.TASK_UNKNOWN), "TASK_UNEXPECTED"),
            (lambda: make_reply(ReturnCode.UNSAFE_JOB), "REPLY_NOT_ALLOWED"),
            (lambda: make_reply(ReturnCode.EXECUTION_EXCEPTION), "REPLY_NOT_ALLOWED"),
        ],
    )
    def test_everything_else_becomes_a_fixed_code(
        self, site: Site, answer: Callable[[], Shareable], reason: str
    ) -> None:
        reply = site.reply(answer())
        assert code(reply) == f"REFUSED_{reason}"
        assert SECRET not in repr(dict(reply)) and "DXO" not in reply

    def test_a_release_leaves_once(self, site: Site) -> None:
        answer = update()
        assert code(site.reply(answer)) == ReturnCode.OK
        assert code(site.reply(answer)) == "REFUSED_NOT_RELEASED"

    def test_a_byte_changed_after_the_release_stops_it(self, site: Site) -> None:
        answer = update({"w": TENSORS["w"].copy()})
        answer["DXO"]["data"]["w"][0] += 1e-7
        assert code(site.reply(answer)) == "REFUSED_NOT_RELEASED"

    def test_too_few_patients_send_nothing(self, site: Site) -> None:
        capabilities.release(TENSORS, patients=1)
        reply = site.reply(update(released=False))
        assert code(reply) == "REFUSED_TOO_FEW_PATIENTS"

    def test_a_count_as_a_weight_needs_the_policy_s_leave(self, site: Site) -> None:
        assert code(site.reply(update(**{WEIGHT: 40.0}))) == ReturnCode.OK
        site.policy("counts = true", "counts = false")
        assert code(site.reply(update(**{WEIGHT: 40.0}))) == "REFUSED_WEIGHT_NOT_ALLOWED"
        assert code(site.reply(update(**{WEIGHT: 1.0}))) == ReturnCode.OK

    def test_only_listed_metrics_leave(self, site: Site) -> None:
        metrics = {"auc": 0.5, "accuracy": None, "n_patients": 12, "loss": 0.1, SECRET: 1.0}
        capabilities.release(metrics, patients=12)
        reply = site.reply(DXO(DataKind.METRICS, data=metrics).to_shareable())
        assert from_shareable(reply).data == {"auc": 0.5, "accuracy": None, "n_patients": 12.0}

    def test_metrics_of_which_none_is_listed_send_nothing(self, site: Site) -> None:
        capabilities.release({"loss": 1.0}, patients=12)
        reply = site.reply(DXO(DataKind.METRICS, data={"loss": 1.0}).to_shareable())
        assert code(reply) == "REFUSED_METRIC_NOT_ALLOWED"

    def test_numbers_leave_beside_an_update_if_declared_and_listed(self, telling: Site) -> None:
        numbers = {"loss_before": 5.0, "loss_after": 0.25}
        reply = telling.reply(with_numbers(numbers))
        assert code(reply) == ReturnCode.OK and from_shareable(reply).meta[NUMBERS] == numbers
        assert capabilities.is_permitted(reply)
        from_shareable(reply).meta[NUMBERS]["loss_before"] = 6.0
        assert not capabilities.is_permitted(reply)

    @pytest.mark.parametrize(
        ("numbers", "reason"),
        [
            ({"loss_before": 5.0, "loss_after": float("nan")}, "NOT_FINITE"),
            ({"loss_before": float("inf"), "loss_after": 0.25}, "NOT_FINITE"),
            ({"loss_before": 5, "loss_after": 0.25}, "NOT_FINITE"),
            ({"loss_before": 5.0, "loss_after": 0.25, SECRET: 1.0}, "NUMBER_NOT_ALLOWED"),
            ({"loss_before": 5.0, "loss_after": 0.25, "auc": 1.0}, "NUMBER_NOT_ALLOWED"),
            ({"loss_before": 5.0}, "NUMBER_NOT_ALLOWED"),
            ({"loss_before": 5.0, "loss_after": SECRET}, "REPLY_NOT_ALLOWED"),
            ([5.0, 0.25], "NOT_RELEASED"),
            (SECRET, "NOT_RELEASED"),
        ],
    )
    def test_no_other_number_leaves(self, telling: Site, numbers: Any, reason: str) -> None:
        reply = telling.reply(with_numbers(numbers))
        assert code(reply) == f"REFUSED_{reason}"
        assert SECRET not in repr(dict(reply)) and "DXO" not in reply

    def test_a_number_that_the_executor_did_not_let_go_stays(self, telling: Site) -> None:
        answer = with_numbers({"loss_before": 5.0, "loss_after": 0.25})
        answer["DXO"]["meta"][NUMBERS] = {"loss_before": 5.0, "loss_after": 0.26}
        assert code(telling.reply(answer)) == "REFUSED_NOT_RELEASED"

    def test_numbers_that_no_policy_lists_stay(self, telling: Site) -> None:
        fl_ctx = telling.admit()
        telling.own("# numbers = []", 'numbers = ["loss_before"]')
        answer = with_numbers({"loss_before": 5.0, "loss_after": 0.25})
        assert code(telling.reply(answer, fl_ctx)) == "REFUSED_NUMBER_NOT_ALLOWED"
        assert capabilities.refusal(telling.admit()) == "NUMBER_NOT_ALLOWED"

    def test_a_strategy_without_numbers_sends_none(self, site: Site) -> None:
        answer = with_numbers({"loss_before": 5.0, "loss_after": 0.25})
        assert code(site.reply(answer)) == "REFUSED_NUMBER_NOT_ALLOWED"

    def test_a_hello_leaves_once_and_with_nothing_beside_it(self, site: Site) -> None:
        said = hello_of("clinic-a", SimulatedKeys())

        def answer() -> Shareable:
            reply = DXO(DataKind.APP_DEFINED, data=dict(said), meta={SECRET: SECRET}).to_shareable()
            reply.set_header("note", SECRET)
            return reply

        fl_ctx = site.admit()
        capabilities.release_hello(said)
        reply = site.reply(answer(), fl_ctx)
        assert from_shareable(reply).data == said and SECRET not in repr(dict(reply))
        assert capabilities.is_permitted(reply)
        from_shareable(reply).data["nonce"] = said["key"]
        assert not capabilities.is_permitted(reply)
        assert code(site.reply(answer(), fl_ctx)) == "REFUSED_NOT_RELEASED"

    @pytest.mark.parametrize("change", [{"nonce": SECRET}, {"more": SECRET}, {"site": SECRET}])
    def test_no_other_hello_leaves(self, site: Site, change: dict[str, str]) -> None:
        """A hello would have room for what nobody booked."""
        said = hello_of("clinic-a", SimulatedKeys())
        answer = DXO(DataKind.APP_DEFINED, data={**said, **change}).to_shareable()
        for released, reason in ((said, "NOT_RELEASED"), ({**said, **change}, None)):
            capabilities.release_hello(released)
            reply = site.reply(answer)
            assert code(reply) == f"REFUSED_{reason}" if reason else code(reply) != ReturnCode.OK
            assert SECRET not in repr(dict(reply)) and "DXO" not in reply

    def test_metrics_beside_an_update_are_cut_to_the_list(self, site: Site) -> None:
        metrics = {"validation/auc": 0.75, "validation/loss": 3.0}
        capabilities.release(metrics, patients=5)
        reply = site.reply(update(**{METRICS: metrics}))
        assert from_shareable(reply).meta[METRICS] == {"validation/auc": 0.75}

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (("# minimum_patients = 10", "minimum_patients = 11"), "TOO_FEW_PATIENTS"),
            (("# counts = false", "counts = false"), "WEIGHT_NOT_ALLOWED"),
            (("# scopes = [", 'scopes = [] # ["'), "SCOPE_NOT_ALLOWED"),
            (("# counts = false", "counts = 0"), "POLICY_INVALID"),
        ],
    )
    def test_what_the_steward_narrows_holds_at_once(
        self, site: Site, change: tuple[str, str], reason: str
    ) -> None:
        fl_ctx = site.admit()
        site.own(*change)
        assert code(site.reply(update(**{WEIGHT: 40.0}), fl_ctx)) == f"REFUSED_{reason}"

    def test_metrics_that_the_steward_takes_out_stay(self, site: Site) -> None:
        fl_ctx = site.admit()
        site.own("# metrics =", 'metrics = ["auc"] #')
        metrics = {"auc": 0.5, "accuracy": 0.25}
        capabilities.release(metrics, patients=12)
        reply = site.reply(DXO(DataKind.METRICS, data=metrics).to_shareable(), fl_ctx)
        assert from_shareable(reply).data == {"auc": 0.5}

    def test_without_its_policy_nothing_leaves(self, site: Site) -> None:
        fl_ctx = site.admit()
        (site.kit / policy_file("open")).unlink()
        assert code(site.reply(update(), fl_ctx)) == "REFUSED_POLICY_INVALID"

    def test_the_pseudonym_of_the_site_goes_with_every_reply(self, site: Site) -> None:
        (site.kit / SITE_FILE).write_text('manifest = "m.csv"\nbags = "bags"\npseudonym = "river"\n')
        for answer in (update(), make_reply("REFUSED_JOB_INVALID")):
            assert site.reply(answer).get_header(PSEUDONYM) == "river"


class TestGuard:
    def send(self, site: Site, tamper: Callable[[Shareable, FLContext], None]) -> Shareable:
        """Return the reply as it goes on the wire, after something has had its hands on it."""
        fl_ctx = site.admit()
        reply = site.reply(update(), fl_ctx)
        tamper(reply, fl_ctx)
        fl_ctx.set_prop(FLContextKey.TASK_RESULT, reply, private=True, sticky=False)
        site.guard.handle_event(EventType.AFTER_TASK_RESULT_FILTER, fl_ctx)
        reply.set_cookie_jar({"round": 3, "x": SECRET})
        reply.set_header("later", SECRET)
        fl_ctx.set_prop("x", SECRET, private=False, sticky=False)
        site.guard.handle_event(EventType.BEFORE_SEND_TASK_RESULT, fl_ctx)
        assert SECRET not in repr(fl_ctx.get_all_public_props())
        assert SECRET not in repr(dict(reply))
        assert reply.get_cookie_jar() == {"round": 3}
        return reply

    def test_the_gate_s_reply_passes(self, site: Site) -> None:
        reply = self.send(site, lambda reply, _: reply.set_header(ReservedHeaderKey.TASK_ID, "t"))
        assert code(reply) == ReturnCode.OK
        assert reply.get_header(ReservedHeaderKey.TASK_ID) == "t"

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda reply, _: reply.update({"x": SECRET}),
            lambda reply, _: reply["DXO"]["meta"].update({"x": SECRET}),
            lambda reply, _: reply["DXO"]["data"].update({SECRET: np.zeros(1)}),
            lambda reply, _: reply["DXO"].update({"data": {"w": TENSORS["w"] + 1}}),
            lambda reply, _: reply.set_return_code(SECRET),
            lambda reply, _: reply.set_header(PSEUDONYM, SECRET),
        ],
        ids=["key", "meta", "tensor", "bytes", "code", "pseudonym"],
    )
    def test_a_reply_changed_after_the_gate_is_replaced(
        self, site: Site, tamper: Callable[[Shareable, FLContext], None]
    ) -> None:
        assert code(self.send(site, tamper)) == "REFUSED_REPLY_CHANGED"

    def test_a_header_added_after_the_gate_is_taken_off(self, site: Site) -> None:
        reply = self.send(site, lambda reply, _: reply.set_header("x", SECRET))
        assert code(reply) == ReturnCode.OK

    @pytest.mark.parametrize(
        ("channel", "topic", "passes"),
        [
            ("server_command", "get_task", True),
            ("server_command", "submit_update", True),
            ("aux_communication", "__job_heartbeat__", True),
            ("aux_communication", "fed.event", False),
            ("server_command", "anything", False),
            ("my_channel", "my_topic", False),
            ("", "", False),
        ],
    )
    def test_only_what_a_job_needs_leaves_the_cell(self, channel: str, topic: str, passes: bool) -> None:
        direct = Message({MessageHeaderKey.CHANNEL: channel, MessageHeaderKey.TOPIC: topic})
        streamed = Message(
            {
                MessageHeaderKey.CHANNEL: STREAM_CHANNEL,
                MessageHeaderKey.TOPIC: STREAM_DATA_TOPIC,
                StreamHeaderKey.CHANNEL: channel,
                StreamHeaderKey.TOPIC: topic,
            }
        )
        for message in (direct, streamed):
            stopped = Guard().stop_unless_needed(message)
            assert (stopped is None) is passes
            if stopped is not None:
                assert stopped.payload is None


def test_what_a_job_names_cannot_stand_in_for_the_site_s_parts(repository: Path) -> None:
    """A job that brought its own gate could make the server believe in a stamp."""
    from histoflare.flare.allowed import ALLOWED_CLASSES, SITE_CLASSES

    assert not set(ALLOWED_CLASSES) & set(SITE_CLASSES)
    for path in (repository / "jobs").rglob("*.conf"):
        assert not [name for name in SITE_CLASSES if name in path.read_text()]
    assert json.dumps(ALLOWED_CLASSES).count("histoflare.") == len(ALLOWED_CLASSES)
