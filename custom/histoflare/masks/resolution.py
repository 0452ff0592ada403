"""The resolution on which images agree: a network that learns at one scale is used at that scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from histoflare.errors import HistoflareError, MaskError
from histoflare.masks.image_manifest import read_image_manifest
from histoflare.slides.resolution import SAME_MPP

MPP_PLACE = "mpp = … in protocol.toml, or --set protocol.mpp=…"
"""Where a job's resolution is stated."""


def is_same_mpp(mpp: float, wanted_mpp: float) -> bool:
    """Return whether two resolutions in µm/px are taken as equal."""
    return abs(mpp - wanted_mpp) <= SAME_MPP * wanted_mpp


def agreed_mpp(stated: Mapping[str, Iterable[float | None]], mpp_place: str = MPP_PLACE) -> float | None:
    """Return the resolution in µm/px of the images that state one; None if none of them does.

    It is the one that most images state, within 1 % of which all others are.

    Args:
        stated: Site (or another name for messages) → what its images state, None where one states nothing.
        mpp_place: Where the person can state the resolution, for the error.

    Raises:
        MaskError: Two images state different resolutions (COHORT_INVALID).
    """
    of_site = {site: Counter(mpps) for site, mpps in stated.items()}
    counts = sum(of_site.values(), Counter[float | None]())
    known = sorted(mpp for mpp in counts if mpp is not None)
    if not known:
        return None
    most = max(known, key=lambda mpp: counts[mpp])
    if not all(is_same_mpp(mpp, most) for mpp in known):
        listed = {
            site: ", ".join(f"{mpp:g}" for mpp in known if mpp in found) for site, found in of_site.items()
        }
        said = "; ".join(f"{site}: {mpps}" for site, mpps in listed.items() if mpps)
        raise MaskError(
            f"the images are of several resolutions (µm/px; {said}), and none is asked for: a network would "
            f"take them for one scale. Name one ({mpp_place}), and "
            "import the other images at that, or leave them out.",
            reason="COHORT_INVALID",
        )
    return most


def read_stated_mpps(manifests: Mapping[str, Path]) -> dict[str, list[float | None]]:
    """Return site → the resolutions that the images of its manifest state, for :func:`agreed_mpp`.

    No image is opened. A manifest that cannot be read is left out: whoever loads its images says why.
    """
    stated = {}
    for site, path in manifests.items():
        try:
            rows = read_image_manifest(path, check_files=False).rows
        except HistoflareError:
            continue
        stated[site] = [row.mpp for row in rows]
    return stated
