"""What the others of a federation may ask a site's processes, and what these answer.

A process of FLARE is a *cell* of one network: whoever is in it can send it requests on any channel. FLARE
itself answers more of them than a job needs: with variables of its configuration, where it runs, who is
connected, how much it sent; one of them changes the server that it calls. The tables here list what a job
needs; all else is refused before it reaches anybody, and what leaves as an answer says nothing of the site.

Channels and topics are internals of FLARE: the version is pinned (:mod:`histoflare.flare.loaders`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_constant import AdminCommandNames, ReservedTopic
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    MessageHeaderKey,
    MessageType,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.net_agent import NetAgent
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.private.admin_defs import Message as AdminMessage
from nvflare.private.admin_defs import MsgHeader, error_reply
from nvflare.private.admin_defs import ReturnCode as AdminReturnCode
from nvflare.private.defs import ERROR_MSG_PREFIX
from nvflare.private.fed.client.client_status import ClientStatus

from histoflare.flare.job_folders import is_job_id
from histoflare.reasons import REASONS

ANY = "*"
BULK = "bulk"
"""Several messages in one. What comes in one is looked at one by one; what would leave in one is not."""

DOWNLOADS = "download_service__"
DOWNLOAD = "download_service__download"

Table = Mapping[str, set[str]]

PARENT_TAKES: Table = {CellChannel.CELLNET: {CellChannelTopic.Bye}, CellChannel.CLIENT_MAIN: {ANY}}
"""Channel → topics that the process which starts the jobs is asked on: commands (``closed_commands``)."""

JOB_COMMANDS = {
    AdminCommandNames.CHECK_STATUS,
    AdminCommandNames.ABORT,
    AdminCommandNames.ABORT_TASK,
    AdminCommandNames.SHUTDOWN,
}
"""Commands that a job's process takes."""

PARENT_SENDS: Table = {
    CellChannel.CELLNET: {CellChannelTopic.Bye},
    CellChannel.SERVER_MAIN: {ANY},
    CellChannel.CLIENT_COMMAND: JOB_COMMANDS,
}
"""Channel → topics that the process which starts the jobs asks others on: that it is there, and its jobs."""

JOB_TAKES: Table = {
    CellChannel.CELLNET: {CellChannelTopic.Bye, BULK},
    CellChannel.RETURN_ONLY: {ANY},
    STREAM_CHANNEL: {STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC},
    CellChannel.CLIENT_COMMAND: JOB_COMMANDS,
    CellChannel.AUX_COMMUNICATION: {ReservedTopic.END_RUN},
    DOWNLOADS: {ANY},
}
"""Channel → topics that a job's process is asked on: that it end, and for the tensors of an update."""


class ClosedAgent(NetAgent):
    """In place of the part of FLARE that answers questions about the network.

    Built by FLARE as soon as there is a cell, before anything else of the site takes a request from it.
    """

    def __init__(self, cell: Any, change_root_cb: Any = None, agent_closed_cb: Any = None) -> None:
        core = getattr(cell, "core_cell", cell)
        own = core.get_fqcn()
        is_parent = len(FQCN.split(own)) == 1
        takes = PARENT_TAKES if is_parent else JOB_TAKES

        def empty_unneeded(message: Message) -> None:
            if (
                message.get_header(MessageHeaderKey.MSG_TYPE) == MessageType.REQ
                and message.get_header(MessageHeaderKey.DESTINATION) == own
                and not is_listed(takes, *pair_of(message))
            ):
                message.payload = None
                message.remove_header(MessageHeaderKey.PAYLOAD_ENCODING)

        def refuse_unneeded(message: Message) -> Message | None:
            return None if is_listed(takes, *pair_of(message)) else make_reply(ReturnCode.INVALID_REQUEST)

        def stop_unneeded(message: Message) -> Message | None:
            return None if is_listed(PARENT_SENDS, *pair_of(message)) else make_reply(ReturnCode.FILTER_ERROR)

        core.add_incoming_filter(ANY, ANY, forget_address)
        core.add_incoming_filter(ANY, ANY, empty_unneeded)  # FLARE decodes it before it asks the next
        core.add_incoming_request_filter(ANY, ANY, refuse_unneeded)
        if is_parent:  # in a job's process the guard does it
            core.add_outgoing_request_filter(ANY, ANY, stop_unneeded)
        core.add_outgoing_reply_filter(ANY, ANY, empty_reply)
        super().__init__(cell, change_root_cb, agent_closed_cb)


def forget_address(message: Message) -> None:
    """Take out of a message the address at which its sender would be called: FLARE would connect to it."""
    message.remove_header(MessageHeaderKey.CONN_URL)


def pair_of(message: Message) -> tuple[str, str]:
    """Return channel and topic of a message; of a streamed one, those that it is for."""
    channel = message.get_header(MessageHeaderKey.CHANNEL, "")
    topic = message.get_header(MessageHeaderKey.TOPIC, "")
    if (channel, topic) == (STREAM_CHANNEL, STREAM_DATA_TOPIC):
        channel = message.get_header(StreamHeaderKey.CHANNEL, "")
        topic = message.get_header(StreamHeaderKey.TOPIC, "")
    return channel, topic


def is_listed(table: Table, channel: str, topic: str) -> bool:
    """Return whether a table has a channel and topic."""
    topics = table.get(channel, set())
    return topic in topics or ANY in topics


def empty_reply(reply: Message) -> None:
    """Take out of an answer what is not one of few fixed ones. Answers are changed in place.

    Commands answer what ``closed_commands`` made; a job's process with a word for its state; all else is
    empty. (What a site streams is a request of its own, which the guard sees.)
    """
    channel = reply.get_header(MessageHeaderKey.CHANNEL, "")
    payload = reply.payload
    if channel == CellChannel.CLIENT_MAIN and isinstance(payload, AdminMessage):
        code = str(payload.body).removeprefix(f"{ERROR_MSG_PREFIX}: ")
        if payload.get_header(MsgHeader.RETURN_CODE) == AdminReturnCode.ERROR and code not in REASONS:
            reply.payload = error_reply("ERROR")  # FLARE's own: texts of its authorization
    elif not (channel == CellChannel.CLIENT_COMMAND and payload in _STATES):
        reply.payload = None
    if MessageHeaderKey.ERROR in reply.headers:
        reply.set_header(MessageHeaderKey.ERROR, "error")


_STATES = tuple(ClientStatus.status_messages.values())


def engine_status(text: str) -> str:
    """Return FLARE's status of a site's jobs with their ids and states in it, and no more.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: It is no such status.
    """
    jobs = [
        {"app_name": "", "job_id": job["job_id"], "status": job["status"]}
        for job in json.loads(text)["running_jobs"]
        if is_job_id(job["job_id"]) and job["status"] in _STATES
    ]
    return json.dumps({"client_name": "", "running_jobs": jobs})
