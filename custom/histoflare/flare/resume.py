"""A new job from where another one stopped: its last global model and the round after it.

FLARE has no resume of its own: when its server dies, the job is lost. What it had reached is on the server's
disk, every round. The new job carries that model and the name of the old run, under which the sites have kept
what is theirs (personal layers, spent budget).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CONFIG_FOLDER, EARLIER_ROUNDS_FILE, META_FILE, read_files
from histoflare.flare.job_variant import write_variant
from histoflare.flare.persistor import first_state, read_state
from histoflare.flare.record import ROUNDS_FILE
from histoflare.model_file import GLOBAL_MODEL_FILE, invalid, read_model_header
from histoflare.site.kinds import kind_of
from histoflare.site.run_name import is_run_name
from histoflare.storage import write_json

META_FIELDS = ("name", "min_clients", "scope", "resource_spec", "deploy_map")


@dataclass(frozen=True)
class StoppedRun:
    """A run as it was left.

    Attributes:
        model: Its last global model.
        configuration: Folder of the job's configuration. meta: The job's ``meta.json``.
        sites: Whom the job was for; None is every site (nobody knows who they were).
        rows: Of the rounds that the model has behind it. run: Name of the run.
        next_round: The first one it has not finished.
    """

    model: Path
    configuration: Path
    meta: dict[str, Any]
    sites: tuple[str, ...] | None
    rows: list[dict[str, Any]]
    run: str
    next_round: int


def read_run(folder: Path) -> StoppedRun:
    """Find what a run has left, in a server's run folder or in what ``job download`` brought.

    Raises:
        JobError: There is no global model, no job or no readable round in it, or it holds links.
    """
    places = [folder, folder / "workspace"]
    workspace = next((place for place in places if (place / GLOBAL_MODEL_FILE).is_file()), None)
    if workspace is None:
        raise JobError(
            f"{folder}: no {GLOBAL_MODEL_FILE} there. Give the server's folder of the job (named by its "
            "id, in the server's startup kit), or the folder that a download made. A job that finished no "
            "round is submitted again as it was.",
            reason="MODEL_FILE_MISSING",
        )
    configuration, meta_file = find_configuration(folder, workspace)
    model = workspace / GLOBAL_MODEL_FILE
    for path in (configuration, meta_file, model, workspace / ROUNDS_FILE):
        refuse_links(folder, path)
    header = read_model_header(model)
    if header.round is None or header.run is None or not is_run_name(header.run):
        raise invalid(model, "its header does not say which round of which run it is of")
    try:
        meta = json.loads(meta_file.read_text())
        deployed = {site for app in meta["deploy_map"].values() for site in app} - {"server"}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise JobError(f"{meta_file}: not what FLARE keeps of a job; is it damaged?") from None
    rows = _read_rows(workspace / ROUNDS_FILE)
    if deployed == {"@ALL"}:  # by name, so that only the server gets what is the server's
        deployed = {site for row in rows for site in row.get("sites", [])}
    return StoppedRun(
        model=model,
        configuration=configuration,
        meta=meta,
        sites=tuple(sorted(deployed)) or None,
        rows=[row for row in rows if row["round"] <= header.round],
        run=header.run,
        next_round=header.round + 1,
    )


def write_resumed(run: StoppedRun, target: Path) -> Path:
    """Write the job that goes on after ``run`` to ``target``; return ``target``.

    Raises:
        JobError: The run has finished all its rounds, its model cannot be used, or its job has a name that is
            none or holds links.
    """
    with tempfile.TemporaryDirectory(prefix="histoflare-") as scratch:
        job = Path(scratch) / job_name(run.meta)
        (job / CONFIG_FOLDER).mkdir(parents=True)
        for name, content in read_files(run.configuration).items():  # these four, and nothing beside them
            (job / CONFIG_FOLDER / name).write_bytes(content)
        write_json(job / META_FILE, {name: run.meta[name] for name in META_FIELDS if name in run.meta})
        read = read_job(job)
        if run.next_round >= read.rounds:
            evaluation = kind_of(read.task.data).evaluation_job
            raise JobError(
                f"The run has finished its {read.rounds} rounds: there is nothing to go on with. To ask "
                f"sites about its model: histoflare job make {evaluation} --model RESULT --sites … --out NEW."
            )
        read_state(run.model, like=first_state(read.strategy, read.task))
        changes = {"run": run.run, "start_round": run.next_round}
        earlier = {EARLIER_ROUNDS_FILE: json.dumps(run.rows).encode()}
        return write_variant(job, target, changes, sites=run.sites, start_model=run.model, for_server=earlier)


def job_name(meta: Mapping[str, Any]) -> str:
    """Return a job's name, which becomes a folder's; ``"job"`` where ``meta.json`` has none.

    Raises:
        JobError: It is not 1 to 64 letters, digits, '-', '_', '.', the first one not a '.' (JOB_INVALID).
    """
    name = meta.get("name", "job")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", name):
        raise JobError(
            f"{META_FILE}: a job's name is 1 to 64 of A-Z, a-z, 0-9, '_', '-' and '.', not first a '.', and "
            f"not {name!r}. Was it changed on the way?",
            reason="JOB_INVALID",
        )
    return name


def refuse_links(folder: Path, path: Path) -> None:
    """Refuse ``path`` if anything from ``folder`` down to it leads elsewhere; one that is not there is fine.

    Raises:
        JobError: A part of it is a link or no plain file (JOB_INVALID).
    """
    for part in path.relative_to(folder).parts:
        folder /= part
        if folder.is_symlink() or (folder.exists() and not (folder.is_file() or folder.is_dir())):
            raise JobError(
                f"{folder}: a link, or no plain file. A run is gone on from with its own files: remove it, "
                "or download the job again.",
                reason="JOB_INVALID",
            )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the record of a run's rounds; without the file, none."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        whole = all(type(row["round"]) is int for row in rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise JobError(
            f"{path}: damaged. Restore it, or remove it to go on without the record of those rounds."
        )
    return rows


def find_configuration(folder: Path, workspace: Path) -> tuple[Path, Path]:
    """Return a run's configuration folder and its ``meta.json``.

    Args:
        folder: The server's folder of the job, or a download. workspace: In it, where the rounds lie.

    Raises:
        JobError: They are not there.
    """
    for configuration, meta in (
        (folder / "job" / CONFIG_FOLDER, folder / "job" / META_FILE),
        (workspace / "app_server" / "config", workspace / META_FILE),
    ):
        if configuration.is_dir() and meta.is_file():
            return configuration, meta
    raise JobError(f"{folder}: the run's job is not there (job/ or app_server/ with {META_FILE}).")
