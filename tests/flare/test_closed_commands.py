"""What a server may tell a site's processes to do, and what it learns from their answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode, error_reply, ok_reply
from nvflare.private.defs import InfoCollectorTopic, RequestHeader, SysCommandTopic, TrainingTopic
from nvflare.private.fed.client import fed_client_base
from nvflare.private.fed.client.admin import FedAdminAgent, RequestProcessor
from nvflare.private.fed.client.admin_commands import AdminCommands
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.scheduler_constants import ShareableHeader

from histoflare.flare import closed_commands
from histoflare.flare.cells import ClosedAgent
from histoflare.flare.closed_commands import OF_A_JOB, OF_THE_SITE, CheckedProcessor, ClosedCommands

JOB = str(uuid.UUID(int=7))
SECRET = "/srv/clinic/kit"


@pytest.fixture
def closed() -> Iterator[None]:
    """FLARE's commands closed, and as they were afterwards."""
    lists = (ClientRequestProcessors.request_processors, AdminCommands.commands)
    before = [list(each) for each in lists]
    agent = fed_client_base.NetAgent
    ClosedCommands()
    ClosedCommands()  # FLARE may build a site's components twice
    yield
    for each, kept in zip(lists, before, strict=True):
        each[:] = kept
    fed_client_base.NetAgent = agent


@pytest.fixture
def processors(closed: None) -> dict[str, Any]:
    """Topic → processor, as FLARE's client process registers them after its components are built."""
    agent = SimpleNamespace(processors={})
    for processor in ClientRequestProcessors.request_processors:
        FedAdminAgent.register_processor(agent, processor)
    return agent.processors


def test_only_what_runs_a_job_is_there(processors: dict[str, Any]) -> None:
    assert set(processors) == OF_A_JOB | OF_THE_SITE
    closed = {
        SysCommandTopic.SHELL,
        SysCommandTopic.REPORT_ENV,
        SysCommandTopic.SYS_INFO,
        SysCommandTopic.REPORT_RESOURCES,
        SysCommandTopic.CONFIGURE_SITE_LOG,
        TrainingTopic.CONFIGURE_JOB_LOG,
        InfoCollectorTopic.SHOW_STATS,
        InfoCollectorTopic.SHOW_ERRORS,
        InfoCollectorTopic.RESET_ERRORS,
    }
    assert not closed & set(processors)
    assert {TrainingTopic.DEPLOY, TrainingTopic.START_JOB, TrainingTopic.ABORT} <= set(processors)


@pytest.mark.usefixtures("closed")
def test_nor_is_there_more_in_a_job_s_process() -> None:
    """Whoever is in the network may ask it; the process that starts the jobs does not stand in between."""
    kept = {AdminCommandNames.CHECK_STATUS, AdminCommandNames.ABORT, AdminCommandNames.ABORT_TASK}
    assert {command.get_command_name() for command in AdminCommands.commands} == {*kept, "shutdown"}
    for name in ("CONFIGURE_JOB_LOG", "SHOW_ERRORS", "SHOW_STATS", "RESET_ERRORS"):
        assert AdminCommands.get_command(getattr(AdminCommandNames, name)) is None
    assert fed_client_base.NetAgent is ClosedAgent


@pytest.mark.parametrize("job_id", ["local", "startup", "../x", "", 5, "A" * 36, None, f"{{{JOB}}}"])
@pytest.mark.parametrize("topic", sorted(OF_A_JOB))
def test_a_job_called_like_a_folder_does_nothing(
    processors: dict[str, Any], tmp_path: Path, topic: str, job_id: Any
) -> None:
    policy = tmp_path / "local" / "privacy.json"
    policy.parent.mkdir()
    (tmp_path / "startup").mkdir()
    policy.write_text("{}")
    engine = SimpleNamespace(args=SimpleNamespace(workspace=str(tmp_path)), client=None)
    engine.delete_run = lambda job: ClientEngine.delete_run(engine, job)
    request = Message(topic, "")
    if job_id is not None:
        request.set_header(RequestHeader.JOB_ID, job_id)
    reply = processors[topic].process(request, engine)
    assert (reply.get_header(MsgHeader.RETURN_CODE), reply.body) == (ReturnCode.ERROR, "JOB_INVALID")
    assert policy.is_file() and sorted(path.name for path in tmp_path.iterdir()) == ["local", "startup"]


JOBS = Path(__file__).resolve().parents[2] / "jobs"


class Answering(RequestProcessor):
    """A processor that answers what it was told to, after it has left something in the job's folder."""

    def __init__(self, topic: str, answer: Any, leaves: Path | None = None) -> None:
        self.topic, self.answer, self.leaves = topic, answer, leaves

    def get_topics(self) -> list[str]:
        return [self.topic]

    def process(self, req: Message, app_ctx: Any) -> Any:
        if self.leaves is not None:
            self.leaves.mkdir(parents=True)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def ask(topic: str, answer: Any, workspace: Path, leaves: Path | None = None) -> Message:
    request = Message(topic, zip_directory_to_bytes(str(JOBS / "mem_fedavg" / "app"), ""))
    request.set_header(RequestHeader.JOB_ID, JOB)
    request.set_header(RequestHeader.JOB_META, {"job_id": JOB})
    request.set_header(RequestHeader.APP_NAME, "app")
    engine = SimpleNamespace(args=SimpleNamespace(workspace=str(workspace)), get_client_name=lambda: "clinic")
    return CheckedProcessor(Answering(topic, answer, leaves)).process(request, engine)


