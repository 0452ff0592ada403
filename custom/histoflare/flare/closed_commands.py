"""The commands that a server may give a site's processes: those that run a job, with fixed answers.

FLARE's client process trusts its server: who sends a command, and whether it must be authorized at all, is
what the message says. Left as it comes, a server could list and print whatever the site's user can read, have
the site's own policy removed by a job that is called like its folder, set what is logged, and read paths and
texts of errors out of the answers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, JobConstants
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode, error_reply, ok_reply
from nvflare.private.defs import ERROR_MSG_PREFIX, RequestHeader, SysCommandTopic, TrainingTopic
from nvflare.private.fed.client import fed_client_base
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.admin_commands import AdminCommands
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.scheduler_constants import ShareableHeader

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.application import check_application, check_meta, code_of
from histoflare.flare.cells import JOB_COMMANDS, ClosedAgent, engine_status
from histoflare.flare.closed_messages import close_messages
from histoflare.flare.job_folders import is_job_id, remove
from histoflare.flare.kit_check import refuse_start
from histoflare.flare.loaders import parameters, require_known_flare
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_log_of
from histoflare.site.refusals import list_refusals, note_refusal, say_refusal
from histoflare.site.site_file import read_own_file

logger = logging.getLogger(__name__)

DONE = "OK"
REFUSED = "ERROR"
JOB_INVALID = "JOB_INVALID"

OF_A_JOB = {
    TrainingTopic.DEPLOY,
    TrainingTopic.START_JOB,
    TrainingTopic.ABORT,
    TrainingTopic.ABORT_TASK,
    TrainingTopic.DELETE_RUN,
    TrainingTopic.NOTIFY_JOB_STATUS,
    TrainingTopic.CHECK_RESOURCE,
}
"""Commands that name a job: FLARE makes paths of these names."""

OF_THE_SITE = {
    TrainingTopic.CANCEL_RESOURCE,
    TrainingTopic.CHECK_STATUS,
    TrainingTopic.GET_SCOPES,
    TrainingTopic.RESTART,
    TrainingTopic.SHUTDOWN,
    SysCommandTopic.REPORT_VERSION,
}
"""Commands that name none, or need not."""

AS_THEY_ARE = {TrainingTopic.GET_SCOPES, SysCommandTopic.REPORT_VERSION}
"""Commands whose answer is in every kit of the consortium: names of scopes, FLARE's version."""


class ClosedCommands(FLComponent):
    """Closes commands before FLARE's client process offers them. Stands in a site's ``resources.json``.

    FLARE builds it in the process that starts the jobs and in each job's process, before either has a
    connection. It ends a process whose FLARE is not the one it knows.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            close_commands()
        except HistoflareError as error:
            refuse_start(Path.cwd(), error)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Say in the log of the process that starts the jobs, when one has ended, what it was refused for.

        All else that this log has of a job is that its process ended with RC 0.
        """
        if event_type == EventType.JOB_COMPLETED:
            _say_refusals(fl_ctx.get_engine(), fl_ctx.get_prop(FLContextKey.CURRENT_JOB_ID))


_audited: dict[str, int] = {}
"""Job → bytes of the site's audit log when it was started."""


def _note_start(engine: Any, job_id: str) -> None:
    with suppress(Exception):
        _audited[job_id] = audit_log_of(_site_file(engine)).size()


def _say_refusals(engine: Any, job_id: str) -> None:
    with suppress(Exception):  # as with everything here, a text of an error is no reason to fail
        for line in list_refusals(_site_file(engine), job_id, _audited.pop(job_id, 0)):
            logger.warning(line)


def close_commands() -> None:
    """Leave the commands of :data:`OF_A_JOB`, :data:`OF_THE_SITE` and ``JOB_COMMANDS``, and close the cell
    and what it makes of messages.

    Raises:
        JobError: FLARE's inside is not what is known here (FLARE_CHANGED).
    """
    require_known_flare(_KNOWN)
    close_messages()
    kept = [processor for each in ClientRequestProcessors.request_processors for processor in _kept(each)]
    ClientRequestProcessors.request_processors[:] = kept
    AdminCommands.commands[:] = [
        each for each in AdminCommands.commands if each.get_command_name() in JOB_COMMANDS
    ]
    fed_client_base.NetAgent = ClosedAgent


def _kept(processor: RequestProcessor) -> list[RequestProcessor]:
    if isinstance(processor, CheckedProcessor):
        return [processor]
    return [CheckedProcessor(processor)] if set(processor.get_topics()) <= OF_A_JOB | OF_THE_SITE else []


