"""Progress where there is no terminal: plain lines instead of bars that draw over themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.progress import Progress, Task, TaskID

LINE_SECONDS = 10.0
"""A step that goes on is spoken of at least this often, as far as it says anything itself …"""

LINE_SHARE = 0.1
"""… and after each tenth of it, but not within a second of the line before."""

LEAST_SECONDS = 1.0


class PlainProgress(Progress):
    """A progress display for logs: a line when a step begins and ends, and now and then between.

    Each line is written as it happens. It is used like a :class:`rich.progress.Progress`.

    Args:
        say: Writes one line.
        now: Seconds on a clock that never goes back.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(disable=True, get_time=now)  # rich keeps the counts and draws nothing
        self._say = say
        self._names: dict[TaskID, str] = {}
        self._said: dict[TaskID, tuple[float, float]] = {}  # when, and how much was done by then
        self._before: dict[TaskID, float] = {}  # how much was done before the clock began

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """Begin a step, see :meth:`rich.progress.Progress.add_task`."""
        task_id = super().add_task(description, *args, **fields)
        task = self._task(task_id)
        self._names[task_id] = description
        self._said[task_id] = (self.get_time(), task.completed)
        count = f" (0 of {task.total:.0f})" if task.total else ""
        self._say(f"{description} …{count}")
        return task_id

    def reset(self, task_id: TaskID, **changes: Any) -> None:
        """Begin a step's clock anew, see :meth:`rich.progress.Progress.reset`.

        What is done by then took none of its time.
        """
        super().reset(task_id, **changes)
        task = self._task(task_id)
        self._before[task_id] = task.completed
        self._said[task_id] = (self.get_time(), task.completed)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Go on with a step, see :meth:`rich.progress.Progress.update`."""
        was_finished = self._task(task_id).finished
        super().update(task_id, **changes)
        self._speak(task_id, was_finished)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Go on with a step, see :meth:`rich.progress.Progress.advance`."""
        was_finished = self._task(task_id).finished
        super().advance(task_id, advance)
        self._speak(task_id, was_finished)

    def _task(self, task_id: TaskID) -> Task:
        with self._lock:
            return self._tasks[task_id]

    def _speak(self, task_id: TaskID, was_finished: bool) -> None:
        """Say how far a step is, if it is over or it is time."""
        task, now = self._task(task_id), self.get_time()
        if was_finished:
            return
        if task.finished:
            count = f": {task.completed:.0f} of {task.total:.0f}" if (task.total or 0) > 1 else ""
            self._say(f"{self._names[task_id]}{count}, done in {_clock(task.finished_time or 0.0)}")
            return
        when, completed = self._said[task_id]
        is_further = bool(task.total) and task.completed - completed >= LINE_SHARE * (task.total or 1)
        if now - when < (LEAST_SECONDS if is_further else LINE_SECONDS):
            return
        self._said[task_id] = (now, task.completed)
        count = f": {task.completed:.0f} of {task.total:.0f}" if task.total else ""
        self._say(f"{task.description}{count}, {_left(task, self._before.get(task_id, 0.0))}")


def _left(task: Task, before: float) -> str:
    """Return how long a step took so far, and how long it will take if it goes on as it did on average.

    Args:
        before: How much was done before its clock began.
    """
    gone, done = task.elapsed or 0.0, task.completed - before
    if not (task.total and done):
        return f"{_clock(gone)} gone"
    return f"{_clock(gone)} gone, about {_clock(gone * (task.total - task.completed) / done)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
