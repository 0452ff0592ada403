"""The mosaic: a few patches that stand for a slide.

The method is Yottixel's (Kalra et al. 2020, "Yottixel – an image search engine for large archives of
histopathology whole slide images", Medical Image Analysis 65:101757) as used by Adnan et al. 2022
(Scientific Reports 12:1953), written from the papers: tissue by colour; non-overlapping patches of
1000 x 1000 px at 20x that hold enough of it; the patches' colour at 5x (the mean RGB; the papers say
histogram) clustered by k-means; from each cluster a share p.

Patents: parts of Yottixel are covered by US10628736B2 and US20200176102A1. Whoever uses this module for more
than research should look into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from histoflare.errors import SlideError
from histoflare.seeds import derive_seed
from histoflare.slides.colours import GridColours, read_mean_colours
from histoflare.slides.pixels import Block
from histoflare.slides.reader import Slide
from histoflare.slides.resolution import is_mpp
from histoflare.slides.tissue import Tissue, find_tissue

Selection = Literal["random", "spatial"]

MOSAIC_VERSION = 1
KMEANS_STARTS = 10
"""k-means is started this often and the best kept; the papers do not say."""


@dataclass(frozen=True)
class MosaicParameters:
    """What a mosaic depends on besides the slide. The defaults are the papers'.

    Attributes:
        mpp: Resolution of the patches in µm/px (20x = 0.5).
        patch_px: Side of a patch in pixels at ``mpp``.
        tissue_fraction: Smallest share of tissue a patch must hold, in [0, 1].
        clusters: Number of colour clusters k; fewer if there are fewer patches (or fewer colours).
        fraction: Share p of every cluster that is chosen, in (0, 1]; at least one patch of each.
        selection: Within a cluster, ``random`` (Adnan) or ``spatial`` (Yottixel: k-means on the locations,
            the patch nearest to each centre).
        cluster_mpp: Resolution at which colours are taken (5x = 2.0); ``mpp`` if that is coarser.
        max_patches: Largest number of chosen patches (a random subset beyond it), or None for no limit.
        seed: Everything random follows from it.

    Raises:
        SlideError: A value is out of its range (``MOSAIC_PARAMETERS``); all such values are listed.

    >>> from histoflare import MosaicParameters
    >>> parameters = MosaicParameters(patch_px=224, fraction=0.2)
    >>> parameters.mpp, parameters.clusters
    (0.5, 9)
    """

    mpp: float = 0.5
    patch_px: int = 1000
    tissue_fraction: float = 0.7
    clusters: int = 9
    fraction: float = 0.10
    selection: Selection = "random"
    cluster_mpp: float = 2.0
    max_patches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "mpp must be a resolution in µm/px, such as 0.5": is_mpp(self.mpp),
            "patch_px must be at least 16": self.patch_px >= 16,
            "tissue_fraction must lie between 0 and 1": 0 <= self.tissue_fraction <= 1,
            "clusters must be at least 1": self.clusters >= 1,
            "fraction must be more than 0 and at most 1": 0 < self.fraction <= 1,
            "selection must be 'random' or 'spatial'": self.selection in ("random", "spatial"),
            "cluster_mpp must be a resolution in µm/px, such as 2.0": is_mpp(self.cluster_mpp),
            "max_patches must be at least 1, or left out": self.max_patches is None or self.max_patches >= 1,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise SlideError(f"Mosaic parameters: {'; '.join(broken)}.", reason="MOSAIC_PARAMETERS")

    def to_json(self) -> dict[str, Any]:
        """Return the parameters as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the parameters that :meth:`to_json` wrote.

        Raises:
            SlideError: A name is unknown or a value out of its range (``MOSAIC_PARAMETERS``).
        """
        unknown = sorted(set(content) - {field.name for field in fields(cls)})
        if unknown:
            raise SlideError(f"Mosaic parameters: unknown {', '.join(unknown)}.", reason="MOSAIC_PARAMETERS")
        try:
            return cls(**content)
        except TypeError as error:
            raise SlideError(f"Mosaic parameters: {error}.", reason="MOSAIC_PARAMETERS") from error


@dataclass(frozen=True)
class Patch:
    """A square on the slide: upper left corner in level-0 pixels, colour cluster, share of tissue."""

    l0_x_px: int
    l0_y_px: int
    cluster: int
    tissue: float


@dataclass(frozen=True)
class Mosaic:
    """Every patch with enough tissue (``candidates``, row by row) and which of them were chosen (ascending).

    A patch's side is ``l0_patch_px`` on level 0 and ``parameters.patch_px`` when read at ``parameters.mpp``.
    """

    parameters: MosaicParameters
    l0_patch_px: int
    candidates: tuple[Patch, ...]
    chosen: tuple[int, ...]

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The chosen patches."""
        return tuple(self.candidates[index] for index in self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return the mosaic as JSON-ready values; :meth:`from_json` reads them back."""
        return {"version": MOSAIC_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the mosaic that :meth:`to_json` wrote.

        Raises:
            SlideError: Of another version, or not a mosaic (``MOSAIC_FILE``).
        """
        if content.get("version") != MOSAIC_VERSION:
            raise SlideError(
                f"Not a mosaic of version {MOSAIC_VERSION}; make it again with 'histoflare mosaic'.",
                reason="MOSAIC_FILE",
            )
        try:
            return cls(
                MosaicParameters.from_json(content["parameters"]),
                int(content["l0_patch_px"]),
                tuple(Patch(**patch) for patch in content["candidates"]),
                tuple(int(index) for index in content["chosen"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SlideError(f"Not a mosaic: {error}.", reason="MOSAIC_FILE") from error


def build_mosaic(slide: Slide, parameters: MosaicParameters, threads: int = 1) -> Mosaic:
    """Return the mosaic of ``slide``; the same slide and parameters give the same one, for any ``threads``.

    Raises:
        SlideError: As :func:`find_mosaic`.

    >>> from pathlib import Path
    >>> from histoflare import MosaicParameters, Slide, build_mosaic
    >>> with Slide(Path("slide.tif")) as slide:
    ...     mosaic = build_mosaic(slide, MosaicParameters(mpp=0.5, patch_px=64, clusters=3))
    >>> 3 <= len(mosaic.patches) < len(mosaic.candidates)
    True
    """
    return find_mosaic(slide, parameters, threads)[0]


def find_mosaic(slide: Slide, parameters: MosaicParameters, threads: int = 1) -> tuple[Mosaic, Tissue]:
    """Return what :func:`build_mosaic` returns, and the tissue that was found for it.

    Raises:
        SlideError: No tissue (``SLIDE_NO_TISSUE``), a dark background (``SLIDE_DARK_BACKGROUND``), a slide
            smaller than one patch (``SLIDE_TOO_SMALL``), no patch with enough tissue
            (``SLIDE_NO_PATCHES``), or what :meth:`Slide.read` raises.
    """
    l0_patch_px = l0_patch_side(slide, parameters)
    colour_mpp = max(parameters.cluster_mpp, parameters.mpp)
    grid = GridColours(slide, l0_patch_px, colour_mpp)  # while tissue is sought
    l0_xy, shares, tissue = _find_candidates(slide, parameters, l0_patch_px, threads, grid.add)
    if grid.complete:
        colours = grid.means(l0_xy)
    else:
        colours = read_mean_colours(slide, l0_patch_px, colour_mpp, l0_xy, threads)
    with threadpool_limits(1):  # sums in one order on every machine, and small problems are faster so
        clusters = _cluster_colours(colours, parameters)
        chosen = _choose(l0_xy, clusters, parameters)
    candidates = tuple(
        Patch(int(x), int(y), int(cluster), round(float(share), 4))
        for (x, y), cluster, share in zip(l0_xy, clusters, shares, strict=True)
    )
    return Mosaic(parameters, l0_patch_px, candidates, tuple(chosen)), tissue


def l0_patch_side(slide: Slide, parameters: MosaicParameters) -> int:
    """Return the side of a patch in level-0 pixels of a slide.

    Args:
        slide: The slide; nothing of it is read.
        parameters: ``mpp`` and ``patch_px`` of them.

    Raises:
        SlideError: The slide is smaller than one patch (``SLIDE_TOO_SMALL``), too coarse for it
            (``SLIDE_TOO_COARSE``), or its resolution is not known (``SLIDE_MPP_MISSING``).
    """
    l0_patch_px = round(parameters.patch_px * slide.l0_per_px(parameters.mpp))
    l0_width, l0_height = slide.info.l0_size_px
    if min(l0_width, l0_height) < l0_patch_px:
        raise SlideError(
            f"{slide.path}: the slide ({l0_width} x {l0_height} px) is smaller than one "
            f"{_say_patch(parameters)} ({l0_patch_px} px here). Ask for smaller patches (--patch-px).",
            reason="SLIDE_TOO_SMALL",
        )
    return l0_patch_px


def _say_patch(parameters: MosaicParameters) -> str:
    return f"patch of {parameters.patch_px} px at {parameters.mpp:g} µm/px"


def _find_candidates(
    slide: Slide,
    parameters: MosaicParameters,
    l0_patch_px: int,
    threads: int,
    also: Callable[[Block], None],
) -> tuple[NDArray[np.int64], NDArray[np.float64], Tissue]:
    """Return corners (n, 2) and tissue shares (n,) of the grid patches with enough tissue, and the tissue.

    Patches come row by row. Only whole ones count: what is left over at the right and lower edge is no patch.
    ``also`` is called with the blocks that are read.
    """
    l0_width, l0_height = slide.info.l0_size_px
    columns, rows = l0_width // l0_patch_px, l0_height // l0_patch_px
    tissue = find_tissue(slide, um_patch=l0_patch_px * slide.mpp, threads=threads, also=also)
    l0_corners = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    l0_corners = l0_corners * l0_patch_px
    shares = tissue.shares(l0_corners, l0_patch_px)
    enough = shares >= parameters.tissue_fraction
    if not enough.any():
        raise SlideError(
            f"{slide.path}: there is tissue, but no {_say_patch(parameters)} is "
            f"{parameters.tissue_fraction:.0%} tissue (the fullest is {shares.max():.0%}). "
            "'histoflare prepare' takes smaller patches (--patch-px) or less tissue (--tissue-fraction); a "
            "trained model takes only such as it was trained on.",
            reason="SLIDE_NO_PATCHES",
        )
    return l0_corners[enough].astype(np.int64), shares[enough], tissue


def _cluster_colours(colours: NDArray[np.float64], parameters: MosaicParameters) -> NDArray[np.int64]:
    """Return the colour cluster (n,) of every patch; clusters are numbered from dark to light."""
    from sklearn.cluster import KMeans  # heavy to import, and only a mosaic needs it

    count = min(parameters.clusters, len(np.unique(colours, axis=0)))
    seed = derive_seed(parameters.seed, "mosaic", "colours") % 2**32
    means = KMeans(count, n_init=KMEANS_STARTS, random_state=seed).fit(colours)
    rank = np.empty(count, np.int64)
    rank[np.argsort(means.cluster_centers_.sum(axis=1), kind="stable")] = np.arange(count)
    clusters: NDArray[np.int64] = rank[means.labels_]
    return clusters


def _choose(l0_xy: NDArray[np.int64], clusters: NDArray[np.int64], parameters: MosaicParameters) -> list[int]:
    """Return the indices of the chosen patches, ascending: max(1, ⌊n_c · p⌋) of every cluster."""
    chosen: list[int] = []
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        count = max(1, math.floor(len(members) * parameters.fraction + 1e-9))
        seed = derive_seed(parameters.seed, "mosaic", parameters.selection, int(cluster))
        if parameters.selection == "random":
            chosen += np.random.default_rng(seed).choice(members, count, replace=False).tolist()
        else:
            chosen += members[_spread(l0_xy[members], count, seed)].tolist()
    if parameters.max_patches is not None and len(chosen) > parameters.max_patches:
        generator = np.random.default_rng(derive_seed(parameters.seed, "mosaic", "max_patches"))
        chosen = generator.choice(sorted(chosen), parameters.max_patches, replace=False).tolist()
    return sorted(chosen)


def _spread(l0_xy: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Return ``count`` indices spread over the locations (n, 2): nearest to the centres of k-means."""
    from sklearn.cluster import KMeans

    means = KMeans(count, n_init=KMEANS_STARTS, random_state=seed % 2**32).fit(l0_xy.astype(np.float64))
    distance = np.linalg.norm(l0_xy - means.cluster_centers_[means.labels_], axis=1)
    nearest = [
        members[np.argmin(distance[members])]
        for members in (np.flatnonzero(means.labels_ == group) for group in range(count))
    ]
    return np.array(nearest, np.int64)