class CheckedProcessor(RequestProcessor):
    """Gives a command to its processor, if the job it names can be one, and answers with fixed words."""

    def __init__(self, processor: RequestProcessor) -> None:
        self.processor = processor

    def get_topics(self) -> list[str]:
        """Return the topics of the processor."""
        topics: list[str] = self.processor.get_topics()
        return topics

    def process(self, req: Message, app_ctx: Any) -> Message:
        """Answer a command. Never raises: what is raised here travels to the server as text."""
        job_id = req.get_header(RequestHeader.JOB_ID)
        names_a_job = req.topic in OF_A_JOB
        if not is_job_id(job_id) and (names_a_job or job_id is not None):
            return error_reply(JOB_INVALID)
        if req.topic == TrainingTopic.START_JOB and not _is_of(
            req.get_header(RequestHeader.JOB_META), job_id
        ):
            return _error(req.topic)
        if req.topic not in (TrainingTopic.DEPLOY, TrainingTopic.START_JOB):
            return self._answer(req, app_ctx)
        try:
            check_meta(req.get_header(RequestHeader.JOB_META), job_id)
            if req.topic == TrainingTopic.DEPLOY:
                check_application(req.body, req.get_header(RequestHeader.APP_NAME))
        except Exception as error:
            _note(app_ctx, job_id, error)
            return _error(req.topic, code_of(error))
        run = Path(app_ctx.args.workspace) / job_id
        was_there = os.path.lexists(run)
        if req.topic == TrainingTopic.START_JOB:
            _note_start(app_ctx, job_id)
        answer = self._answer(req, app_ctx)
        if answer.get_header(MsgHeader.RETURN_CODE) == ReturnCode.ERROR:
            _note(app_ctx, job_id, JobError("FLARE did not take it; its log says why."))
            if req.topic == TrainingTopic.DEPLOY and not was_there:
                remove(run)
        return answer

    def _answer(self, req: Message, app_ctx: Any) -> Message:
        try:
            return _fixed_answer(req.topic, self.processor.process(req, app_ctx))
        except Exception:
            return _error(req.topic)


def _is_of(meta: object, job_id: str) -> bool:
    """Return whether this is a job's meta: FLARE makes a path of the id in there, too, where it starts it."""
    return isinstance(meta, dict) and meta.get(JobConstants.JOB_ID) == job_id


def _fixed_answer(topic: str, reply: Message | None) -> Message:
    """Return an answer with one of few fixed contents in place of a processor's.

    Raises:
        Exception: The reply is none that this command has; nothing of it is used.
    """
    if reply is None:
        return ok_reply()
    body = reply.body
    failed = reply.get_header(MsgHeader.RETURN_CODE, ReturnCode.OK) != ReturnCode.OK
    if failed or (isinstance(body, str) and body.startswith(ERROR_MSG_PREFIX)):
        return _error(topic)
    make: Callable[[Any], Any] = _BODIES.get(topic, lambda _: DONE)
    answer = Message(f"reply_{topic}", make(body))
    if MsgHeader.RETURN_CODE in reply.headers:  # FLARE's scheduler takes any for an error
        answer.set_header(MsgHeader.RETURN_CODE, ReturnCode.OK)
    return answer


def _error(topic: str, code: str = JOB_INVALID) -> Message:
    if topic == TrainingTopic.START_JOB:
        return error_reply(f"{ERROR_MSG_PREFIX}: {code}")  # FLARE looks at the text, too
    return error_reply(code if topic in OF_A_JOB else REFUSED)


def _note(engine: Any, job_id: str, error: Exception) -> None:
    """Write down why a job was refused before it ran, for the site's own people."""
    known = JobError(str(error) if isinstance(error, HistoflareError) else repr(error), reason=code_of(error))
    say_refusal(logger.warning, job_id, known)
    with suppress(HistoflareError, OSError):
        note_refusal(_site_file(engine), job_id, known)


def _site_file(engine: Any) -> SiteConfiguration:
    site = engine.get_client_name()
    return read_own_file(site, Path(engine.args.workspace) / "local")


def _resources(body: Shareable) -> Shareable:
    """Return whether a job may have what it asks for, and the number of its place in the queue."""
    enough = body.get_header(ShareableHeader.IS_RESOURCE_ENOUGH) is True
    token = body.get_header(ShareableHeader.RESOURCE_RESERVE_TOKEN)
    result = Shareable()
    result.set_header(ShareableHeader.IS_RESOURCE_ENOUGH, enough)
    result.set_header(ShareableHeader.RESOURCE_RESERVE_TOKEN, token if enough and is_job_id(token) else "")
    return result


_BODIES: dict[str, Callable[[Any], Any]] = {
    TrainingTopic.CHECK_RESOURCE: _resources,
    TrainingTopic.CANCEL_RESOURCE: lambda _: Shareable(),
    TrainingTopic.CHECK_STATUS: engine_status,
    **dict.fromkeys(AS_THEY_ARE, str),
}
"""Topic → what its answer holds, of what the processor answered."""

_KNOWN: dict[str, Callable[[], bool]] = {
    "ClientRequestProcessors.request_processors": lambda: (
        type(ClientRequestProcessors.request_processors) is list
        and {TrainingTopic.DEPLOY, TrainingTopic.START_JOB} <= _topics()
    ),
    "AdminCommands.commands": lambda: (
        {command.get_command_name() for command in AdminCommands.commands} >= JOB_COMMANDS
    ),
    "fed_client_base.NetAgent": lambda: (
        parameters(fed_client_base.NetAgent) == ["cell", "change_root_cb", "agent_closed_cb"]
    ),
    "CoreCell.add_incoming_filter": lambda: _is_filter(CoreCell.add_incoming_filter),
    "CoreCell.add_incoming_request_filter": lambda: _is_filter(CoreCell.add_incoming_request_filter),
    "CoreCell.add_outgoing_request_filter": lambda: _is_filter(CoreCell.add_outgoing_request_filter),
    "CoreCell.add_outgoing_reply_filter": lambda: _is_filter(CoreCell.add_outgoing_reply_filter),
}
"""What of FLARE's inside is relied on → whether it is as it was."""


def _is_filter(register: Callable[..., Any]) -> bool:
    return parameters(register) == ["self", "channel", "topic", "cb", "args", "kwargs"]


def _topics() -> set[str]:
    return {topic for each in ClientRequestProcessors.request_processors for topic in each.get_topics()}
