"""The job that asks sites about a model of another job, as ``histoflare job make`` makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from histoflare.flare.job import Job
from histoflare.flare.job_variant import write_variant


def write_evaluation(
    evaluation: Path,
    folder: Path,
    job: Job,
    run: str | None = None,
    model: Path | None = None,
    sites: Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write the job that asks sites about a model of ``job``, under the protocol of that, into ``folder``.

    Args:
        evaluation: The job folder to start from.
        run: Name of the run, under which the sites keep what they do not share.
        model: Its last global model; None leaves that to be given later.
        sites: Who is asked; None asks all.
        more: Other changes of the job.
    """
    same = ("seed", "round_seconds", "answer_seconds")
    changes: dict[str, Any] = {name: getattr(job, name) for name in same} | {"run": run}
    changes |= {f"task.{name}": value for name, value in job.task.to_json().items() if name != "seed"}
    changes |= {f"protocol.{name}": value for name, value in job.protocol.items()}
    changes |= more or {}
    return write_variant(
        evaluation, folder / evaluation.name, changes, sites=sites, scope=job.scope, start_model=model
    )
