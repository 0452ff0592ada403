"""How fine a slide is, and which of its levels shows a wanted resolution. Always in mpp, µm per pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from histoflare.errors import SlideError

BOUNDS_SIDES = ("x", "y", "width", "height")

MppSource = Literal["given", "slide", "objective"]

SMALLEST_MPP, LARGEST_MPP = 0.01, 1000.0
"""Outside this range a figure cannot be micrometres per pixel of an image of tissue."""

TIFF_TAG_LIMIT_MPP = 40.0
"""A generic TIFF this coarse carries a printing resolution (72, 96, 300 or 600 dpi), not a microscope's."""

UNEQUAL_MPP = 0.01
"""Pixels are taken as square when mpp-x and mpp-y differ by no more than this (relative)."""

SAME_MPP = 0.02
"""Two resolutions this close (relative) are taken as equal: no resampling between 0.499 and 0.5 µm/px."""

LARGEST_UPSAMPLING = 1.25
"""A slide coarser than the wanted resolution by more than this cannot show what the encoder looks for."""


@dataclass(frozen=True)
class LevelInfo:
    """One level of the pyramid: size (width, height), factor to level 0 (>= 1), resolution if known."""

    lv_size_px: tuple[int, int]
    downsample: float
    mpp: float | None


@dataclass(frozen=True)
class SlideInfo:
    """All that is ever taken from a slide's properties; nothing in it identifies a person.

    ``l0_bounds_px`` is (x, y, width, height) of the rectangle of level 0 that was scanned (OpenSlide's
    bounds), None where the slide does not say it.
    """

    vendor: str | None
    l0_size_px: tuple[int, int]
    mpp: float | None
    mpp_source: MppSource | None
    objective_power: float | None
    levels: tuple[LevelInfo, ...]
    l0_bounds_px: tuple[int, int, int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Resolution:
    """The resolution of level 0 and where it comes from; without one, ``problem`` says why."""

    mpp: float | None
    source: MppSource | None
    problem: str = ""


def is_mpp(value: float) -> bool:
    """Tell whether ``value`` can be a resolution in µm/px."""
    return math.isfinite(value) and SMALLEST_MPP <= value <= LARGEST_MPP


def slide_info(
    properties: Mapping[str, str],
    level_sizes: Sequence[tuple[int, int]],
    downsamples: Sequence[float],
    given_mpp: float | None,
) -> tuple[SlideInfo, str]:
    """Return what may be known of a slide, and in words why its mpp is not known (if it is not).

    Args:
        properties: OpenSlide's; only vendor, mpp-x, mpp-y, objective power and bounds are looked at.
        level_sizes: (width, height) of every level, finest first.
        downsamples: Factor to level 0 of every level.
        given_mpp: Resolution of level 0 as the user states it; wins over the slide's own.
    """
    vendor = properties.get("openslide.vendor")
    power = _positive(properties, "openslide.objective-power")
    if given_mpp is not None:
        resolution = Resolution(given_mpp, "given")
    else:
        resolution = _own_resolution(properties, vendor, power)
    levels = tuple(
        LevelInfo(size, float(factor), None if resolution.mpp is None else resolution.mpp * factor)
        for size, factor in zip(level_sizes, downsamples, strict=True)
    )
    info = SlideInfo(
        vendor, level_sizes[0], resolution.mpp, resolution.source, power, levels, _bounds(properties)
    )
    return info, resolution.problem


def choose_level(info: SlideInfo, l0_mpp: float, mpp: float) -> tuple[int, float]:
    """Return the level to read for ``mpp`` and how many of its pixels one wanted pixel spans along a side.

    The coarsest level that is fine enough is chosen. Within 2 % of a whole number, the span is that number:
    1 needs no resampling, other whole numbers an exact average.

    Raises:
        SlideError: ``mpp`` is no resolution (``SLIDE_MPP_INVALID``) or much finer than the slide
            (``SLIDE_TOO_COARSE``).
    """
    if not is_mpp(mpp):
        raise SlideError(
            f"mpp must be micrometres per pixel, such as 0.5, and not {mpp}.", reason="SLIDE_MPP_INVALID"
        )
    fine_enough = [
        level for level, each in enumerate(info.levels) if l0_mpp * each.downsample <= mpp * (1 + SAME_MPP)
    ]
    level = max(fine_enough, key=lambda each: info.levels[each].downsample, default=0)
    lv_per_px = mpp / (l0_mpp * info.levels[level].downsample)
    if lv_per_px < 1 / LARGEST_UPSAMPLING:
        raise SlideError(
            f"at {l0_mpp:g} µm/px the slide is too coarse for the wanted {mpp:g} µm/px. Ask for a coarser "
            "resolution, or correct the slide's mpp if it is wrong (it is micrometres per pixel, not a "
            "magnification).",
            reason="SLIDE_TOO_COARSE",
        )
    whole = max(1, round(lv_per_px))
    return level, float(whole) if abs(lv_per_px - whole) <= SAME_MPP * whole else lv_per_px


def _positive(properties: Mapping[str, str], name: str) -> float | None:
    """Return the property ``name`` as a positive number, or None if it is none."""
    try:
        value = float(properties.get(name, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """Return OpenSlide's bounds (x, y, width, height); None, as in QuPath, unless all four are numbers."""
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{side}"]) for side in BOUNDS_SIDES)
    except (KeyError, ValueError):
        return None
    return (x, y, width, height) if min(width, height) > 0 else None


def _own_resolution(properties: Mapping[str, str], vendor: str | None, power: float | None) -> Resolution:
    """Return the resolution that the slide states, else that of its objective (20x is 0.5 µm/px)."""
    mpp_x = _positive(properties, "openslide.mpp-x")
    mpp_y = _positive(properties, "openslide.mpp-y")
    problem = "the slide does not say its resolution"
    if mpp_x is not None and mpp_y is not None:
        mpp = (mpp_x + mpp_y) / 2
        if abs(mpp_x - mpp_y) > UNEQUAL_MPP * max(mpp_x, mpp_y):
            # no fallback: the objective would silently decide for one of the two
            unequal = f"the slide's pixels are not square ({mpp_x:g} x {mpp_y:g} µm), so its mpp is not clear"
            return Resolution(None, None, unequal)
        if is_mpp(mpp) and not (vendor == "generic-tiff" and mpp >= TIFF_TAG_LIMIT_MPP):
            return Resolution(mpp, "slide")
        problem = f"the slide's resolution tags say {mpp:.4g} µm/px, a printer's default and no microscope's"
    if power is not None and is_mpp(10.0 / power):
        return Resolution(10.0 / power, "objective")
    return Resolution(None, None, problem)
