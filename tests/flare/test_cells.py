"""Two cells of FLARE in one process: what the site's answers, asked directly as a modified server would."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from nvflare.apis.fl_constant import ReservedTopic
from nvflare.fuel.f3.cellnet import core_cell, net_agent
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.net_agent import NetAgent
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.stats_pool import StatsPoolManager
from nvflare.private.admin_defs import Message as AdminMessage
from nvflare.private.admin_defs import MsgHeader, error_reply, ok_reply
from nvflare.private.defs import CellChannel as PrivateChannel

from histoflare.flare.cells import JOB_TAKES, PARENT_TAKES, ClosedAgent, empty_reply, is_listed
from histoflare.flare.guard import KEPT_OPEN

JOB = str(uuid.UUID(int=7))
TOPICS = sorted(value for name, value in vars(net_agent).items() if name.startswith("_TOPIC_"))
SECRET = "/srv/clinic/kit"


def make_cell(fqcn: str) -> Cell:
    """Cells of one process give each other their messages directly: no network is needed."""
    StatsPoolManager.pools.clear()  # of the cell before that was called the same
    cell = Cell(fqcn=fqcn, root_url="tcp://localhost:0", secure=False, credentials={})
    cell.core_cell.running = True
    return cell


@pytest.fixture(scope="module")
def server() -> Iterator[Cell]:
    cell = make_cell("server")
    yield cell
    cell.core_cell.ALL_CELLS.pop("server", None)


@pytest.fixture(params=["clinic", f"clinic.{JOB}"], ids=["parent", "job"])
def site(request: pytest.FixtureRequest, server: Cell) -> Iterator[Cell]:
    cell = make_cell(request.param)
    yield cell
    cell.core_cell.ALL_CELLS.pop(request.param, None)


def ask(server: Cell, site: Cell, channel: str, topic: str, payload: Any = None) -> Message:
    target = site.core_cell.get_fqcn()
    return server.core_cell.send_request(channel, topic, target, Message(payload=payload), timeout=5.0)


def code(reply: Message) -> str:
    return str(reply.get_header(MessageHeaderKey.RETURN_CODE))


def test_as_flare_comes_it_tells(server: Cell, site: Cell) -> None:
    """Else what follows shows nothing."""
    NetAgent(site)
    for topic in ("config_vars", "process_info", "peers"):
        reply = ask(server, site, "_net_manager", topic)
        assert code(reply) == ReturnCode.OK and reply.payload is not None


@pytest.mark.parametrize("topic", TOPICS)
def test_no_question_about_the_network_is_answered(server: Cell, site: Cell, topic: str) -> None:
    agent = ClosedAgent(site)
    reply = ask(server, site, "_net_manager", topic, "tcp://elsewhere.example:1")
    assert (code(reply), reply.payload) == (ReturnCode.INVALID_REQUEST, None)
    assert not agent.asked_to_close


@pytest.mark.parametrize(
    ("channel", "topic"),
    [
        (CellChannel.SERVER_COMMAND, "get_task"),
        (CellChannel.SERVER_COMMAND, "submit_update"),
        (CellChannel.AUX_COMMUNICATION, ReservedTopic.DO_TASK),
        (CellChannel.AUX_COMMUNICATION, "fed.event"),
        (CellChannel.MULTI_PROCESS_EXECUTOR, "x"),
        (CellChannel.SIMULATOR_RUNNER, "x"),
        (PrivateChannel.CLIENT_COMMAND, "configure_job_log"),
        ("credential_manager", "key_exchange"),
        ("any", "thing"),
        ("", ""),
    ],
)
def test_no_other_channel_is(server: Cell, site: Cell, channel: str, topic: str) -> None:
    ClosedAgent(site)
    came: list[Message] = []
    site.core_cell.register_request_cb(channel, "*", lambda message: came.append(message) or message)
    ask(server, site, channel, topic, SECRET)
    assert not came


def test_commands_of_each_arrive(server: Cell, site: Cell) -> None:
    ClosedAgent(site)
    in_job = "." in site.core_cell.get_fqcn()
    channel, topic = ("client_command", "abort") if in_job else ("admin", "train.deploy")
    other = "admin" if in_job else "client_command"
    came: list[str] = []
    for each in (channel, other):
        site.core_cell.register_request_cb(each, "*", lambda _, each=each: came.append(each) or Message())
    for each in (channel, other):
        ask(server, site, each, topic)
    assert came == [channel]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ({"secret": SECRET}, None),
        (SECRET, None),
        ("started", "started"),
        ("not started", "not started"),
        (b"secret", None),
        (None, None),
    ],
)
def test_a_job_s_process_says_its_state_and_no_more(server: Cell, said: Any, heard: Any) -> None:
    cell = make_cell(f"clinic.{JOB}")
    try:
        ClosedAgent(cell)
        cell.core_cell.register_request_cb("client_command", "*", lambda message: Message(payload=said))
        assert ask(server, cell, "client_command", "check_status").payload == heard
    finally:
        cell.core_cell.ALL_CELLS.pop(f"clinic.{JOB}", None)


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (error_reply(f"not authorized: {SECRET}"), "ERROR"),
        (error_reply("JOB_INVALID"), "JOB_INVALID"),
        (error_reply("NVFLARE_ERROR: JOB_INVALID"), "NVFLARE_ERROR: JOB_INVALID"),
        (error_reply([SECRET]), "ERROR"),  # type: ignore[arg-type]
        (ok_reply(body="OK"), "OK"),
    ],
)
def test_nor_does_flare_s_own_refusal_of_a_command(said: AdminMessage, heard: str) -> None:
    """Texts of its authorization, which come from no command."""
    reply = Message({MessageHeaderKey.CHANNEL: "admin"}, said)
    empty_reply(reply)
    assert reply.payload.body == heard
    assert SECRET not in repr(reply.payload.get_header(MsgHeader.META))


def test_an_error_s_text_is_left_out() -> None:
    reply = Message({MessageHeaderKey.CHANNEL: "x", MessageHeaderKey.ERROR: SECRET}, {"a": SECRET})
    empty_reply(reply)
    assert SECRET not in repr((reply.payload, reply.headers))


@pytest.mark.parametrize("state", ["open", "closed"])
def test_no_address_is_called_that_a_message_names(
    server: Cell, site: Cell, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """As FLARE comes it does, if the message says that another site sent it by way of the server."""
    called: list[str] = []
    core = site.core_cell
    monkeypatch.setattr(core, "_add_adhoc_connector", lambda origin, url: called.append(url))
    (ClosedAgent if state == "closed" else NetAgent)(site)
    message = Message(
        {
            MessageHeaderKey.MSG_TYPE: "req",
            MessageHeaderKey.ORIGIN: "other",
            MessageHeaderKey.FROM_CELL: "server",
            MessageHeaderKey.DESTINATION: core.get_fqcn(),
            MessageHeaderKey.CHANNEL: "cellnet.channel",
            MessageHeaderKey.TOPIC: "bye",
            MessageHeaderKey.CONN_URL: "tcp://elsewhere.example:1",
        }
    )
    core.process_message(Endpoint("server"), None, 1, message)
    assert called == ([] if state == "closed" else ["tcp://elsewhere.example:1"])


def test_nothing_leaves_in_bulk() -> None:
    """The messages inside would be seen by no filter."""
    assert not is_listed(KEPT_OPEN, "cellnet.channel", "bulk")
    assert is_listed(KEPT_OPEN, "cellnet.channel", "bye")


@pytest.mark.parametrize("table", [PARENT_TAKES, JOB_TAKES, KEPT_OPEN])
def test_no_table_is_open_for_all_channels(table: Any) -> None:
    assert "*" not in table and not is_listed(table, "_net_manager", "config_vars")


@pytest.mark.parametrize(("channel", "is_read"), [("any", False), ("cellnet.channel", True)])
def test_what_is_not_needed_is_not_even_read(
    server: Cell, site: Cell, monkeypatch: pytest.MonkeyPatch, channel: str, is_read: bool
) -> None:
    """FLARE decodes a message before it asks whether it may come."""
    ClosedAgent(site)
    seen: list[Any] = []
    monkeypatch.setattr(core_cell, "decode_payload", lambda message: seen.append(message.payload))
    message = Message(
        {
            MessageHeaderKey.MSG_TYPE: "req",
            MessageHeaderKey.ORIGIN: "server",
            MessageHeaderKey.FROM_CELL: "server",
            MessageHeaderKey.DESTINATION: site.core_cell.get_fqcn(),
            MessageHeaderKey.CHANNEL: channel,
            MessageHeaderKey.TOPIC: "bye",
            MessageHeaderKey.PAYLOAD_ENCODING: "fobs",
        },
        b"bytes",
    )
    site.core_cell.process_message(Endpoint("server"), None, 1, message)
    assert seen == [b"bytes" if is_read else None]


@pytest.mark.parametrize(
    ("channel", "topic", "passes"),
    [
        ("task", "heart_beat", True),
        ("client_command", "abort", True),
        ("sm__STREAM", "sm__ERROR", False),
        ("aux_communication", "fed.event", False),
        ("any", "thing", False),
    ],
)
def test_the_process_that_starts_jobs_says_what_it_must(
    server: Cell, channel: str, topic: str, passes: bool
) -> None:
    """An error of a stream would have an exception's text in it."""
    cell = make_cell("clinic")
    try:
        ClosedAgent(cell)
        came: list[str] = []
        server.core_cell.register_request_cb(channel, "*", lambda message: came.append(topic) or Message())
        cell.core_cell.send_request(channel, topic, "server", Message(payload=SECRET), timeout=5.0)
        assert came == [topic] * passes
    finally:
        cell.core_cell.ALL_CELLS.pop("clinic", None)
