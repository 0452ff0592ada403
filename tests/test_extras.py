"""What an installation can do without: each library is declared where the code needs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from histoflare.extras import EXTRAS
from tests.test_layers import imports

OTHERS_BRING = {"markupsafe": "jinja2", "msgpack": "nvflare", "threadpoolctl": "scikit-learn"}
"""Modules of libraries that one of ours cannot do without."""

WITHOUT_EXTRAS = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
SERVER = """
import importlib
from histoflare.flare.job import read_job
from histoflare.shipped import JOBS, job_names
for module in "workflow aggregator persistor server_storage closed_commands record kit_check".split():
    importlib.import_module(f"histoflare.flare.{module}")
for name in job_names():
    if name.startswith("mem_"):
        read_job(JOBS / name).task.build_model()
task = read_job(JOBS / "dhunet_fedavg").task
try:
    task.build_model()
except Exception as error:
    print(error.reason, error)
"""


def distribution_names(requirements: list[str]) -> set[str]:
    """Return the distributions that a list of requirements names, spelt as one."""
    return {canonical(re.split(r"[\[<>=!~ ]", each)[0]) for each in requirements}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    return found


def test_every_library_that_is_imported_is_required(repository: Path, project: dict[str, Any]) -> None:
    """By what everybody installs, or by the extra that an error names when it is missing."""
    everywhere = distribution_names(project["dependencies"])
    by_extra = {name: distribution_names(needs) for name, needs in project["optional-dependencies"].items()}
    distributions = packages_distributions()
    undeclared = set()
    for path in (repository / "custom").rglob("*.py"):
        modules = {name.partition(".")[0] for name in imports(path.read_text())}
        for module in modules - {"histoflare", *sys.stdlib_module_names} - OTHERS_BRING.keys():
            found = {canonical(name) for name in distributions.get(module, [module])}
            declared = everywhere if module not in EXTRAS else by_extra[EXTRAS[module]]
            if not found & declared:
                undeclared.add(module)
    assert not undeclared


def test_the_extra_of_everything_has_all_extras(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert extras["all"] == ["histoflare[slides,masks,report]"] and "histoflare[slides]" in extras["masks"]
    assert set(EXTRAS.values()) == {"slides", "masks", "report"}


def test_a_server_needs_no_extra_but_for_a_network() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + SERVER], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("LIBRARY_MISSING") and "histoflare[" in done.stdout


def test_a_command_without_its_library_says_which_extra_brings_it(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    command = "sys.argv[1:] = ['slide', 'info', 'a.svs']\nfrom histoflare.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "pip install 'histoflare[slides]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
