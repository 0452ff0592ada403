"""A site's data as a task wants them: bags of features, or images with masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from histoflare.errors import JobError
from histoflare.site.configuration import SiteConfiguration, bags_of, images_of
from histoflare.slides.manifest import assign_splits, read_manifest
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

if TYPE_CHECKING:
    from histoflare.bags.cohort import Cohort
    from histoflare.bags.task import BagTask
    from histoflare.rounds.task import Task

IMAGES = "images"
"""``Task.data`` of a task on images with masks; every other is on bags."""


class SiteRecord(Protocol):
    """What a round's books ask of one slide or image."""

    @property
    def slide_id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> str: ...


class SiteData(Protocol):
    """A cohort of bags or of images; the task knows more of it."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> Sequence[SiteRecord]: ...
    @property
    def train(self) -> Sequence[SiteRecord]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    def read_ahead(self) -> None:
        """Read what a round would otherwise read, and fail over, in its own time."""


def load_site_data(
    site: str, task: Any, configuration: SiteConfiguration, split: SplitRule = DEFAULT_SPLIT
) -> SiteData:
    """Return a site's cohort as the task wants it, with the memory its configuration gives.

    Args:
        split: The job's rule, for a manifest without a split column.

    Raises:
        ManifestError: The manifest cannot be used.
        BagError, MaskError: Bags or images do not fit the manifest or the task (COHORT_INVALID,
            RESOLUTION_NOT_NAMED).
        JobError: The site has no data of this kind (SITE_NOT_CONFIGURED).
    """
    check_splits(configuration, split)
    if task.data != IMAGES:
        return load_site_cohort(site, task, configuration, split)
    check_resolution_named(task, configuration)
    from histoflare.masks.images import load_image_cohort

    return load_image_cohort(
        site,
        images_of(configuration),
        task.labels,
        mpp=task.mpp,
        window_px=task.window_px,
        split=split,
        cache_bytes=configuration.cache_mb << 20,
    )


def load_site_cohort(
    site: str,
    task: BagTask,
    configuration: SiteConfiguration,
    split: SplitRule = DEFAULT_SPLIT,
    *,
    refuse_changed_slides: bool = True,
) -> Cohort:
    """Return a site's bags, with the arguments of ``bags.cohort.load_cohort``; errors as above."""
    from histoflare.bags.cohort import load_cohort

    manifest, bags = bags_of(configuration)
    return load_cohort(
        site,
        # Training reads no slides: their files need not be there.
        read_manifest(manifest, labels=task.manifest_labels, check_files=False),
        bags,
        target=task.target,
        encoder=task.encoder,
        mpp=task.mpp,
        patch_px=task.patch_px,
        features=task.features,
        split=split,
        refuse_changed_slides=refuse_changed_slides,
        cache_bytes=configuration.cache_mb << 20,
    )


def pool_site_data(task: Task, cohorts: Sequence[Any], name: str = "pooled") -> SiteData:
    """Return the data of several sites as one: what no federation may do, for the upper bound."""
    if task.data == IMAGES:
        from histoflare.masks.images import pooled_images

        return pooled_images(cohorts, name)
    from histoflare.bags.cohort import pooled

    return pooled(cohorts, name)


def check_resolutions(task: Any, sites: Mapping[str, SiteConfiguration]) -> None:
    """Refuse images of several resolutions, at one site or at several, where the task names none.

    It reads what the manifests say, and opens no image.

    Raises:
        MaskError: They are not of one resolution (COHORT_INVALID).
    """
    if task.data != IMAGES or task.mpp is not None:
        return
    from histoflare.masks.resolution import agreed_mpp, read_stated_mpps

    manifests = {site: where.images for site, where in sites.items() if where.images is not None}
    agreed_mpp(read_stated_mpps(manifests))


def check_resolution_named(task: Any, configuration: SiteConfiguration) -> None:
    """Refuse a task that names no resolution where the site's images state theirs.

    Each site sees its own images alone: without a resolution in the protocol nobody compares it with those of
    the others, and one network would be trained at several scales. Images that state none are not compared
    either way. It reads what the manifest says, and opens no image.

    Raises:
        JobError: An image states its resolution, and the task names none (RESOLUTION_NOT_NAMED).
    """
    if task.data != IMAGES or task.mpp is not None or configuration.images is None:
        return
    from histoflare.masks.resolution import MPP_PLACE, read_stated_mpps

    (stated,) = read_stated_mpps({"": configuration.images}).values() or ([],)
    known = sorted({mpp for mpp in stated if mpp is not None})
    if known:
        raise JobError(
            f"The images of {configuration.images} state their resolution (µm/px: "
            f"{', '.join(f'{mpp:g}' for mpp in known[:5])}), and the job's protocol names none: nobody "
            f"compares it with the other sites'. The lead has to name the one that all have ({MPP_PLACE}).",
            reason="RESOLUTION_NOT_NAMED",
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


def prepare_site_data(
    site: str, task: Any, configuration: SiteConfiguration, say: Callable[[str], None]
) -> None:
    """Make bags that are missing, where the site's file asks for it."""
    if configuration.prepare and task.data != IMAGES:
        # Its imports alone take a second and more: only where they are needed.
        from histoflare.site.preparation import prepare_site

        prepare_site(site, task, configuration, say)


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
        JobError: The site has no data of this kind (SITE_NOT_CONFIGURED).
    """
    check_splits(configuration, split)
    rows: Sequence[Any]
    if data == IMAGES:
        from histoflare.masks.image_manifest import assign_image_splits, read_image_manifest

        rows = assign_image_splits(
            read_image_manifest(images_of(configuration), check_files=False), split
        ).rows
    else:
        manifest, _ = bags_of(configuration)
        rows = assign_splits(read_manifest(manifest, labels=labels, check_files=False), split).rows
    only = configuration.evaluation_only
    return {row.patient: "test" if only else str(row.split) for row in rows}


def slides_of_a_patient(configuration: SiteConfiguration, labels: Sequence[str] | None, data: str) -> int:
    """Return the largest number of slides that a patient has at a site; 1 of images. Errors as above."""
    if data == IMAGES:
        return 1
    manifest, _ = bags_of(configuration)
    rows = read_manifest(manifest, labels=labels, check_files=False).rows
    return max(Counter(row.patient for row in rows).values(), default=1)


def check_splits(configuration: SiteConfiguration, split: SplitRule = DEFAULT_SPLIT) -> None:
    """Refuse a site with bags and images whose two manifests do not say one role for each patient.

    Raises:
        JobError: A patient has two roles (COHORT_INVALID).
        ManifestError: A manifest cannot be used.
    """
    if configuration.manifest is None or configuration.images is None:
        return
    from histoflare.masks.image_manifest import assign_image_splits, read_image_manifest

    roles: dict[str, str | None] = {}
    both: tuple[Any, ...] = (
        assign_splits(read_manifest(configuration.manifest, check_files=False), split),
        assign_image_splits(read_image_manifest(configuration.images, check_files=False), split),
    )
    for manifest in both:
        for row in manifest.rows:
            if roles.setdefault(row.patient, row.split) != row.split:
                raise JobError(
                    f"{manifest.path}, line {row.line}: a patient has one role (train, validation, test) in "
                    "the manifests of slides and of images. Give both the same split column, or neither one.",
                    reason="COHORT_INVALID",
                )
