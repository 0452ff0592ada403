"""What a careless or hostile component could do in a site's job process: a secret in every way out.

Each way has a secret of its own, ``SECRET-<way>-<mark>-SECRET``, so that a test can name the way that was
open, and at which kind of site.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.streamers.file_streamer import FileStreamer
from nvflare.app_common.widgets.streaming import create_analytic_dxo
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message

from histoflare.flare.executor import SiteExecutor

WAYS = (
    "dxo-meta",
    "reply-header",
    "reply-key",
    "task-cookie",
    "after-gate-meta",
    "after-gate-header",
    "before-send-header",
    "public-property",
    "sticky-property",
    "analytics",
    "fed-event",
    "aux-message",
    "cell-message",
    "bulk-message",
    "file-stream",
    "error-log",
    "info-log",
    "job-filter",
    "return-code",
    "exception",
)


def secret(way: str, mark: str) -> str:
    assert way in WAYS
    return f"SECRET-{way}-{mark}-SECRET"


class LeakyExecutor(SiteExecutor):
    """The project's executor, whose reply is tampered with; in its third round it answers with a text, and in
    the fourth it raises one."""

    def __init__(self, mark: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._mark = mark

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Any
    ) -> Shareable:
        reply = _answer_with_text(shareable, self._mark)
        if reply is None:
            reply = super().execute(task_name, shareable, fl_ctx, abort_signal)
        return _plant(reply, self._mark)


class OpenExecutor(Executor):
    """An executor that asks for no token: what a site without admission would let run."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self._mark = mark

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Any
    ) -> Shareable:
        reply = _answer_with_text(shareable, self._mark)
        if reply is None:
            reply = DXO("WEIGHT_DIFF", data={"w": np.zeros(1)}).to_shareable()
        return _plant(reply, self._mark)


def _answer_with_text(shareable: Shareable, mark: str) -> Shareable | None:
    index = shareable.get_header("current_round")
    if index == 3:
        raise ValueError(secret("exception", mark))
    return make_reply(secret("return-code", mark)) if index == 2 else None


def _plant(reply: Shareable, mark: str) -> Shareable:
    if "DXO" in reply:
        reply["DXO"]["meta"]["initial_metrics"] = secret("dxo-meta", mark)
    reply.set_header("leak", secret("reply-header", mark))
    reply["leak"] = secret("reply-key", mark)
    return reply


class LeakyFilter(Filter):
    """A filter of the job, which FLARE runs after the site's: it writes into the reply of the last round."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self._mark = mark
        self._calls = 0

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        self._calls += 1
        if self._calls == 4:  # the fifth round: FLARE filters no reply of an exception
            shareable["DXO"]["meta"]["filtered"] = secret("job-filter", self._mark)
        return shareable


class Leaker(FLComponent):
    """A component of the job that uses FLARE's events to send what it likes."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self._mark = mark

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        mark = self._mark
        if event_type == EventType.BEFORE_TASK_EXECUTION:
            fl_ctx.get_prop(FLContextKey.TASK_DATA).add_cookie("leak2", secret("task-cookie", mark))
            self._round = fl_ctx.get_prop(FLContextKey.TASK_DATA).get_header("current_round")
            self._send(fl_ctx)
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER:
            reply = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            if self._round == 1 and "DXO" in reply:
                reply["DXO"]["meta"]["leak"] = secret("after-gate-meta", mark)
            reply.set_header("leak2", secret("after-gate-header", mark))
            self._reply = reply
        elif event_type == EventType.BEFORE_SEND_TASK_RESULT:
            self._reply.set_header("leak3", secret("before-send-header", mark))
            fl_ctx.set_prop("leak", secret("public-property", mark), private=False, sticky=False)
        elif event_type == EventType.START_RUN:
            fl_ctx.set_prop("leak_sticky", secret("sticky-property", mark), private=False, sticky=True)

    def _send(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        for way in (self._analytics, self._fed_event, self._aux, self._cell, self._bulk, self._stream):
            try:
                way(engine, fl_ctx)
            except Exception as error:
                self.logger.info("%s: %s", way.__name__, type(error).__name__)
        self.logger.error(secret("error-log", self._mark))
        self.logger.info(secret("info-log", self._mark))

    def _analytics(self, engine: Any, fl_ctx: FLContext) -> None:
        dxo = create_analytic_dxo(secret("analytics", self._mark), 1.0, AnalyticsDataType.SCALAR)
        fl_ctx.set_prop(FLContextKey.EVENT_DATA, dxo.to_shareable(), private=True, sticky=False)
        self.fire_event("analytix_log_stats", fl_ctx)

    def _fed_event(self, engine: Any, fl_ctx: FLContext) -> None:
        self.fire_fed_event("fed.leak", Shareable({"leak": secret("fed-event", self._mark)}), fl_ctx)

    def _aux(self, engine: Any, fl_ctx: FLContext) -> None:
        request = Shareable({"leak": secret("aux-message", self._mark)})
        engine.send_aux_request(None, "leak", request, timeout=1.0, fl_ctx=fl_ctx)

    def _cell(self, engine: Any, fl_ctx: FLContext) -> None:
        message = Message({MessageHeaderKey.TOPIC: "leak"}, {"leak": secret("cell-message", self._mark)})
        engine.get_cell().send_request("leak", "leak", "server", message, timeout=1.0)

    def _bulk(self, engine: Any, fl_ctx: FLContext) -> None:
        """FLARE packs what is queued into one message for itself."""
        message = Message(payload={"leak": secret("bulk-message", self._mark)})
        engine.get_cell().core_cell.queue_message("leak", "leak", "server", message)

    def _stream(self, engine: Any, fl_ctx: FLContext) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "leak.txt"
            file.write_text(secret("file-stream", self._mark))
            FileStreamer.stream_file("leak", "leak", {}, ["server"], str(file), fl_ctx, chunk_timeout=2.0)
