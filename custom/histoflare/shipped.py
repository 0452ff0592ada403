"""What comes with the package beside its code: the jobs, and the consortium's project file with its policies.

A checkout has them once, in its folders ``jobs`` and ``provisioning``. A built package has a copy of both
inside itself (``setup.py``), so that a job is found by its name from any folder.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from histoflare.errors import JobError

_PACKAGE = Path(__file__).resolve().parent
_BUILT = _PACKAGE / "_shipped"
_ROOT = _BUILT if _BUILT.is_dir() else _PACKAGE.parents[1]

JOBS = _ROOT / "jobs"
"""One folder per job."""

PROVISIONING = _ROOT / "provisioning"
"""``project.yml``, its README, and in ``policies`` what it puts into kits."""


def job_names() -> list[str]:
    """Return the names of the jobs that come with the package."""
    return sorted(path.parent.name for path in JOBS.glob("*/meta.json"))


def find_job(job: Path) -> Path:
    """Return the folder of a job that a person has named.

    Args:
        job: A job's folder, or the name of a job that comes with the package. A folder of that name in the
            current one comes first if it is a job.

    Raises:
        JobError: There is no such folder, nor a job of that name.
    """
    names = job_names()
    if str(job) in names and not (job / "meta.json").exists():
        return JOBS / job
    if job.is_dir():
        return job
    near = difflib.get_close_matches(job.name, names, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise JobError(
        f"{job}: no such job folder, and no job of that name.{meant} Jobs that come with histoflare: "
        f"{', '.join(names)}."
    )
