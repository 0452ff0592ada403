"""The tile benchmark runs and compares what it says it compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_quick_run(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tests/benchmarks/bench_tiles.py",
        "--quick",
        "--json",
        str(tmp_path / "rates.json"),
    ]
    subprocess.run(command, cwd=repository, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "rates.json").read_text())
    ours = {row["threads"]: row for row in rows if row["reader"] == "histoflare Slide.read"}
    assert set(ours) == {1, 2}
    for row in ours.values():
        assert 0.5 < row["ratio"] < 2  # the same work; docs/measured.md has the figure of a quiet machine
    for row in rows:
        assert "skipped" in row or row["tiles_per_s"] > 0
