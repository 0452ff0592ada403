"""What data the sites of a workstation have: their labels, and how their bags were made.

A job that does not fit can then be made to fit (``flare.job_choice``) instead of being refused by every site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from histoflare.errors import HistoflareError
from histoflare.slides.manifest import COLUMNS, NEEDED
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


def find_labels(manifests: Iterable[Path]) -> tuple[str, ...]:
    """Return every label of the manifests, sorted. One with a single label is as good as any."""
    return tuple(sorted(set().union(*map(count_labels, manifests))))


def count_labels(manifest: Path) -> Counter[str]:
    """Return label → its number of slides; empty where the manifest cannot be read."""
    try:
        return Counter(
            cells["label"] for _, cells in read_table(manifest, NEEDED, COLUMNS) if cells["label"] != ""
        )
    except HistoflareError:
        return Counter()
