"""Small ledgers for tests."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import UPDATE, Booking, Disclosure, Ledger, Reservation
from histoflare.privacy.spend import Spend

BUDGET = Budget(8.0, 1e-5)
SPEND = Spend(20.0)
"""An event without sampling: ρ = order ÷ (2 · 20²), by the closed form of the Gaussian mechanism's RDP."""

ABOUT = "dp-patient: dp-sgd"
ROLES = {"anna": "train", "bert": "train", "cleo": "train", "dora": "validation", "emil": "test"}


@contextmanager
def quick_folder() -> Iterator[Path]:
    """Yield a folder in memory, where there is room: what is killed or raced needs no disk to wait for."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 200 * 2**20
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)


def sha(text: str) -> str:
    """Return a SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def paths(folder: Path) -> tuple[Path, Path]:
    """Return where the ledger and the key of a folder are."""
    return folder / "data" / "ledger.sqlite", folder / "keys" / "ledger.key"


SITE = "hospital-a"


def new_ledger(folder: Path) -> Ledger:
    """Return the ledger of a folder; it is made if it is not there."""
    return Ledger.open_or_create(*paths(folder), SITE)


def steward_ledger(folder: Path, site: str = SITE) -> tuple[Path, Path]:
    """Make a steward's ledger in a folder if there is none, and return where it and its key are."""
    path, key = paths(folder)
    if not path.exists():
        Ledger.create(path, key, site)
    return path, key


def site_lines(folder: Path, site: str = SITE) -> str:
    """Make a steward's ledger in a folder if there is none, and return what a site's file says of it."""
    path, key = steward_ledger(folder, site)
    return f'ledger = "{path}"\nledger_key = "{key}"\n'


def copied(folder: Path, to: Path) -> Path:
    """Copy a folder with its ledger and key, and return the copy."""
    shutil.copytree(folder, to)
    return to


def note(ledger: Ledger, round_index: int = 0, digest: str = "update 0") -> Disclosure:
    """Note an update that nothing protects."""
    return ledger.note(
        what=UPDATE,
        run="open run",
        model_sha256=sha("model 0"),
        digest=sha(digest),
        figures=["train/loss"],
        patients=3,
        round_index=round_index,
    )


def reserve(ledger: Ledger, run: str = "run", rounds: int = 3, spend: Spend = SPEND) -> Reservation:
    """Reserve rounds for the patients of :data:`ROLES`."""
    return ledger.reserve(run=run, about=ABOUT, spend=spend, rounds=rounds, roles=ROLES, budget=BUDGET)


def book(ledger: Ledger, reservation: Reservation, round_index: int) -> Booking:
    """Book a round that is not released."""
    booked = ledger.book(reservation, round_index, sha(f"model {round_index}"), BUDGET)
    assert isinstance(booked, Booking)
    return booked


def fill(ledger: Ledger) -> Reservation:
    """Write at least one entry of every kind."""
    reservation = reserve(ledger)
    ledger.release(book(ledger, reservation, 0), sha("bytes 0"))
    ledger.fail(book(ledger, reservation, 1))
    ledger.disclose(run="run", model_sha256=sha("model 3"), patients=["emil"], roles=ROLES, limit=1)
    reserve(ledger, "gone", 2)
    ledger.close("gone")
    note(ledger)
    ledger.depart()
    ledger.move(old_is_gone=True)
    return reservation


FILLED = 15
"""Entries that :func:`fill` writes, the first one included."""


def most_rounds(spend: Spend = SPEND, budget: Budget = BUDGET) -> int:
    """Return how many events an empty budget has room for."""
    n = int(budget.allowance / budget.cost(spend))
    while budget.admits(budget.cost(spend.times(n + 1))):
        n += 1
    while not budget.admits(budget.cost(spend.times(n))):
        n -= 1
    return n
