"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file with one worker (``--dist loadgroup``): they share what was made for them.

    The files of ``flare/hostile`` share one federation.
    """
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "hostile" else item.path.stem))


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
