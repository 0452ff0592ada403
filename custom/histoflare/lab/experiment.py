"""What an experiment on one workstation is: a job, its sites, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from histoflare.flare.job import Job
    from histoflare.site.configuration import SiteConfiguration


class Runtime(StrEnum):
    """Where a job's server and sites run."""

    POC = "poc"
    SIMULATOR = "simulator"
    INPROCESS = "inprocess"


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Attributes:
        job: The job.
        sites: Training sites and where each keeps its manifest and bags.
        external: External cohorts; they are asked as one.
        runtime: Where.
        device: Where models run in this process: the bounds, the comparison, the sites' training in process.
            A site in a process of its own has the device of its own configuration.
    """

    job: Job
    sites: Mapping[str, SiteConfiguration]
    external: Mapping[str, SiteConfiguration]
    runtime: Runtime = Runtime.INPROCESS
    device: str = "cpu"
