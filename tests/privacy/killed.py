"""Runs a site's round again and again, each time killed before its next write.

    python -m tests.privacy.killed FOLDER

The n-th run has the folder FOLDER/<n> and is killed with SIGKILL when it is about to make its n-th system
call that changes a file: SQLite's own too, for the calls are counted with ptrace. FOLDER/told.json is a list:
what each run had been told by then. Exit code 77: tracing is not permitted here.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from histoflare.errors import LedgerError
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import Booking, Ledger
from histoflare.privacy.release_store import ReleaseStore
from tests.privacy.ledgers import BUDGET, ROLES, SITE, book, note, paths, reserve, sha

NOT_PERMITTED = 77
ROUNDS = 2
FAILING = 1
"""The round that fails at first; it is booked twice, and so one event is beyond the reserved ones."""

# write, pwrite64, writev, pwritev, fsync, fdatasync, ftruncate, fallocate; renaming, removing, new folders
CHANGING = {
    "x86_64": {1, 18, 20, 296, 74, 75, 77, 285, 82, 264, 316, 87, 263, 83, 258},
    "aarch64": {64, 68, 66, 70, 82, 83, 46, 47, 38, 276, 35, 34},
}
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
SYSGOOD, EXITKILL = 1, 1 << 20
ENTRY = 1


class SyscallInfo(ctypes.Structure):
    """struct ptrace_syscall_info of linux/ptrace.h, as far as the arguments of a call that is entered."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64 * 2),
    )


libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def ptrace(request: int, pid: int = 0, address: int = 0, data: object = None) -> int:
    found: int = libc.ptrace(request, pid, address, data)
    if found < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    return found


def update_of(booking: Booking) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Return what stands for the update of a booking: repeatable, so that its bytes can be compared."""
    return {"w": np.random.default_rng(booking.round_index).normal(size=2000).astype(np.float32)}


def digest_of(booking: Booking) -> str:
    return sha(update_of(booking)["w"].tobytes().hex())


def created(folder: Path) -> Ledger:
    """Return a folder's ledger; as its steward make it if there is none."""
    try:
        return Ledger.create(*paths(folder), SITE)
    except LedgerError as error:
        if error.reason != "LEDGER_UNUSABLE":
            raise
        return Ledger(*paths(folder))


def place_of(folder: Path) -> Path:
    """Return the folder in which the ledger of a run goes on, or is to: it is moved at the end."""
    try:
        if Ledger(*paths(folder / "moved")).identity().is_here:
            return folder / "moved"
    except LedgerError:
        pass
    return folder


def carry(folder: Path) -> None:
    """Copy the ledger, the key and the head to another folder, and bind the ledger there."""
    if not Ledger(*paths(folder)).identity().is_away:  # or the copy is whole: it has closed this one
        for path in (*paths(folder), folder / "keys" / "ledger.key.head"):
            target = folder / "moved" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    Ledger(*paths(folder / "moved")).move()


def take_part(folder: Path, told: int | None = None) -> None:
    """Do what a site does in a job of two rounds, one of which fails at first; then the ledger is moved.

    What was done is said to the file descriptor ``told``.
    """

    def tell(what: str, value: object) -> None:
        if told is not None:
            os.write(told, (json.dumps([what, value]) + "\n").encode())

    if place_of(folder) == folder:
        ledger = created(folder)
        tell("created", None)
        if not ledger.identity().is_away:
            run_rounds(folder, ledger, tell)
        carry(folder)
        tell("moved", None)
    note(Ledger(*paths(folder / "moved")))
    tell("noted", None)


def run_rounds(folder: Path, ledger: Ledger, tell: Callable[[str, object], None]) -> None:
    """Do what a site does in a job, and close another one."""
    store, log = ReleaseStore(folder / "releases"), AuditLog(folder / "audit.jsonl")
    reservation = reserve(ledger, rounds=ROUNDS)
    tell("reserved", reservation.id)
    for round_index in range(ROUNDS):
        booked = ledger.book(reservation, round_index, sha(f"model {round_index}"), BUDGET)
        if not isinstance(booked, Booking):
            continue
        tell("booked", booked.id)
        if round_index == FAILING and booked.attempt == 1:
            ledger.fail(booked)
            tell("failed", booked.id)
            booked = book(ledger, reservation, round_index)
            tell("booked", booked.id)
        store.make_room(booked.id, 8000)
        store.save(booked.id, update_of(booked), {"round": round_index})
        ledger.release(booked, digest_of(booked))
        tell("released", booked.id)
        log.write("released", round=round_index)
    disclosed = ledger.disclose(run="run", model_sha256=sha("m"), patients=["emil"], roles=ROLES, limit=1)
    tell("disclosed", disclosed.id)
    reserve(ledger, "other", 2)
    ledger.close("other")
    tell("closed", None)


def run_until(folder: Path, n: int) -> tuple[list[object], bool]:
    """Run :func:`take_part` to its n-th changing call; return what it was told, and whether it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ptrace(TRACEME)
            os.kill(os.getpid(), signal.SIGSTOP)
            take_part(folder, writing)
            os._exit(0)
        except PermissionError:
            os._exit(NOT_PERMITTED)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(writing)
    killed = trace(pid, writing, n)
    with os.fdopen(reading) as lines:
        return [json.loads(line) for line in lines], killed


def trace(pid: int, told: int, n: int) -> bool:
    calls, left = CHANGING[platform.machine()], n
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        sys.exit(NOT_PERMITTED)
    ptrace(SETOPTIONS, pid, 0, SYSGOOD | EXITKILL)
    info = SyscallInfo()
    deliver = 0
    while True:
        ptrace(SYSCALL, pid, 0, deliver)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                sys.exit(f"the run ended with {os.WEXITSTATUS(status)}")
            return False
        stopped_by = os.WSTOPSIG(status)
        if stopped_by != signal.SIGTRAP | 0x80:
            deliver = stopped_by
            continue
        deliver = 0
        ptrace(GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.byref(info))
        if info.op == ENTRY and info.number in calls and info.arguments[0] != told:
            left -= 1
            if left == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True


def main() -> None:
    base = Path(sys.argv[1])
    if platform.machine() not in CHANGING:
        sys.exit(NOT_PERMITTED)
    all_told = []
    killed, n = True, 0
    while killed:
        n += 1
        (base / str(n)).mkdir(parents=True)
        told, killed = run_until(base / str(n), n)
        all_told.append(told)
    (base / "told.json").write_text(json.dumps(all_told))


if __name__ == "__main__":
    main()
