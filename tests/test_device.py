"""What is to run on another device runs there: ``on_device.py``, in a process of its own.

PyTorch makes its queues for backward passes once a process, for the devices that it knows by then, and the
stand-in for a GPU must be one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_the_device_that_was_asked_for(repository: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_device.py"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
