"""docs/first-steps.ipynb does what it says: its cells are run one after the other, as a reader would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-steps.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]


def source_of(kind: str) -> list[str]:
    """Return the text of the cells of a kind."""
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the notebook makes its folder
    known: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(source_of("code"), start=1):
        exec(compile(code, f"{NOTEBOOK.name}, cell {number}", "exec", dont_inherit=True), known)
    alone = [metrics["balanced_accuracy"].value for metrics in known["found"].local.values()]
    assert known["found"].federated["balanced_accuracy"].value > sum(alone) / len(alone)
    assert known["plan"].budget().spent([known["plan"].spend().times(15)]) <= 8
    assert known["page"].is_relative_to(tmp_path) and "first-steps" in known["page"].read_text()


def test_it_is_kept_without_what_a_run_leaves() -> None:
    """Pictures and paths of whoever ran it last have no place in a repository."""
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_its_links_lead_to_pages() -> None:
    links = [target for text in source_of("markdown") for target in re.findall(r"\]\(([^)]+)\)", text)]
    assert links and all((NOTEBOOK.parent / target).exists() for target in links)
