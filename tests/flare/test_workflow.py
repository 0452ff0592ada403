"""A round waits for the sites it asked."""

from __future__ import annotations

from typing import Any

import pytest
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from histoflare.flare.headers import ASKED
from histoflare.flare.workflow import AskingScatterAndGather


@pytest.mark.parametrize(("asked", "waits_for"), [(["b"], 1), (["a", "c"], 2), (["a", "b", "c"], 2)])
def test_only_the_sites_asked_get_the_task_and_are_waited_for(asked: list[str], waits_for: int) -> None:
    class Communicator:
        def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, *arguments: Any) -> None:
            self.arguments = arguments

    workflow = AskingScatterAndGather(min_clients=2)
    workflow.communicator = Communicator()
    data = Shareable()
    data.set_header(ASKED, asked)
    workflow.broadcast_and_wait(
        Task("train", data), FLContext(), min_responses=2, wait_time_after_min_received=60
    )
    assert workflow.communicator.arguments == (asked, waits_for, 60, None)
