"""What data the sites of a workstation have: their labels, and how their bags were made.

A job that does not fit can then be made to fit (``flare.job_choice``) instead of being refused by every site.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from histoflare.errors import HistoflareError, MaskError
from histoflare.site.configuration import SiteConfiguration, bags_of
from histoflare.site.data import IMAGES
from histoflare.slides.manifest import COLUMNS, NEEDED, read_manifest
from histoflare.slides.table import read_table


@dataclass(frozen=True)
class Patches:
    """How bags or images were made; None where they do not say.

    Attributes:
        encoder: Id of the encoder; None of images. features: Numbers a patch.
        patch_px: Side of a patch in pixels. mpp: Resolution in µm/px.
    """

    encoder: str | None = None
    features: int | None = None
    patch_px: int | None = None
    mpp: float | None = None


@dataclass(frozen=True)
class FoundData:
    """What the training sites have.

    Attributes:
        labels: Every label of their manifests, sorted; empty of images, whose masks have numbers.
        patches: How most of their bags, or all of their images, were made; None if nothing says so.
        slides: Site → label → its number of slides.
    """

    labels: tuple[str, ...] = ()
    patches: Patches | None = None
    slides: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False)


def find_data(sites: Mapping[str, SiteConfiguration], data: str) -> FoundData:
    """Return what the sites have. Files that cannot be used are left out: their site is refused later.

    Args:
        sites: The training sites. data: ``Task.data`` of the job.
    """
    if data == IMAGES:
        return FoundData(patches=_of_images(sites))
    slides = {name: _count_labels(bags_of(site)[0]) for name, site in sites.items()}
    labels = tuple(sorted(set().union(*slides.values())))
    found = [patches for site in sites.values() for patches in _of_bags(site, labels)]
    kinds = Counter(replace(patches, mpp=None) for patches in found)
    if not kinds:
        return FoundData(labels, slides=slides)
    most, _ = kinds.most_common(1)[0]
    mpps = [each.mpp for each in found if replace(each, mpp=None) == most and each.mpp is not None]
    patches = replace(most, mpp=statistics.median_low(mpps) if mpps else None)
    return FoundData(labels, patches, slides)


def find_labels(manifests: Iterable[Path]) -> tuple[str, ...]:
    """Return every label of the manifests, sorted. One with a single label is as good as any."""
    return tuple(sorted(set().union(*map(_count_labels, manifests))))


def _count_labels(manifest: Path) -> Counter[str]:
    """Return label → its number of slides; empty where the manifest cannot be read."""
    try:
        return Counter(
            cells["label"] for _, cells in read_table(manifest, NEEDED, COLUMNS) if cells["label"] != ""
        )
    except HistoflareError:
        return Counter()


def _of_bags(site: SiteConfiguration, labels: tuple[str, ...]) -> Iterator[Patches]:
    """Yield how each bag of a site was made."""
    from histoflare.bags.bag import read_header
    from histoflare.bags.folder import bag_path

    path, bags = bags_of(site)
    try:
        manifest = read_manifest(path, labels=labels, check_files=False)
    except HistoflareError:
        return
    for row in manifest.rows:
        try:
            header = read_header(bag_path(bags, manifest.row_id(row)))
        except HistoflareError:
            continue
        yield Patches(header.encoder, header.features, header.patch_px, header.patch_mpp)


def _of_images(sites: Mapping[str, SiteConfiguration]) -> Patches | None:
    """Return the resolution of the images, if each states one and they agree."""
    from histoflare.masks.resolution import agreed_mpp, read_stated_mpps

    manifests = {name: site.images for name, site in sites.items() if site.images is not None}
    try:
        mpp = agreed_mpp(read_stated_mpps(manifests))
    except MaskError:  # a setting may name one; without, ``check_resolutions`` refuses them
        return None
    return None if mpp is None else Patches(mpp=mpp)
