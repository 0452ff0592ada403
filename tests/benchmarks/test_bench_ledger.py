"""The ledger benchmark runs, and makes the history it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from histoflare.privacy.ledger import Ledger
from tests.benchmarks.bench_ledger import BUDGET, make_history


def test_quick_run(repository: Path) -> None:
    command = [sys.executable, "tests/benchmarks/bench_ledger.py", "--patients", "50", "--events", "10"]
    done = subprocess.run(
        [*command, "--repeats", "2"], cwd=repository, check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("admission, ledger opened anew") == 2


def test_the_history_is_what_it_says(tmp_path: Path) -> None:
    names = [f"patient {index}" for index in range(20)]
    for cohorts in (1, 6):
        ledger = Ledger(*make_history(tmp_path / str(cohorts), names, 6, cohorts=cohorts))
        found = ledger.verify()
        assert (found.patients, found.cohorts) == (20, cohorts)
        runs = ledger.summary(BUDGET).runs
        assert len(runs) == cohorts and sum(run.released for run in runs) == 6
