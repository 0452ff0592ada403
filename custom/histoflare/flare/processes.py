"""Processes of a federation on this machine: started apart from this one, found again, ended for certain.

FLARE starts each job in a session of its own, and a trainer starts below that: neither a process group nor
the tree below a process holds them all once a process in between has died. What they all have is their
environment: everything that was started for a federation carries its name there. What a person started by a
kit's own script does not, and is known by its command: FLARE's program, or the script, on one of its kits.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from histoflare.errors import HistoflareError
from histoflare.storage import make_folder, open_private, real_path

FEDERATION_VARIABLE = "HISTOFLARE_FEDERATION"
"""Environment variable: the name of the federation that a process belongs to."""

Gone = psutil.Error
"""What a question to a process raises that has ended, or is of another user."""

FLARE_PROGRAMS = "nvflare.private.fed.app."
START_SCRIPT = "/startup/sub_start.sh"
"""In the command of a process that a kit's own script started."""

LOOPBACK = "127.0.0.1"

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], None] | signal.Handlers

_DIE_WITH_PARENT = (
    "import os, sys; from histoflare.site.child import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


def start(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    folder: Path,
    *,
    federation: str,
    detached: bool,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: Ctrl-C here does not reach it.

    Args:
        command: Program and arguments.
        log: File that gets what it prints, at its end.
        environment: All of its environment; the federation's name is added.
        folder: Its working folder.
        federation: Name of the federation it belongs to.
        detached: False: the kernel kills it when the thread that called this ends, however it ends (Linux).
    """
    if not detached:
        command = [sys.executable, "-P", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    make_folder(log.parent)
    with os.fdopen(open_private(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, FEDERATION_VARIABLE: federation},
            cwd=folder,
            start_new_session=True,
        )


def find(federation: str, kits: str = "") -> list[psutil.Process]:
    """Return the living processes of a federation, of this user.

    Args:
        federation: Its name.
        kits: The folder of its kits; "" leaves out what a person started by a kit's own script.
    """
    if not federation:  # a process of no federation has no name either
        return []
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(FEDERATION_VARIABLE) == federation or (
                kits != "" and _runs_kit(process.cmdline(), kits)
            )
            if is_ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # of another user, or gone meanwhile
    return found


def _runs_kit(command: Sequence[str], kits: str) -> bool:
    """Return whether a command is FLARE's program or start script on a kit; an editor on its files is not."""
    folder = real_path(Path(kits))
    if not any(folder in real_path(Path(part)).parents for part in command if part.startswith("/")):
        return False
    return any(part.startswith(FLARE_PROGRAMS) or part.endswith(START_SCRIPT) for part in command)


def end(federation: str, grace_s: float = 5.0, attempts: int = 10, *, kits: str = "") -> None:
    """End all processes of a federation: asked first, killed after ``grace_s`` seconds.

    Args:
        federation: Its name. kits: As of :func:`find`.
        grace_s: Seconds. attempts: How often they are killed.

    Raises:
        HistoflareError: Some are left after ``attempts`` times (FEDERATION_RUNNING).
    """
    alive = find(federation, kits)
    _signal(alive, signal.SIGTERM)
    psutil.wait_procs(alive, timeout=grace_s)
    for _ in range(attempts):
        alive = find(federation, kits)  # anew each time: one may have started another meanwhile
        if not alive:
            return
        _signal(alive, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=1.0)
    pids = ", ".join(str(process.pid) for process in alive)
    raise HistoflareError(
        f"These processes of the federation cannot be ended: {pids}.", reason="FEDERATION_RUNNING"
    )


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def free_port() -> int:
    """Return a TCP port that nobody listens on now. It is not kept: somebody else may take it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_is_taken(port: int) -> bool:
    """Return whether anybody listens on a TCP port, at any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the past do not count
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception in the block, so that it can clean up.

    Only in the main thread; elsewhere nothing is changed.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled({signal.SIGTERM: leave, signal.SIGHUP: leave}):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no Ctrl-C or SIGTERM cut the block short: what it ends must be ended. Keep the block short."""
    with _handled(dict.fromkeys(_STOP_SIGNALS, signal.SIG_IGN)):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, _Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
