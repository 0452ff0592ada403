"""What a lead submits: hostile archives, and jobs one after the other that build on each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.hci.client import file_transfer

from histoflare.flare.job_files import CLIENT_FILE, CONFIG_FOLDER, CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE

from .archives import Pack, hostile
from .attack import SITES, Attack

EACH = 40
"""Of the archives, every 40th is submitted: each takes a connection. All of them are deployed, and
``test_hostile_bytes`` gives all of them to the server's check."""

DRIVER = json.dumps({"comm_driver_path": "."}).encode()
SECTION = json.dumps({"decomposer_module": "evil", "components": [{"id": "x", "path": "evil.Kind"}]}).encode()


def submit_archives(made: Attack, job: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload archives in place of a job folder's."""
    meta = (job / "meta.json").read_bytes()
    in_folder = Pack("job/app/", {"job/": b"", "job/meta.json": meta, "job/app/": b""})
    copy = shutil.copytree(job, made.folder / "submitted" / "job")
    for name, archive in list(hostile(good, made.around, in_folder).items())[::EACH]:

        def write(root: str, folder: str, target: str, content: bytes = archive) -> None:
            Path(target).write_bytes(content)

        with monkeypatch.context() as patched:
            patched.setattr(file_transfer, "zip_directory_to_file", write)
            made.submitted[name] = submit(made, copy)


def submit(made: Attack, job: Path) -> str:
    """Submit a job folder over the lead's connection; return what the server says against it."""
    session = made.federation.admin._session
    assert session is not None
    with redirect_stdout(StringIO()):
        try:
            return f"taken as {session.submit_job(str(job))}"
        except Exception as error:
            return str(error)


def with_code_in_comments(made: Attack, job: Path) -> Path:
    """Write into a job whatever it may have: it runs, and leaves code and references in every site's kit."""
    code = made.around.code().decode()
    said = f"{code}include file(local/records/notes.txt)\na: ${{oc.env:PLANTED}}\n"
    for name in (JOB_FILE, PROTOCOL_FILE):
        path = job / CONFIG_FOLDER / name
        path.write_text("".join(f"# {line}\n" for line in said.splitlines()) + path.read_text())
    return job


def note_what_the_first_left(made: Attack) -> None:
    """Keep what lies in each site's kit of the job that ran before."""
    for site in SITES:
        left = made.federation.kits.kit(site) / made.job_ids["before"]
        made.left_by_first[site] = "".join(path.read_text() for path in left.rglob(JOB_FILE))


def first_jobs(made: Attack) -> dict[str, Mapping[str, bytes]]:
    """Return name → what a first job brings, for a second one to use."""
    config, code = f"{CONFIG_FOLDER}/", made.around.code()
    return {
        "a driver": {f"{config}comm_config.json": DRIVER, f"{config}evil.py": code},
        "a section": {f"{config}resources.json": SECTION, f"{config}evil.py": code},
        "a module": {f"{config}evil.py": code},
        "custom code": {"app/custom/evil.py": code, "app/custom/__init__.py": code},
        "a driver for the server": {
            "app_server/config/comm_config.json": DRIVER,
            "app_server/config/evil.py": code,
        },
        "a driver beside its meta": {"comm_config.json": DRIVER, "evil.py": code},
    }


def second_jobs(job_id: str) -> dict[str, Callable[[Path], None]]:
    """Return name → what makes of an honest job one that uses what an earlier one left.

    Args:
        job_id: Of the earlier one: FLARE calls its folder in a kit so.
    """
    folders = [f"{job_id}/app_{site}/config" for site in SITES]

    def before(name: str, line: str) -> Callable[[Path], None]:
        def change(job: Path) -> None:
            path = job / CONFIG_FOLDER / name
            path.write_text(f"{line}\n{path.read_text()}")

        return change

    def file(name: str, content: dict[str, Any]) -> Callable[[Path], None]:
        return lambda job: (job / CONFIG_FOLDER / name).write_text(json.dumps(content)) and None

    def component(path: str) -> Callable[[Path], None]:
        part = {"id": "x", "path": path, "args": {}}
        return file(CLIENT_FILE, CONFIGURATIONS[CLIENT_FILE] | {"components": [part]})

    return {
        "includes its file": before(CLIENT_FILE, f'include file("{folders[0]}/{JOB_FILE}")'),
        "includes its file in TOML": before(JOB_FILE, f'include file("../../{folders[1]}/{JOB_FILE}")'),
        "goes on in its folder": before(JOB_FILE, f'run = "../{job_id}"'),
        "names its folder for drivers": file("comm_config.json", {"comm_driver_path": folders[0]}),
        "names its module in a section": file("resources.json", {"decomposer_module": "evil"}),
        "names its class": component("evil.Kind"),
        "names its class by its folder": component(f"{folders[1].replace('/', '.')}.evil.Kind"),
    }


def submit_one_after_the_other(made: Attack, job: Path) -> None:
    """Submit first jobs that bring files, each with a second one behind it that would use them; and second
    ones that would use what a job left that ran."""
    folder = made.folder / "one after the other"
    seconds = second_jobs(made.job_ids["before"])
    for number, (name, files) in enumerate(first_jobs(made).items()):
        first = shutil.copytree(job, folder / f"first{number}")
        for path, content in files.items():
            (first / path).parent.mkdir(parents=True, exist_ok=True)
            (first / path).write_bytes(content)
        made.first_jobs[name] = submit(made, first)
        made.second_jobs[f"behind {name}"] = _submit_second(made, job, folder, seconds["names its class"])
    for name, change in seconds.items():
        made.second_jobs[name] = _submit_second(made, job, folder, change)


def _submit_second(made: Attack, job: Path, folder: Path, change: Callable[[Path], None]) -> str:
    second = shutil.copytree(job, folder / f"second{len(made.second_jobs)}")
    change(second)
    return submit(made, second)
