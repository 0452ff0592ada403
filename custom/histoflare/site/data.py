"""A site's data as a task wants them, whatever kind they are of, and where models run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from histoflare.errors import JobError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import KINDS, kind_of
from histoflare.site.kinds.kind import SiteData
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule


def load_site_data(
    site: str, task: Any, configuration: SiteConfiguration, split: SplitRule = DEFAULT_SPLIT
) -> SiteData:
    """Return a site's cohort as a job's task wants it (:meth:`histoflare.site.kinds.kind.DataKind.load`).

    Raises:
        HistoflareError: The data do not fit the manifest or the task, a patient has two roles
            (COHORT_INVALID), or the task names no resolution (RESOLUTION_NOT_NAMED).
    """
    kind = kind_of(task.data)
    check_splits(configuration, split)
    kind.check_resolution_named(task, configuration)
    return kind.load(site, task, configuration, split)


def read_roles(
    configuration: SiteConfiguration,
    labels: Sequence[str] | None,
    data: str,
    split: SplitRule = DEFAULT_SPLIT,
) -> dict[str, str]:
    """Return patient → train, validation or test, as the site's manifest says, or else the job's rule.

    At a site that only evaluates all patients are for testing.

    Raises:
        ManifestError: The manifest cannot be used.
        JobError: The site has no data of this kind (SITE_NOT_CONFIGURED), or a patient has two roles
            (COHORT_INVALID).
    """
    check_splits(configuration, split)
    rows = kind_of(data).read_splits(configuration, split, labels).rows
    only = configuration.evaluation_only
    return {row.patient: "test" if only else str(row.split) for row in rows}


def check_splits(configuration: SiteConfiguration, split: SplitRule = DEFAULT_SPLIT) -> None:
    """Refuse a site with data of several kinds whose manifests do not say one role for each patient.

    Raises:
        JobError: A patient has two roles (COHORT_INVALID).
        ManifestError: A manifest cannot be used.
    """
    there = [kind for kind in KINDS.values() if kind.is_named(configuration)]
    if len(there) < 2:
        return
    roles: dict[str, str | None] = {}
    for kind in there:
        manifest = kind.read_splits(configuration, split)
        for row in manifest.rows:
            if roles.setdefault(row.patient, row.split) != row.split:
                raise JobError(
                    f"{manifest.path}, line {row.line}: a patient has one role (train, validation, test) in "
                    f"the manifests of {' and of '.join(f'{each.item}s' for each in there)}. Give all "
                    "of them the same split column, or none.",
                    reason="COHORT_INVALID",
                )


def device_of(configuration: SiteConfiguration) -> str:
    """Return where models run at a site, whatever they are trained on; errors as below."""
    return check_device(configuration.device)


def check_device(device: str) -> str:
    """Return ``device`` (``cpu``, ``cuda``, ``cuda:1`` …).

    Raises:
        JobError: There is no such device here, or it cannot train (SITE_NOT_CONFIGURED).
    """
    if device == "cpu":
        return device
    import torch

    kind, _, index = device.partition(":")
    if kind == "mps":
        raise JobError(
            'device "mps" has no float64, in which gradients are summed under a privacy plan: use "cpu".',
            reason="SITE_NOT_CONFIGURED",
        )
    module: Any = torch.get_device_module(kind)
    there = module.device_count()
    if int(index or 0) >= there:
        raise JobError(
            f'device "{device}": torch sees {there} devices of this kind here. Use "cpu", or install a torch '
            "that sees it.",
            reason="SITE_NOT_CONFIGURED",
        )
    return device
