"""The folders that FLARE makes for jobs in a kit: named by the job's id, in the kit's root."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

APPLICATION = "app_"
"""Prefix of the folder, in a job's, that holds what the job brought."""


def is_job_id(job_id: object) -> bool:
    """Return whether FLARE could have given this id to a job: a UUID, spelt in the only way."""
    try:
        return str(uuid.UUID(str(job_id))) == job_id
    except ValueError:
        return False


def remove_applications(kit: Path) -> None:
    """Remove what earlier jobs brought into a kit; what was written while they ran, logs above all, stays."""
    for run in kit.iterdir():
        if is_job_id(run.name) and not run.is_symlink() and run.is_dir():
            for application in run.glob(f"{APPLICATION}*"):
                remove(application)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