ANSWERS = {
    "text": ok_reply(body=f"Delete run folder: {SECRET}"),
    "error": error_reply(f"Missing required config in {SECRET}"),
    "prefixed": Message("reply", f"NVFLARE_ERROR: exception: {SECRET}"),
    "raised": RuntimeError(SECRET),
    "meta": ok_reply(body="OK", meta={"info": SECRET}),
    "list": ok_reply(body=[SECRET]),
    "nothing": None,
    "not a message": SECRET,
    "status": ok_reply(body=json.dumps({"client_name": SECRET, "running_jobs": []})),
    "job": ok_reply(body=json.dumps({"running_jobs": [{"job_id": SECRET, "status": "started"}]})),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("topic", sorted(OF_A_JOB | OF_THE_SITE - closed_commands.AS_THEY_ARE))
def test_no_text_of_a_site_is_in_an_answer(tmp_path: Path, topic: str, answer: str) -> None:
    reply = ask(topic, ANSWERS[answer], tmp_path)
    assert SECRET not in repr((reply.body, reply.headers, reply.topic))


@pytest.mark.parametrize("answer", ["error", "prefixed", "raised"])
def test_what_is_refused_leaves_nothing(tmp_path: Path, answer: str) -> None:
    leaves = tmp_path / JOB / "app_clinic" / "config"
    reply = ask(TrainingTopic.DEPLOY, ANSWERS[answer], tmp_path, leaves)
    assert (reply.get_header(MsgHeader.RETURN_CODE), reply.body) == (ReturnCode.ERROR, "JOB_INVALID")
    assert not (tmp_path / JOB).exists()


def test_what_was_deployed_stays(tmp_path: Path) -> None:
    leaves = tmp_path / JOB / "app_clinic" / "config"
    reply = ask(TrainingTopic.DEPLOY, ok_reply(body="deployed app to clinic"), tmp_path, leaves)
    assert (reply.get_header(MsgHeader.RETURN_CODE), reply.body) == (ReturnCode.OK, "OK")
    assert leaves.is_dir()


def test_a_refusal_does_not_remove_an_earlier_job(tmp_path: Path) -> None:
    (tmp_path / JOB).mkdir()
    ask(TrainingTopic.DEPLOY, RuntimeError("no"), tmp_path)
    assert (tmp_path / JOB).is_dir()


def test_what_a_server_needs_to_know_arrives(tmp_path: Path) -> None:
    """FLARE's scheduler reads the first two, its console the third."""
    token = str(uuid.UUID(int=9))
    resources = Shareable()
    resources.set_header(ShareableHeader.IS_RESOURCE_ENOUGH, True)
    resources.set_header(ShareableHeader.RESOURCE_RESERVE_TOKEN, token)
    reply = ask(TrainingTopic.CHECK_RESOURCE, Message("reply", resources), tmp_path)
    assert reply.body.get_header(ShareableHeader.IS_RESOURCE_ENOUGH) is True
    assert reply.body.get_header(ShareableHeader.RESOURCE_RESERVE_TOKEN) == token
    assert MsgHeader.RETURN_CODE not in reply.headers, "FLARE's scheduler takes any for an error"
    failed = ask(TrainingTopic.START_JOB, ANSWERS["prefixed"], tmp_path)
    assert failed.body == "NVFLARE_ERROR: JOB_INVALID"
    jobs = [{"app_name": SECRET, "job_id": JOB, "status": "started"}]
    status = ask(TrainingTopic.CHECK_STATUS, ok_reply(body=json.dumps({"running_jobs": jobs})), tmp_path)
    assert json.loads(status.body)["running_jobs"] == [{"app_name": "", "job_id": JOB, "status": "started"}]


@pytest.mark.parametrize("meta", [None, {}, [], {"job_id": "../x"}, {"job_id": str(uuid.UUID(int=8))}])
def test_a_job_starts_with_its_own_meta(tmp_path: Path, meta: Any) -> None:
    request = Message(TrainingTopic.START_JOB, {})
    request.set_header(RequestHeader.JOB_ID, JOB)
    request.set_header(RequestHeader.JOB_META, meta)
    reply = CheckedProcessor(Answering(TrainingTopic.START_JOB, ok_reply())).process(request, None)
    assert reply.body == "NVFLARE_ERROR: JOB_INVALID"


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (ClientRequestProcessors, "request_processors", []),
        (ClientRequestProcessors, "request_processors", ()),
        (AdminCommands, "commands", []),
        (fed_client_base, "NetAgent", lambda cell: None),
        (closed_commands.CoreCell, "add_incoming_filter", lambda self, cb: None),
        (closed_commands.CoreCell, "add_incoming_request_filter", lambda self, cb: None),
        (closed_commands.CoreCell, "add_outgoing_request_filter", lambda self, cb: None),
        (closed_commands.CoreCell, "add_outgoing_reply_filter", lambda self, cb: None),
    ],
)
def test_no_process_starts_with_another_flare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, name, value)
    with pytest.raises(SystemExit) as caught:
        ClosedCommands()
    assert str(caught.value.code).startswith("FLARE_CHANGED")
    monkeypatch.undo()
