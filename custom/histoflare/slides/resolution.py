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

FINEST_MPP = 0.08
"""A slide that says it is finer is wrong, unless its objective says so too (100x oil: 0.055). Light of 450 nm
and a numerical aperture of 1.4 show nothing below λ / (4 NA) (Abbe's limit λ / (2 NA), sampled twice, as
Nyquist has it); scanners have 0.1 to 1 µm/px."""

COARSEST_MPP = 40.0
"""A slide this coarse states no microscope's resolution, but a printing one (72, 96, 300 or 600 dpi)."""

LONGEST_MM = 110.0
"""A slide's side if its resolution is right: glass is 76 mm long, for whole-mount sections up to 102 mm. For
longer glass a person gives the resolution."""

CAMERA_UM = (2.4, 15.0)
"""Objective power x µm/px, which is the side of the camera's pixels as seen behind all lenses. By the usual
convention it is 10 (40x: 0.25, 20x: 0.5). Scanners sold have 3.45 (20x and 0.1725, no further lens) to 11;
20x with a doubler (0.25 µm/px) has 5. Half the resolution of an export (40x and 0.5) has 20."""

GIVEN_MPP = (0.05, 10.0)
"""What a person states lies between these. An oil immersion of 100x has 0.055; 10, 20 and 40 are powers."""

UNEQUAL_MPP = 0.01
"""Pixels are taken as square when mpp-x and mpp-y differ by no more than this (relative)."""

SAME_MPP = 0.02
"""Two resolutions this close (relative) are taken as equal everywhere, such as 0.499 and 0.5 µm/px."""

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
    """The resolution of level 0 and where it comes from; without one, ``problem`` says why.

    ``stated_mpp`` is the slide's own figure, also where it is not taken.
    """

    mpp: float | None
    source: MppSource | None
    problem: str = ""
    stated_mpp: float | None = None


def is_mpp(value: float) -> bool:
    """Tell whether ``value`` can be a resolution in µm/px at which an image is wanted."""
    return math.isfinite(value) and SMALLEST_MPP <= value <= LARGEST_MPP


def given_mpp_fault(value: float) -> str:
    """Return why a slide cannot have the resolution that a person states, "" if it can.

    Args:
        value: In µm/px, of the slide's finest level.
    """
    finest, coarsest = GIVEN_MPP
    if not is_mpp(value):
        return "is not micrometres per pixel, such as 0.25"
    if value <= finest:
        return "is finer than a light microscope sees (40x is about 0.25 µm/px, 20x 0.5)"
    if value >= coarsest:
        return "is too coarse for µm per pixel; is it the magnification? 40x is about 0.25 µm/px, 20x 0.5"
    return ""


def check_given_mpp(value: float | None, what: str) -> None:
    """Raise :class:`SlideError` (``SLIDE_MPP_INVALID``) if a slide cannot have the resolution given.

    Args:
        value: In µm/px; None where none is given.
        what: How the message names it.
    """
    if value is not None and (fault := given_mpp_fault(value)):
        raise SlideError(
            f"{what} must be micrometres per pixel, such as 0.25 or 0.5: {value:g} {fault}.",
            reason="SLIDE_MPP_INVALID",
        )


def slide_info(
    properties: Mapping[str, str],
    level_sizes: Sequence[tuple[int, int]],
    downsamples: Sequence[float],
    given_mpp: float | None,
) -> tuple[SlideInfo, str]:
    """Return what may be known of a slide, and in words what is wrong with its resolution, "" if nothing is.

    Its own resolution is taken if a microscope can have it, the slide would fit on glass, and its objective
    does not contradict. Else a person must give it.

    Args:
        properties: OpenSlide's; only vendor, mpp-x, mpp-y, objective power and bounds are looked at.
        level_sizes: (width, height) of every level, finest first.
        downsamples: Factor to level 0 of every level.
        given_mpp: Resolution of level 0 as the user states it; wins over the slide's own.
    """
    vendor = properties.get("openslide.vendor")
    power = _positive(properties, "openslide.objective-power")
    resolution = _own_resolution(properties, vendor, power, max(level_sizes[0]))
    if given_mpp is not None:
        stated = resolution.stated_mpp
        agree = stated is None or abs(given_mpp - stated) <= SAME_MPP * stated
        note = "" if agree else f"the slide itself says {stated:.4g} µm/px"
        resolution = Resolution(given_mpp, "given", note, stated)
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
            f"at {l0_mpp:g} µm/px the slide is too coarse for the wanted {mpp:g} µm/px. Ask for "
            "coarser patches (--patch-mpp, a job's protocol.mpp), or correct the slide's mpp if it is wrong "
            "(it is micrometres per pixel, not a magnification).",
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


def _own_resolution(
    properties: Mapping[str, str], vendor: str | None, power: float | None, l0_longest_px: int
) -> Resolution:
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
        if not (vendor == "generic-tiff" and mpp >= COARSEST_MPP):
            fault = _own_fault(mpp, power, l0_longest_px)
            return Resolution(None, None, fault, mpp) if fault else Resolution(mpp, "slide", "", mpp)
        problem = f"the slide's resolution tags say {mpp:.4g} µm/px, a printer's default and no microscope's"
    if power is not None:
        if FINEST_MPP <= 10.0 / power < GIVEN_MPP[1]:
            return Resolution(10.0 / power, "objective")
        problem = f"the slide says that its objective is {power:g}x, and no microscope's is"
    return Resolution(None, None, problem)


def _own_fault(mpp: float, power: float | None, l0_longest_px: int) -> str:
    """Return why what a slide says of its resolution cannot be taken, "" if it can."""
    says = f"the slide says {mpp:.4g} µm/px"
    means = "" if power is None else f"; its objective of {power:g}x means about {10.0 / power:.3g}"
    agrees = power is not None and CAMERA_UM[0] <= power * mpp <= CAMERA_UM[1]
    if mpp < (GIVEN_MPP[0] if agrees else FINEST_MPP):
        return f"{says}, finer than a light microscope sees{means}"
    if mpp >= COARSEST_MPP:
        return f"{says}, coarser than any microscope{means}"
    if power is not None and not agrees:
        return f"{says}, and an objective of {power:g}x, which means about {10.0 / power:.3g}"
    if l0_longest_px * mpp > 1000 * LONGEST_MM:
        return f"{says}, so it would be {l0_longest_px * mpp / 1000:.0f} mm long, which no glass is{means}"
    return ""
