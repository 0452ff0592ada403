"""The built wheel, installed by itself and used from an empty folder: nothing of the checkout is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from histoflare.shipped import JOBS, PROVISIONING, job_names
from tests.flare.bags_on_disk import write_site

pytestmark = pytest.mark.slow

KINDS = (".toml", ".json", ".yml", ".md", ".typed", ".html", ".css", ".safetensors")


def call(*command: object, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A wheel of the source distribution of what git has, and what a build left lying about."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    files = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=repository)
    with tarfile.open(folder / "source.tar", "w") as packed:
        for name in filter(None, files.split("\0")):
            if (repository / name).is_file():
                packed.add(repository / name, name)
    with tarfile.open(folder / "source.tar") as packed:
        packed.extractall(source, filter="data")
    secret = source / "provisioning" / "kits" / "state" / "cert.json"
    secret.parent.mkdir(parents=True)
    secret.write_text("{}")
    stale = source / "build" / "lib" / "histoflare" / "_shipped" / "jobs" / "gone" / "meta.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    call(sys.executable, "-c", build, cwd=source)
    (packed_source,) = folder.glob("histoflare-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", packed_source, cwd=folder)
    (made,) = folder.glob("histoflare-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The program of an environment with the wheel, and this one's libraries but not its histoflare."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=folder)
    libraries = {sysconfig.get_path("purelib"), *(path for path in sys.path if "site-packages" in path)}
    (site / "libraries.pth").write_text("\n".join(sorted(libraries)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = folder / "venv" / "bin" / "histoflare"
    program.write_text(f"#!{folder}/venv/bin/python\nfrom histoflare.cli import main\nmain()\n")
    program.chmod(0o755)
    return program, environment


def test_it_has_every_file_beside_the_code_once(wheel: Path, repository: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert not [name for name in names if name.count("/") == 0 or "tests" in name or "/kits/" in name]
    package = repository / "custom"
    beside = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.suffix in KINDS}
    beside = {name for name in beside if not name.endswith("README.md") and ".egg-info" not in name}
    for folder in (JOBS, PROVISIONING):
        beside |= {
            f"histoflare/_shipped/{path.relative_to(repository).as_posix()}"
            for path in folder.rglob("*")
            if path.is_file() and "kits" not in path.parts
        }
    assert "histoflare/py.typed" in beside and "histoflare/report/templates/style.css" in beside
    assert {name for name in names if not name.endswith(".py")} == beside


def test_an_empty_folder_is_enough(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    program, environment = installed
    empty = tmp_path / "empty"
    empty.mkdir()

    def histoflare(*words: object) -> str:
        return call(program, *words, cwd=empty, environment=environment)

    where = "import histoflare; print(histoflare.__file__)"
    lies = call(program.parent / "python", "-c", where, cwd=empty, environment=environment)
    assert Path(lies.strip()).is_relative_to(program.parents[1]), "not the checkout's"
    assert "Federated learning" in histoflare("--help")
    for name in job_names():
        assert json.loads(histoflare("job", "show", name, "--json"))["job"] == name
    histoflare("kit", "project", "--out", "consortium")
    for name in ("project.yml", "policies/dp-patient.toml"):
        assert (empty / "consortium" / name).read_bytes() == (PROVISIONING / name).read_bytes()
    tomllib.loads((empty / "consortium" / "policies" / "open.toml").read_text())
    for name in ("clinic-a", "clinic-b", "external"):
        write_site(empty / "sites", name)
    histoflare("run", "--job", "mem_fedavg", "--sites", "sites", "--out", "run", "--set", "rounds=1")
    assert json.loads((empty / "run" / "seed-1" / "report.json").read_text())["rounds"] == 1
    assert "<style>" in (empty / "run" / "seed-1" / "report.html").read_text()
