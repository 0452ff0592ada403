"""The last check before the wire: a site's own component that stops what is neither a reply nor housekeeping.

FLARE has more ways out than task replies: events, auxiliary messages, streams, raw cell messages, public
properties of its context. The guard stands in the ``components`` of the site's ``privacy.json`` and is built
in the job process after all components of the job.

It protects against jobs and configurations, not against code: whatever class the site allows to run there can
undo it. The names of channels and headers are internals of FLARE; the version is pinned, and a test looks at
everything a server received.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ProcessType, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.fuel.f3.cellnet.defs import ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import STREAM_ACK_TOPIC, STREAM_CHANNEL

from histoflare.flare import capabilities
from histoflare.flare.application import check_folder
from histoflare.flare.cells import ANY, DOWNLOAD, DOWNLOADS, Table, empty_reply, is_listed, pair_of
from histoflare.flare.gate import refused
from histoflare.flare.header_names import PSEUDONYM

GET_TASK = "get_task"

KEPT_OPEN: Table = {
    "aux_communication": {"__job_heartbeat__", "__task_check__", "__sync_runner__"},
    "server_command": {GET_TASK, "submit_update"},
    STREAM_CHANNEL: {STREAM_ACK_TOPIC},
    DOWNLOADS: {ANY},
    "return_only": {f"{DOWNLOADS}:{DOWNLOAD}"},
    "admin": {"train.notify_job_status"},
    "cellnet.channel": {"bye"},
}
"""Channel → topics that FLARE needs to run a job at all."""

REPLY_HEADERS = {
    ReservedHeaderKey.RC,
    ReservedHeaderKey.CONTENT_TYPE,
    ReservedHeaderKey.COOKIE_JAR,
    ReservedHeaderKey.TASK_NAME,
    ReservedHeaderKey.TASK_ID,
    ReservedKey.AUDIT_EVENT_ID,
    PSEUDONYM,
}
"""Headers of a reply that may stand beside what the gate made: FLARE's own bookkeeping."""

PUBLIC_PROPERTIES = {
    ReservedKey.IDENTITY_NAME,
    ReservedKey.FQSN,
    ReservedKey.IS_LEAF,
    ReservedKey.RUN_NUM,
    FLContextKey.CLIENT_NAME,
    FLContextKey.CURRENT_RUN,
    FLContextKey.CURRENT_JOB_ID,
    FLContextKey.SSID,
    FLContextKey.JOB_RUN_NUMBER,
}
"""Public properties of FLARE's context that travel with every message."""


class Guard(FLComponent):
    """Stops every message of the job process that FLARE does not need, and any change after the gate."""

    def __init__(self) -> None:
        super().__init__()
        self._reply: Shareable | None = None
        self._task: Shareable | None = None
        self._sealed = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow a task through FLARE's events. It never raises: FLARE logs an exception and goes on."""
        if fl_ctx.get_process_type() == ProcessType.SERVER_JOB:
            return  # FLARE's simulator gives its server the sites' files too
        _close_stickers(fl_ctx)
        if event_type == EventType.ABOUT_TO_START_RUN:
            self._close_cell(fl_ctx)
        elif event_type == EventType.BEFORE_TASK_EXECUTION:
            self._task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER:
            self._reply = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            self._check(fl_ctx)
        elif event_type == EventType.BEFORE_SEND_TASK_RESULT:
            self._check(fl_ctx)
            self._restore_cookies(fl_ctx)
            self._reply = None
            _close_properties(fl_ctx)
        elif event_type == EventType.BEFORE_PULL_TASK:
            _close_properties(fl_ctx)

    def _close_cell(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        try:
            check_folder(Path(engine.get_workspace().get_app_config_dir(fl_ctx.get_job_id())))
        except Exception as error:
            # It could make FLARE itself tell things, before any filter sees them: it gets no task at all.
            self.logger.warning("this job does not run here: %s", error)
            self._sealed = True
            self.system_panic("JOB_INVALID", fl_ctx)
        cell = engine.get_cell()
        core = getattr(cell, "core_cell", cell)
        core.add_outgoing_request_filter(ANY, ANY, self.stop_unless_needed)
        core.add_outgoing_reply_filter(ANY, ANY, empty_reply)

    def stop_unless_needed(self, message: Message) -> Message | None:
        """Return None to let an outgoing message pass, else the error its sender gets."""
        channel, topic = pair_of(message)
        if is_listed(KEPT_OPEN, channel, topic) and not (self._sealed and topic == GET_TASK):
            return None
        self.logger.warning("a message on %s/%s was stopped", channel, topic)
        return make_reply(ReturnCode.FILTER_ERROR)

    def _restore_cookies(self, fl_ctx: FLContext) -> None:
        """Restore the task's cookies: FLARE's reply to an exception has them and passes no gate."""
        kept = capabilities.kept_task(fl_ctx)
        for task in (self._task, kept.data if kept else None):
            jar = task.get_cookie_jar() if task is not None else None
            if jar:
                jar.clear()  # in place: the reply has the same jar
                jar.update(kept.cookies if kept else {})

    def _check(self, fl_ctx: FLContext) -> None:
        reply = self._reply
        if reply is None:
            return
        try:
            if not capabilities.is_permitted(reply):
                self.logger.warning("the reply was changed after the gate: nothing leaves")
                _replace(reply, fl_ctx)
                capabilities.permit(reply)
            headers: dict[str, Any] = reply[ReservedHeaderKey.HEADERS]
            for name in [name for name in headers if name not in REPLY_HEADERS]:
                del headers[name]
            task = capabilities.kept_task(fl_ctx)
            if ReservedHeaderKey.COOKIE_JAR in headers:
                headers[ReservedHeaderKey.COOKIE_JAR] = dict(task.cookies) if task else {}
        except Exception:
            self.logger.warning("the reply could not be checked: nothing leaves", exc_info=True)
            _replace(reply, fl_ctx)


def _replace(reply: Shareable, fl_ctx: FLContext) -> None:
    """Make ``reply`` a refusal, still of the same task: without its id the server would send it again."""
    reply.clear()
    reply.update(refused("REPLY_CHANGED"))
    task = capabilities.kept_task(fl_ctx)
    if task is not None:
        reply.set_cookie_jar(dict(task.cookies))
    reply.set_header(ReservedHeaderKey.TASK_NAME, fl_ctx.get_prop(FLContextKey.TASK_NAME))
    reply.set_header(ReservedHeaderKey.TASK_ID, fl_ctx.get_prop(FLContextKey.TASK_ID))


def _close_stickers(fl_ctx: FLContext) -> None:
    """Take back public properties that were to go with every message from now on."""
    manager = fl_ctx.get_prop(ReservedKey.MANAGER)
    if manager is not None:
        for name in set(manager.public_stickers) - PUBLIC_PROPERTIES:
            manager.public_stickers.pop(name, None)


def _close_properties(fl_ctx: FLContext) -> None:
    for name in fl_ctx.get_all_public_props():
        if name not in PUBLIC_PROPERTIES:
            fl_ctx.remove_prop(name, force_removal=True)
