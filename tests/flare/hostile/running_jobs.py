"""Jobs that are taken and run, and what a changed server makes of them meanwhile."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from histoflare.errors import HistoflareError
from histoflare.flare.job_variant import write_variant

from .attack import SITES, Attack
from .objects import objects
from .raw_messages import RAW, to_a_job

OTHER_TASKS = {SITES[0]: ("evaluate", "REFUSED_TASK_UNEXPECTED"), SITES[1]: ("nonsense", "TASK_UNKNOWN")}
"""Site → a task that a training job has not, and what the site answers; TASK_UNKNOWN is FLARE's own word,
and who says it ends the job."""

IN_TASKS = ("a planted class", "a planted decomposer of FLARE's list", "a program", "a file", "many values")
"""What the first tasks of a job have in their cookies, which go back with the answer. (All other objects are
in messages to the same process, see ``to_a_job``, and in ``test_closed_messages``.)"""


def run_with_references(made: Attack, job: Path) -> None:
    """Run a job whose text looks like references: to the folder of an earlier job among others."""
    earlier = f"{made.job_ids['before']}/app"
    made.references = f"{{$PLANTED}} ${{PLANTED}} {{WORKSPACE}} {{SITE_NAME}} include {earlier}"
    changes = {"purpose": made.references, "least_sites": 1, "round_seconds": 60}
    made.run("references", write_variant(job, made.folder / "references" / "job", changes))


def replace_tasks(made: Attack, job: Path) -> None:
    """Run a job whose tasks the server's process calls otherwise, with objects in the first of them, and send
    the processes that run it whatever comes to mind."""
    each = objects(Path("local/records/notes.txt"), Path())  # seen from a kit: full paths are secrets
    _write(made, "in-task.pickle", pickle.dumps([each[name] for name in IN_TASKS]))
    first, last = SITES
    tasks = {first: OTHER_TASKS[first][0]}
    _write(made, "tasks.json", json.dumps(tasks).encode())
    job_id = made.federation.admin.submit(job)
    _wait(lambda: first in made.codes(tasks[first]))
    made.commands |= made.order(_commands(job_id), 0.5)
    made.send_objects(to_a_job(made, job_id))
    tasks[last] = OTHER_TASKS[last][0]
    _write(made, "tasks.json", json.dumps(tasks).encode())
    _wait(lambda: last in made.codes(tasks[last]))
    with suppress(HistoflareError):
        made.federation.admin.abort(job_id)
    for name in ("in-task.pickle", "tasks.json"):
        (made.folder / "orders" / name).unlink()


def _write(made: Attack, name: str, content: bytes) -> None:
    part = made.folder / "orders" / f"{name}.part"
    part.write_bytes(content)
    part.rename(part.with_suffix(""))


def _wait(until: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something, which the tests ask for afterwards."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.2)


def _commands(job_id: str) -> dict[str, tuple[object, ...]]:
    """Return name → a message for a job's processes that no job needs."""
    return {
        f"a job of {site}: {channel}/{topic}": ("cell", f"{site}.{job_id}", channel, topic, {"x": "PLANTED"})
        for site in SITES
        for channel, topic in (*RAW, ("task", "evaluate"), ("client_command", "check_status"))
    }
