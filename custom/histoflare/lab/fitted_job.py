"""The job that fits the sites of a workstation, written to a folder of the command's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_choice import Choice, choose_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.workstation import evaluated_by, for_fewer_sites
from histoflare.lab.watch import Watch
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import kind_of
from histoflare.site.overlap import check_apart

JOBS_FOLDER = "job"
"""In an output folder or a workspace: the jobs that a command has written."""

OnChoice = Callable[[Choice], None]
"""Called with a chosen job, to say what of it was taken from the data."""


def refuse_written(job: Path, jobs: Path) -> None:
    """Raise :class:`JobError` if a job lies in ``jobs``, whose content the command replaces."""
    if job.resolve().is_relative_to(jobs.resolve()):
        raise JobError(f"{job}: this command writes its jobs to {jobs}; copy yours to another folder first.")


def write_chosen(choice: Choice, jobs: Path) -> Job:
    """Write a chosen job to ``jobs`` in place of an earlier one of its name; return it as read from there."""
    target = jobs / choice.job.folder.resolve().name
    shutil.rmtree(target, ignore_errors=True)
    return read_job(write_variant(choice.job.folder, target, choice.changes, scope=choice.scope))


def write_fitted(
    job: Path,
    preset: str | None,
    sites: Mapping[str, SiteConfiguration],
    data: str,
    jobs: Path,
    watch: Watch,
    on_choice: OnChoice,
) -> Path:
    """Write the job that fits the sites to ``jobs``, which is emptied first.

    Args:
        job: The job folder to start from.
        preset: Name of one of its presets.
        sites: Training sites and those that only evaluate.
        data: The kind of data that the job trains on.
        jobs: The folder for the job.
        watch: Is told of sites that will refuse the job, and of patients at two sites.
        on_choice: Is told what was taken from the data.

    Returns:
        The folder of the job that fits: ``job`` itself where nothing of it had to be changed.

    Raises:
        HistoflareError: The data of no training site can be used, or two sites have a slide in common or, in
            a protected job, a patient.
        JobError: ``job`` lies in ``jobs``, or it cannot be fitted.
    """
    kind = kind_of(data)
    training = {name: site for name, site in sites.items() if not site.evaluation_only}
    choice = choose_job(job, preset, found=kind.find(training))
    on_choice(choice)
    kind.check_resolutions(choice.job.task, training)
    faulty = _find_faulty(sites, data)
    usable = {name: site for name, site in sites.items() if name not in faulty}
    external = [name for name, site in usable.items() if site.evaluation_only]
    if len(external) == len(usable):
        raise next(error for name, error in faulty.items() if name in training)
    for name, error in faulty.items():
        watch.warn(f"{name} will refuse the job ({error.reason}): {error}")
    for warning in check_apart(usable, data, protected=choice.job.plan.protects):
        watch.warn(warning)
    refuse_written(job, jobs)
    shutil.rmtree(jobs, ignore_errors=True)
    changes = choice.changes | for_fewer_sites(choice.job, len(usable) - len(external))
    if choice.job.evaluate and external and not choice.job.evaluation_only:
        changes |= evaluated_by(external)
    if not changes and choice.scope is None:
        return job
    return write_variant(job, jobs / job.resolve().name, changes, scope=choice.scope)


def _find_faulty(sites: Mapping[str, SiteConfiguration], data: str) -> dict[str, HistoflareError]:
    """Return the sites whose manifest cannot be read, with the reason."""
    found = {}
    for name, site in sites.items():
        try:
            check_apart({name: site}, data, protected=False)
        except HistoflareError as error:
            found[name] = error
    return found
