"""A full disk: refused before training, and nothing is believed to be booked that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILLED = """
import errno, json, os, sys
from pathlib import Path
from histoflare.errors import LedgerError
from histoflare.privacy.ledger import Booking
from histoflare.privacy.release_store import MARGIN_BYTES, ReleaseStore
from histoflare.privacy.ledger import Ledger
from tests.privacy.ledgers import BUDGET, SITE, book, copied, new_ledger, paths, reserve, sha

folder = Path(sys.argv[1])


def full(act, most):
    # Try ``act`` with so many KiB left, from 0 on, until it has room; return what it said each time.
    said = []
    for left in range(most):
        filler = os.open(folder / "filler", os.O_RDWR | os.O_CREAT)
        if free() > left * 1024:
            os.posix_fallocate(filler, 0, free() - left * 1024)
        said.append(attempt(act))
        os.close(filler)
        (folder / "filler").unlink()
        if said[-1] == "done":
            return said
    return said


def free():
    found = os.statvfs(folder)
    return found.f_bavail * found.f_bsize


def attempt(act):
    try:
        act()
        return "done"
    except LedgerError as error:
        return error.reason


creating = full(lambda: Ledger.create(*paths(folder), SITE), 200)
ledger = Ledger(*paths(folder))
assert ledger.verify().entries == 1
reservation = reserve(ledger, rounds=100)
store, said = ReleaseStore(folder / "releases"), []

said.append(attempt(lambda: store.make_room(1, free())))
said.append(attempt(lambda: store.make_room(1, free() - MARGIN_BYTES)))
assert free() == 0
said.append(attempt(lambda: book(ledger, reservation, 0)))
said.append(attempt(lambda: ledger.verify()))
store.save(1, {}, {})
assert free() > MARGIN_BYTES
said.append(attempt(lambda: book(ledger, reservation, 0)))
steps, told = [], 1
for left in range(0, 40):
    filler = os.open(folder / "filler", os.O_RDWR | os.O_CREAT)
    if free() > left * 1024:
        os.posix_fallocate(filler, 0, free() - left * 1024)
    steps.append(attempt(lambda: book(ledger, reservation, 1 + left)))
    told += steps[-1] == "done"
    os.close(filler)
    (folder / "filler").unlink()
    again = new_ledger(folder)
    booked = again.summary(BUDGET).runs[0].booked
    assert told <= booked, (told, booked)
    book(again, reservation, 1 + left)
    told = again.summary(BUDGET).runs[0].booked
    assert told == 2 + left, "tried again, it is booked once"
said.append(sorted(set(steps)))
said.append(again.verify().ahead)
copied(folder / "data", folder / "copy" / "data")
copied(folder / "keys", folder / "copy" / "keys")
copy = Ledger(*paths(folder / "copy"))
said += [creating, full(copy.move, 200)]
assert copy.identity().is_here and Ledger(*paths(folder)).identity().is_away
book(copy, reservation, 60)
print(json.dumps(said))
"""


def test_a_disk_that_is_really_full(repository: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "filled.py"
    script.write_text(FILLED)
    mount = f"mount -t tmpfs -o size=3m tmpfs {disk} || exit 77; exec {sys.executable} {script} {disk}"
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount],
            cwd=repository,
            env={"PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    too_large, room, booking, verifying, then, steps, ahead, *making = json.loads(done.stdout)
    assert (too_large, room) == ("LEDGER_FULL", "done")
    assert (booking, verifying, then) == ("LEDGER_FULL", "done", "done")
    assert steps == ["LEDGER_FULL", "done"], "some had room and some had not, and no other error came"
    assert ahead == 0
    for steps in making:
        assert set(steps[:-1]) == {"LEDGER_FULL"} and steps[-1] == "done", "made and moved once there is room"


LIMITED = """
import json, os, resource, sys
from pathlib import Path
from histoflare.errors import LedgerError
from tests.privacy.ledgers import BUDGET, book, new_ledger, paths, reserve, sha

folder = Path(sys.argv[1])
ledger = new_ledger(folder)
reservation = reserve(ledger, rounds=100)
size = paths(folder)[0].stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
said = []
for index in range(60):
    try:
        book(ledger, reservation, index)
        said.append("done")
    except LedgerError as error:
        said.append(error.reason)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = new_ledger(folder)
assert again.summary(BUDGET).runs[0].booked == said.count("done")
book(again, reservation, 60)
print(json.dumps(said))
"""


def test_a_ledger_that_may_not_grow(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said[0] == "done" and said[-1] == "LEDGER_FULL"
    assert set(said) == {"done", "LEDGER_FULL"}
