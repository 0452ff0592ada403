"""The trainer's process: ``python -m histoflare.site.child FD PARENT``, started by ``site.trainer``.

It answers one request after another until the other end of its pipe is closed. It imports neither FLARE nor
the program that started it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from histoflare.errors import HistoflareError

if TYPE_CHECKING:
    from histoflare.site.messages import Arrays
    from histoflare.site.work import SiteWork

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Serve the pipe at file descriptor ``arguments[0]`` for the process ``arguments[1]``."""
    faulthandler.enable()
    os.umask(0o077)  # what libraries write here (TensorBoard) is of patients too
    die_with_parent(int(arguments[1]))
    try:
        serve(Connection(int(arguments[0])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # closed: there is nobody left to answer


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the thread that started it ends (Linux).

    Elsewhere an idle process ends when it finds its pipe closed, a busy one after its task.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def serve(connection: Connection[Any, Any]) -> None:
    """Answer requests: first a ``setup``, then any number of the others."""
    from histoflare.site.messages import receive

    work: SiteWork | None = None
    while True:
        work = _answer(connection, work, *receive(connection))


def _answer(
    connection: Connection[Any, Any], work: SiteWork | None, kind: str, content: Any, arrays: Arrays
) -> SiteWork | None:
    """Answer one request; a function of its own, so that a round's tensors go when it is over."""
    from histoflare.site.messages import send
    from histoflare.site.work import SiteWork

    def say(text: str) -> None:
        send(connection, "say", text)

    try:
        if work is None:
            work = SiteWork(pickle.loads(content), say)
            send(connection, "ready")
        elif kind == "prepare":
            work.prepare(*content)
            send(connection, "answer")
        elif kind == "train":
            update = work.train(arrays, *content)
            send(connection, "answer", replace(update, tensors={}), update.tensors)
        elif kind == "tally":
            counts = work.tally(arrays, *content)
            send(connection, "answer", replace(counts, tensors={}), counts.tensors)
        else:
            send(connection, "answer", work.evaluate(arrays, *content))
    except HistoflareError as error:
        send(connection, "refused", (error.reason, str(error)))
    except Exception:
        # If it is the pipe that is closed, so it is for this.
        say(traceback.format_exc())
        text = "This site's training failed; the traceback is in its own log."
        send(connection, "refused", ("TRAINING_FAILED", text))
    return work


if __name__ == "__main__":
    main(sys.argv[1:])
