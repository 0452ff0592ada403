"""The data of an experiment's sites, and who is left out because theirs do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job import Job
from histoflare.lab.experiment import Experiment
from histoflare.lab.left_out import no_site
from histoflare.lab.sites import EXTERNAL
from histoflare.lab.watch import Watch
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.kinds import kind_of
from histoflare.site.overlap import check_apart


@dataclass(frozen=True)
class Loaded:
    """The data of an experiment.

    Attributes:
        taking_part: The experiment with the sites and external cohorts whose data fit.
        cohorts, outside: Their data.
        refused, untested: Why those of the others do not fit.
    """

    taking_part: Experiment
    cohorts: dict[str, Any]
    outside: dict[str, Any]
    refused: dict[str, HistoflareError]
    untested: dict[str, HistoflareError]


def load_experiment(experiment: Experiment, watch: Watch) -> Loaded:
    """Return the data of an experiment's sites; one whose data do not fit is left out, with its reason.

    Raises:
        HistoflareError: The data of no site fit the job, or two sites share a slide or, in a protected job, a
            patient.
    """
    job = experiment.job
    with watch.phase(f"load {job.task.data}"):
        cohorts, refused = _load(experiment.sites, job, trains=True)
        outside, untested = _load(experiment.external, job, trains=False)
        if not cohorts:
            raise no_site(refused)
        taking_part = replace(
            experiment,
            sites={site: experiment.sites[site] for site in cohorts},
            external={name: experiment.external[name] for name in outside},
        )
        kind_of(job.task.data).check_resolutions(job.task, taking_part.sites)
        everyone = {**taking_part.sites, **taking_part.external}
        for warning in check_apart(everyone, job.task.data, protected=job.plan.protects):
            watch.warn(warning)
        for site, cohort in cohorts.items():
            for warning in cohort.warnings:
                watch.warn(f"{site}: {warning}")
        if len(cohorts) == 1:
            watch.warn(f"only {next(iter(cohorts))} takes part: the federated model is that site's own")
        for site, error in {**refused, **untested}.items():
            watch.warn(f"{site} is left out ({error.reason}): {error}")
    return Loaded(taking_part, cohorts, outside, refused, untested)


def _load(
    sites: Mapping[str, SiteConfiguration], job: Job, *, trains: bool
) -> tuple[dict[str, Any], dict[str, HistoflareError]]:
    """Return the data of the sites that fit a job, and why those of the others do not."""
    found: dict[str, Any] = {}
    refused: dict[str, HistoflareError] = {}
    for site, at in sites.items():
        try:
            data = load_site_data(site, job.task, at, job.split)
            if trains and not data.train:
                raise JobError(
                    f"{site}: no row of its manifest is for training (split). A cohort called '{EXTERNAL}' "
                    "is asked at the end and never trains.",
                    reason="SITE_HAS_NO_TRAINING_DATA",
                )
            found[site] = data
        except HistoflareError as error:
            refused[site] = error
    return found, refused
