"""The progress and the warnings of an experiment, and how long its phases take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """How far a step of an experiment is.

    Attributes:
        number: 1, 2, … in the order in which steps begin. Several may have the same text.
        text: What is being done.
        done: How much of it is done.
        total: Out of how much; None if nobody knows.
    """

    number: int
    text: str
    done: int
    total: int | None

    def __str__(self) -> str:
        """Return the step as a line for a reader, as ``on_progress=print`` shows it."""
        return f"{self.text}: {self.done} of {self.total}" if self.total else self.text


OnProgress = Callable[[Step], None]
"""Called when a step begins and whenever it goes on."""

OnWarning = Callable[[str], None]
"""Called with one sentence about what is odd or left out."""


class Watch:
    """Passes an experiment's progress and warnings to callbacks, and times its phases.

    Args:
        on_progress: Called with each step when it begins and goes on; None: progress is not shown.
        on_warning: Called with what is odd or left out; None: Python's ``warnings.warn`` is.

    Attributes:
        seconds: Phase → how long it took.
    """

    def __init__(self, on_progress: OnProgress | None = None, on_warning: OnWarning | None = None) -> None:
        self._on_progress = on_progress
        self._on_warning = on_warning
        self._begun = 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under ``name``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    @contextmanager
    def shown_phase(self, name: str) -> Iterator[None]:
        """Time a block under ``name``, and show it as a step of unknown length."""
        step = self.begin(name)
        with self.phase(name):
            yield
        step.end()

    def begin(self, text: str, total: int | None = None) -> RunningStep:
        """Begin a step and return what it is told through."""
        self._begun += 1
        return RunningStep(self._tell, Step(self._begun, text, 0, total))

    def warn(self, text: str) -> None:
        """Say what is odd or left out."""
        if self._on_warning is None:
            warnings.warn(text, stacklevel=2)
        else:
            self._on_warning(text)

    def _tell(self, step: Step) -> None:
        if self._on_progress is not None:
            self._on_progress(step)


class RunningStep:
    """A step that has begun; each call tells how far it is."""

    def __init__(self, tell: OnProgress, step: Step) -> None:
        self._tell = tell
        self._step = step
        tell(step)

    def advance(self) -> None:
        """Count one more item as done."""
        self.show(self._step.done + 1)

    def show(self, done: int, text: str | None = None) -> None:
        """Set how much is done; ``text``, if given, replaces the step's text from now on."""
        self._step = replace(self._step, done=done, text=text or self._step.text)
        self._tell(self._step)

    def count(self, done: int, total: int) -> None:
        """Set how much is done, and of how much: for callbacks that are given both."""
        self._step = replace(self._step, total=total)
        self.show(done)

    def end(self) -> None:
        """End a step whose length was not known beforehand."""
        self._step = replace(self._step, total=1)
        self.show(1)
