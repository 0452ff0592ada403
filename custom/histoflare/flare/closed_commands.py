"""The commands that a server may give a site's client process: none that reads or removes the site's files.

FLARE's client process trusts its server: who sends a command, and whether it must be authorized at all, is
what the message says. Left as it comes, a server could list and print whatever the site's user can read, and
have the site's own policy removed by a job that is called like its folder.
"""

from __future__ import annotations

import uuid

from nvflare.apis.fl_component import FLComponent
from nvflare.private.admin_defs import Message, error_reply
from nvflare.private.defs import RequestHeader, TrainingTopic
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.shell_cmd import ShellCommandProcessor
from nvflare.private.fed.client.sys_cmd import ConfigureSiteLogProcessor, ReportEnvProcessor, SysInfoProcessor
from nvflare.private.fed.client.training_cmds import ConfigureJobLogProcessor

from histoflare.flare.deployment import deploy, start

CLOSED = (
    ShellCommandProcessor,
    ReportEnvProcessor,
    SysInfoProcessor,
    ConfigureSiteLogProcessor,
    ConfigureJobLogProcessor,
)


class ClosedCommands(FLComponent):
    """Closes commands before FLARE's client process offers them. Stands in a site's ``resources.json``."""

    def __init__(self) -> None:
        super().__init__()
        kept = [each for each in ClientRequestProcessors.request_processors if not isinstance(each, CLOSED)]
        checked = [each if isinstance(each, CheckedProcessor) else CheckedProcessor(each) for each in kept]
        ClientRequestProcessors.request_processors[:] = checked


class CheckedProcessor(RequestProcessor):
    """Gives a command to its processor, if the job it names can be one: FLARE makes paths of these names."""

    def __init__(self, processor: RequestProcessor) -> None:
        self.processor = processor

    def get_topics(self) -> list[str]:
        """Return the topics of the processor."""
        topics: list[str] = self.processor.get_topics()
        return topics

    def process(self, req: Message, app_ctx: object) -> Message | None:
        """Answer a command."""
        job_id = req.get_header(RequestHeader.JOB_ID)
        if job_id is not None and not _is_job_id(job_id):
            return error_reply("no such job")
        if req.topic == TrainingTopic.DEPLOY:
            return deploy(self.processor, req, app_ctx)
        if req.topic == TrainingTopic.START_JOB:
            return start(self.processor, req, app_ctx)
        reply: Message | None = self.processor.process(req, app_ctx)
        return reply


def _is_job_id(job_id: object) -> bool:
    try:
        return str(uuid.UUID(str(job_id))) == job_id
    except ValueError:
        return False
