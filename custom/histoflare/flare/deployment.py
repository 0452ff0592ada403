"""How an application comes to a site: looked at, then unpacked by FLARE, and gone if anything is wrong."""

from __future__ import annotations

import logging
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.workspace import Workspace
from nvflare.private.admin_defs import Message, MsgHeader, ReturnCode, error_reply
from nvflare.private.defs import RequestHeader
from nvflare.private.fed.client.admin import RequestProcessor

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.application import check_application, check_meta, code_of
from histoflare.site.configuration import find_site_file, read_site_file
from histoflare.site.ledgers import note_refusal

logger = logging.getLogger(__name__)


def deploy(processor: RequestProcessor, request: Message, engine: Any) -> Message | None:
    """Have FLARE deploy an application, if it is a job of this project; else say a fixed code and no more.

    Whatever FLARE answers besides "done" is such a code too: its own texts have paths and parts of files in
    them. Nothing of a job that was refused stays on the disk.

    Args:
        processor: FLARE's own. request: Its command. engine: The client's.
    """
    workspace = Workspace(root_dir=engine.args.workspace, site_name=engine.get_client_name())
    try:
        folder = _run_folder(workspace, request)
        known = folder.exists()
        try:
            check_meta(request.get_header(RequestHeader.JOB_META), folder.name)
            check_application(request.body, request.get_header(RequestHeader.APP_NAME))
            reply: Message | None = processor.process(request, engine)
            if reply is None or reply.get_header(MsgHeader.RETURN_CODE, ReturnCode.OK) != ReturnCode.OK:
                raise JobError(f"FLARE did not deploy it: {reply and reply.body}", reason="JOB_INVALID")
        except BaseException:
            if not known:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    except Exception as error:
        _note(workspace, engine.get_client_name(), request, error)
        return error_reply(code_of(error))
    return reply


def _run_folder(workspace: Workspace, request: Message) -> Path:
    """Return where FLARE would put a job, whose id FLARE makes a path of.

    Raises:
        JobError: The request names no job.
    """
    job_id = request.get_header(RequestHeader.JOB_ID)
    if not isinstance(job_id, str) or str(uuid.UUID(job_id)) != job_id:
        raise JobError("The server's command names no job.", reason="JOB_INVALID")
    return Path(workspace.get_run_dir(job_id))


def _note(workspace: Workspace, site: str, request: Message, error: Exception) -> None:
    """Write down why a job was refused, for the site's own people."""
    logger.warning("a job was refused before it was unpacked: %s", error)
    known = error if isinstance(error, HistoflareError) else JobError(repr(error))
    refused = JobError(str(known), reason=code_of(known))
    with suppress(HistoflareError):
        configuration = read_site_file(find_site_file(site, Path(workspace.get_site_config_dir())))
        note_refusal(configuration, str(request.get_header(RequestHeader.JOB_ID))[:64], refused)
