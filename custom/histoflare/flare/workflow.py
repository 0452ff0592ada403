"""FLARE's scatter-and-gather, for strategies that do not ask every site in every round."""

from __future__ import annotations

from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from histoflare.flare.headers import ASKED


class AskingScatterAndGather(ScatterAndGather):
    """Sends the task of a round to the sites that its header names, and waits for those.

    FLARE's own sends it to every site and counts every reply: where ``min_clients`` sites that were not asked
    have said so, the round would close ``wait_time_after_min_received`` later, without the sites that train.
    """

    def broadcast_and_wait(
        self,
        task: Task,
        fl_ctx: FLContext,
        targets: list[str] | None = None,
        min_responses: int = 1,
        wait_time_after_min_received: int = 0,
        abort_signal: Signal | None = None,
    ) -> None:
        """Send the task to the sites asked; ``min_responses`` is never more than there are of them."""
        asked = task.data.get_header(ASKED)
        if asked is not None:
            targets, min_responses = asked, min(min_responses, len(asked))
        super().broadcast_and_wait(
            task, fl_ctx, targets, min_responses, wait_time_after_min_received, abort_signal
        )
