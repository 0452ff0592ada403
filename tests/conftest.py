"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

REPOSITORY = Path(__file__).resolve().parents[1]

# One thread for each process, said before a library is loaded that asks: tests run side by side, and threads
# that wait for each other on a busy machine do four times the work. Tests of threads say how many they want.
for _limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_limit, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The check gives the same answer twice; new examples are tried wherever a person runs the tests.
# How long an example takes says nothing where tests run side by side.
settings.register_profile("person", deadline=None)
settings.register_profile("check", deadline=None, derandomize=True)
settings.load_profile("check" if os.environ.get("CI") else "person")


_HOSTILE = "tests/flare/hostile"

_LONGEST = (
    "tests/flare/test_federation.py",
    "tests/commands/test_demo.py",
    _HOSTILE,
    "tests/flare/test_mask_federation.py",
    "tests/flare/test_poc.py",
    "tests/flare/test_private_federation.py",
    "tests/flare/test_leaks.py",
    "tests/privacy/test_ledger_processes.py",
    "tests/privacy/test_privacy_loss.py",
    "tests/test_wheel.py",
    "tests/synthetic/test_bags.py",
)
"""What takes half a minute or more, the longest first: begun first, it leaves no worker alone at the end."""


class _ByFederation(LoadFileScheduling):
    """A file's tests go to one worker, and so do those of ``flare/hostile``: they share one federation.

    The longest come first, and a worker gets its next file when it begins its last test, not three before.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _HOSTILE if file.startswith(_HOSTILE + "/") else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = next((file for file in _LONGEST if file in self.workqueue), None)
        if longest is not None:
            self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Return what deals the tests to the workers (``--dist loadfile``)."""
    gone = [file for file in _LONGEST if not (REPOSITORY / file).exists()]
    assert not gone, f"tests/conftest.py: _LONGEST names what is no more: {', '.join(gone)}"
    return _ByFederation(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over the files without a slow test where only those are asked for: they take longest to import."""
    if config.getoption("markexpr") == "slow" and collection_path.match("test_*.py"):
        return True if "mark.slow" not in collection_path.read_text() else None
    return None


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real slides and tiles; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("HISTOFLARE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real histology here: set HISTOFLARE_TEST_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY
