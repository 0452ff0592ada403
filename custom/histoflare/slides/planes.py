"""Planes: the corner of a slide from which level-0 pixels are counted.

Some scanners (Mirax, Leica) scan a part of the glass. OpenSlide's level 0 then is the whole glass, and its
properties ``openslide.bounds-*`` are the rectangle that was scanned. Programs count from one of two corners:

- ``bounds``: that of the scanned rectangle, which is all that QuPath shows (unless told ``--no-crop``).
- ``level0``: that of the whole level 0, as OpenSlide's own ``read_region``, ASAP and HALO do.

On a slide without bounds both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from histoflare.slides.resolution import SlideInfo

PlaneName = Literal["bounds", "level0"]
PLANE_NAMES: tuple[PlaneName, ...] = get_args(PlaneName)


@dataclass(frozen=True)
class Plane:
    """A rectangle of a slide whose corner is (0, 0) for whoever counts in it.

    Attributes:
        name: ``bounds`` or ``level0``.
        l0_xy: (x, y) of its corner in pixels of level 0.
        l0_size_px: (width, height); the scale is that of level 0.
    """

    name: PlaneName
    l0_xy: tuple[int, int]
    l0_size_px: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Return what a file says of the plane it is in."""
        return {"plane": self.name, "l0_xy": list(self.l0_xy), "l0_size_px": list(self.l0_size_px)}

    @classmethod
    def from_json(cls, fields: Any) -> Plane:
        """Return the plane that a file says it is in.

        Raises:
            ValueError: It says none.
        """
        try:
            (x, y), (width, height) = fields["l0_xy"], fields["l0_size_px"]
            name = fields["plane"]
        except (TypeError, KeyError) as error:
            raise ValueError("no plane") from error
        if name not in PLANE_NAMES or not all(type(each) is int for each in (x, y, width, height)):
            raise ValueError("no plane")
        return cls(name, (x, y), (width, height))


def plane_of(info: SlideInfo, name: PlaneName) -> Plane:
    """Return the plane ``name`` of a slide."""
    if name == "level0" or info.l0_bounds_px is None:
        return Plane(name, (0, 0), info.l0_size_px)
    x, y, width, height = info.l0_bounds_px
    return Plane(name, (x, y), (width, height))
