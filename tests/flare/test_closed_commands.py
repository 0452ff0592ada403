"""What a server may tell a site's client process to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode
from nvflare.private.defs import RequestHeader, SysCommandTopic, TrainingTopic
from nvflare.private.fed.client.admin import FedAdminAgent
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

from histoflare.flare.closed_commands import ClosedCommands


@pytest.fixture
def processors() -> Iterator[dict[str, Any]]:
    """Topic → processor, as FLARE's client process registers them after its components are built."""
    before = list(ClientRequestProcessors.request_processors)
    ClosedCommands()
    ClosedCommands()  # FLARE may build a site's components twice
    agent = SimpleNamespace(processors={})
    for processor in ClientRequestProcessors.request_processors:
        FedAdminAgent.register_processor(agent, processor)
    yield agent.processors
    ClientRequestProcessors.request_processors[:] = before


def test_nothing_reads_the_sites_files(processors: dict[str, Any]) -> None:
    closed = {
        SysCommandTopic.SHELL,
        SysCommandTopic.REPORT_ENV,
        SysCommandTopic.SYS_INFO,
        SysCommandTopic.CONFIGURE_SITE_LOG,
        TrainingTopic.CONFIGURE_JOB_LOG,
    }
    assert not closed & set(processors)
    assert {TrainingTopic.DEPLOY, TrainingTopic.START_JOB, TrainingTopic.ABORT} <= set(processors)


@pytest.mark.parametrize("job_id", ["local", "startup", "../x", "", 5, "A" * 36])
def test_a_job_called_like_a_folder_removes_nothing(
    processors: dict[str, Any], tmp_path: Path, job_id: Any
) -> None:
    policy = tmp_path / "local" / "privacy.json"
    policy.parent.mkdir()
    (tmp_path / "startup").mkdir()
    policy.write_text("{}")
    engine = SimpleNamespace(args=SimpleNamespace(workspace=str(tmp_path)), client=None)
    engine.delete_run = lambda job: ClientEngine.delete_run(engine, job)
    request = Message(TrainingTopic.DELETE_RUN, "")
    request.set_header(RequestHeader.JOB_ID, job_id)
    reply = processors[TrainingTopic.DELETE_RUN].process(request, engine)
    assert reply.get_header(MsgHeader.RETURN_CODE) == ReturnCode.ERROR
    assert policy.is_file()
