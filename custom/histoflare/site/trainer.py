"""A site's trainer: a process that stays from round to round, so that its death costs one round.

A crash of FLARE's own job process would end the whole job. Training therefore happens in a child process,
which keeps the site's data in memory; if it dies, the round is answered with ``TRAINER_DIED`` and the next
one starts a new child. What a strategy keeps at the site is on disk (``site.records``), so that a new child
goes on where the last one was.

The child is a fresh Python with a socket, not a fork and not ``multiprocessing``'s spawn, which would run the
parent's main module (FLARE's, a test runner's) once more.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from histoflare.errors import HistoflareError
from histoflare.site.messages import Arrays, EvaluateAnswer, TrainAnswer, TrainerSetup, receive, send

__all__ = ["EvaluateAnswer", "TrainAnswer", "Trainer", "TrainerSetup"]

KIT_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
"""What a startup kit sets for FLARE's processes, where their environment does not: glibc has one heap, and
what has 4 MiB or more is outside it and goes back to the system when freed."""

POLL_SECONDS = 0.1
"""How often ``stopped`` is asked while the child works. An answer is taken at once."""

DYING_SECONDS = 0.5
"""How long a child whose pipe is closed may take to end by itself: its log then says of what it died."""

END_SECONDS = 10.0
"""How long a killed child may take to be gone."""


class Trainer:
    """Trains and evaluates in a child process, which the first call starts.

    The child ends with :meth:`close` or with this process, however that ends (within moments on Linux). It
    ignores Ctrl-C; whoever handles that closes the trainer. Calls may come from any thread; they are answered
    one after another.

    Args:
        setup: What and how to train.
        say: Takes lines for the site's own log, tracebacks among them. They name slides and paths: not for
            anyone else.
    """

    def __init__(self, setup: TrainerSetup, say: Callable[[str], None]) -> None:
        self._setup = setup
        self._say = say
        self._child: _Child | None = None
        self._closed = False
        self._changing = threading.Lock()
        self._asking = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None before the first call and when there is none."""
        child = self._child
        return None if child is None else child.process.pid

    def train(
        self,
        state: Mapping[str, NDArray[Any]],
        round_index: int,
        total_rounds: int,
        *,
        metrics: Sequence[str] = (),
        left_out: Collection[str] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> TrainAnswer:
        """Return the site's half of a round.

        Args:
            state: The global state as received.
            round_index: From 0. total_rounds: Of the job.
            metrics: What to say of the received model, such as ``"validation/auc"``.
            left_out: Patients who take no part.
            stopped: Asked while the child works; true ends it.

        Raises:
            HistoflareError: What the child refused, with its reason; or TRAINING_FAILED, TRAINER_DIED,
                STOPPED.
        """
        content = (round_index, total_rounds, list(metrics), frozenset(left_out))
        answer, tensors = self._ask("train", content, state, stopped)
        update: TrainAnswer = replace(answer, tensors=tensors)
        return update

    def prepare(
        self,
        *,
        to_train: bool = True,
        left_out: Collection[str] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Have the child load the site's data; errors as above. Costs nothing where it has them.

        Args:
            to_train: Whether a round follows, and not an evaluation.
            left_out, stopped: As above.
        """
        self._ask("prepare", (to_train, frozenset(left_out)), {}, stopped)

    def evaluate(
        self,
        state: Mapping[str, NDArray[Any]],
        split: str,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> EvaluateAnswer:
        """Return how well the model does on ``split`` (train, validation, test or all); errors as above."""
        answer: EvaluateAnswer = self._ask("evaluate", (split,), state, stopped)[0]
        return answer

    def tally(
        self,
        state: Mapping[str, NDArray[Any]],
        split: str,
        *,
        left_out: Collection[str] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> TrainAnswer:
        """Return the noised counts of an evaluation on ``split`` (test or all); errors as above."""
        answer, tensors = self._ask("tally", (split, frozenset(left_out)), state, stopped)
        counts: TrainAnswer = replace(answer, tensors=tensors)
        return counts

    def close(self) -> None:
        """End the child and whatever it is doing. Calls from now on are refused (STOPPED)."""
        with self._changing:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.kill()
            with self._asking:  # a call that is under way ends now, and may not lose its pipe before
                child.connection.close()

    def _ask(
        self, request: str, content: Any, arrays: Mapping[str, NDArray[Any]], stopped: Callable[[], bool]
    ) -> tuple[Any, Arrays]:
        """Return the child's answer; start a child if there is none."""
        with self._asking:
            return self._converse(request, content, arrays, stopped)

    def _converse(
        self, request: str, content: Any, arrays: Mapping[str, NDArray[Any]], stopped: Callable[[], bool]
    ) -> tuple[Any, Arrays]:
        child: _Child | None = None
        try:
            child = self._running_child()
            if not child.ready:
                send(child.connection, "setup", pickle.dumps(self._setup))
                kind, reply, tensors = self._wait(child, stopped)
                child.ready = kind == "ready"
            if child.ready:
                send(child.connection, request, content, arrays)
                kind, reply, tensors = self._wait(child, stopped)
        except (EOFError, OSError) as error:
            ended = self._drop(child, DYING_SECONDS) or str(error)
            if self._closed:
                raise _stopped() from None
            raise HistoflareError(
                f"The trainer's process ended in the middle of its work ({ended}). This round is lost here; "
                "the next one starts a new process.",
                reason="TRAINER_DIED",
            ) from None
        except BaseException:
            self._drop(child)  # nobody waits for its answer any more
            raise
        if kind == "refused":
            if not child.ready:
                self._drop(child)
            reason, message = reply
            raise HistoflareError(message, reason=reason)
        return reply, tensors

    def _wait(self, child: _Child, stopped: Callable[[], bool]) -> tuple[str, Any, Arrays]:
        """Return the child's next message but what it says to the log; raise STOPPED if ``stopped``."""
        while True:
            while not child.connection.poll(POLL_SECONDS):
                if stopped():
                    raise _stopped()
            kind, content, tensors = receive(child.connection)
            if kind != "say":
                return kind, content, tensors
            self._say(content)

    def _running_child(self) -> _Child:
        with self._changing:
            if self._closed:
                raise _stopped()
            if self._child is not None and not self._child.is_alive():
                ended = self._child.kill(DYING_SECONDS)
                self._say(f"the trainer's process ended between two rounds ({ended})")
                self._child.connection.close()
                self._child = None
            if self._child is None:
                self._child = _Child(self._setup.configuration.device)
            return self._child

    def _drop(self, child: _Child | None, grace_seconds: float = 0.0) -> str:
        """Kill ``child``, if there is one, unless it ends by itself first; return how it ended."""
        if child is None:
            return ""
        with self._changing:
            if self._child is child:
                self._child = None
        ended = child.kill(grace_seconds)
        child.connection.close()
        return ended


class _Child:
    """The process at the other end of ``connection``; ``ready`` once it has its setup."""

    def __init__(self, device: str) -> None:
        self.ready = False
        self.connection, theirs = Pipe()
        started: Future[subprocess.Popen[bytes]] = Future()
        self._keeper = threading.Thread(
            target=_keep, args=(theirs.fileno(), started, device), name="trainer", daemon=True
        )
        self._keeper.start()
        try:
            self.process = started.result()
        finally:
            theirs.close()  # else the end of the child would not close the pipe

    def is_alive(self) -> bool:
        """Return whether the process runs; to be asked between two requests, when it has nothing to say."""
        return self._keeper.is_alive() and not self.connection.poll()

    def kill(self, grace_seconds: float = 0.0) -> str:
        """Kill the process, unless it ends by itself first; return how it ended."""
        self._keeper.join(grace_seconds)
        if self._keeper.is_alive():
            self.process.kill()
            self._keeper.join(END_SECONDS)
        code = self.process.returncode
        if code is None:
            return "it does not end"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _keep(fd: int, started: Future[subprocess.Popen[bytes]], device: str) -> None:
    """Start the child and wait for its end.

    The kernel kills a child with the *thread* that started it, and FLARE's may end before their job: this one
    lives as long as the child or the whole process.
    """
    # The child has this thread's signal mask from its first instruction on: Ctrl-C is the parent's.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "histoflare.site.child", str(fd), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            env=_environment(device),
        )
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(process)
    process.wait()


def _environment(device: str) -> dict[str, str]:
    """Return the child's environment: it finds the modules this process finds.

    On the CPU it trains on one thread, from the first import on; the batches of a GPU are made by more.

    It has none of the kit's settings of glibc, which suit processes that carry updates: with them a step of
    DHUnet took 1.27 s instead of 1.03.
    """
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(limits, "1") if device == "cpu" else {}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    kept = {name: value for name, value in os.environ.items() if KIT_MALLOC.get(name) != value}
    return {**kept, **threads, "PYTHONPATH": path}


def _stopped() -> HistoflareError:
    return HistoflareError("The training was stopped.", reason="STOPPED")
