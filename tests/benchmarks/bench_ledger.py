"""What a ledger takes: admitting a job, and booking and releasing a round, at a site with a long history.

    python -m tests.benchmarks.bench_ledger [--patients 10000] [--events 1000]

Admission opens the ledger anew, verifies all of it (SQLite's quick check, every entry, patient and cohort),
composes every earlier event of every patient, and writes the reservation and the head to the disk. It is
timed for a history over one cohort, and over as many different cohorts of half the patients as there were
events. Beside it, as a floor: reading the file, and one commit of SQLite with synchronous = EXTRA.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import WORKSTATION, Ledger, Reservation
from histoflare.privacy.ledger.events import GAUSSIAN, mechanism_of
from histoflare.privacy.ledger.session import Sessions
from histoflare.privacy.spend import Spend

BUDGET = Budget(8.0, 1e-5)
SPEND = Spend(20.0, sample_rate=0.01, steps=10)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_history(folder: Path, names: list[str], events: int, *, cohorts: int) -> tuple[Path, Path]:
    """Make a ledger with so many events, each reserved, booked and released, in one transaction."""
    files = (folder / "data" / "ledger.sqlite", folder / "keys" / "ledger.key")
    sessions, dice = Sessions(*files), np.random.default_rng(0)
    sessions.create("hospital-a", WORKSTATION)
    with sessions.writing(whole=True) as page:
        page.add_patients(sorted((page.keys.patient(name), "train") for name in names))
        for index in range(cohorts):
            chosen = np.arange(len(names)) + 1
            cohort = page.add_cohort(
                chosen if cohorts == 1 else dice.permutation(chosen)[: len(names) // 2].tolist()
            )
            rounds = events // cohorts
            about = {
                "about": "benchmark",
                "run": f"run {index}",
                "rounds": rounds,
                "cohort": cohort,
                "mechanism": mechanism_of(SPEND),
                "trust": None,
            }
            token = page.append("reservation", about)
            for round_index in range(rounds):
                event = {"reservation": token, "round": round_index, "model": sha("model"), "attempt": 1}
                booked = page.append("booking", {**event, "mechanism": GAUSSIAN, "trust": None})
                release = {"of": booked, "digest": sha(f"{index} {round_index}"), "figures": []}
                page.append("release", release)
    return files


def milliseconds(act: Callable[[int], object], repeats: int) -> str:
    """Return the median and the fastest time of ``act``, which is given 0, 1, 2, …"""
    times = []
    for repeat in range(repeats):
        started = time.perf_counter()
        act(repeat)
        times.append(1000 * (time.perf_counter() - started))
    return f"{statistics.median(times):9.1f} ({min(times):.1f})"


def commit(path: Path) -> Callable[[int], object]:
    """Return one commit of one row to a new SQLite file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("CREATE TABLE t (x)")
    return lambda repeat: connection.execute("INSERT INTO t VALUES (?)", (repeat,))


def measure(files: tuple[Path, Path], names: list[str], repeats: int) -> None:
    """Print what every use of a ledger takes."""
    roles = dict.fromkeys(names, "train")

    def admit(ledger: Ledger, run: str) -> Reservation:
        return ledger.reserve(run=run, about="benchmark", spend=SPEND, rounds=1, roles=roles, budget=BUDGET)

    ledger = Ledger(*files)
    token = admit(ledger, "known")
    ledger.book(token, 0, sha("model"), BUDGET)
    uses: dict[str, Callable[[int], object]] = {
        "admission, ledger opened anew": lambda repeat: admit(Ledger(*files), f"another {repeat}"),
        "a resumed run's admission": lambda repeat: admit(Ledger(*files), "known"),
        "booking beyond what is reserved": lambda repeat: ledger.book(
            token, 1 + repeat, sha("model"), BUDGET
        ),
        "asking whether bytes are released": lambda repeat: ledger.is_released(sha("bytes")),
        "verify": lambda repeat: Ledger(*files).verify(),
        "floor: reading the file": lambda repeat: files[0].read_bytes(),
        "floor: one commit": commit(files[0].with_name("floor.sqlite")),
    }
    for name, use in uses.items():
        print(f"  {name:<36} {milliseconds(use, repeats)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    names = [f"patient {index}" for index in range(options.patients)]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, SQLite "
        f"{sqlite3.sqlite_version}, Python {platform.python_version()}; {options.patients:,} patients, "
        f"{options.events:,} earlier events; ms, median (fastest) of {options.repeats}"
    )
    for cohorts in (1, options.events):
        with tempfile.TemporaryDirectory() as folder:
            files = make_history(Path(folder), names, options.events, cohorts=cohorts)
            print(f"cohorts: {cohorts:,}; ledger: {files[0].stat().st_size / 2**20:.1f} MiB")
            measure(files, names, options.repeats)


if __name__ == "__main__":
    main()
