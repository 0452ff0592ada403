"""A slide of which only a part of the glass was scanned, as Leica's SCN has it: OpenSlide gives it bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

NAMESPACE = "http://www.leica-microsystems.com/scn/2010/10/01"
LEVELS = 2


def write_scn(
    path: Path, rgb: NDArray[np.uint8], l0_xy: tuple[int, int], l0_size_px: tuple[int, int], mpp: float = 0.5
) -> None:
    """Write ``rgb`` (h, w, 3) as what was scanned, its corner at ``l0_xy`` on a glass of ``l0_size_px``."""
    macro = np.full((32, 32, 3), 230, np.uint8)
    levels = [np.ascontiguousarray(rgb[:: 2**level, :: 2**level]) for level in range(LEVELS)]
    images = [("macro", [macro], (0, 0), l0_size_px, 0.6, 0)]
    images.append(("scan", levels, l0_xy, (rgb.shape[1], rgb.shape[0]), 20, 1))
    body = "".join(_image(*image, nm_px=round(1000 * mpp)) for image in images)
    width_nm, height_nm = (round(1000 * mpp) * side for side in l0_size_px)
    description = (
        f'<?xml version="1.0"?><scn xmlns="{NAMESPACE}" uuid="urn:uuid:c">'
        '<collection name="c" uuid="urn:uuid:c" '
        f'sizeX="{width_nm}" sizeY="{height_nm}">{body}</collection></scn>'
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, pixels in enumerate([macro, *levels]):
            tiff.write(
                pixels,
                description=description if number == 0 else None,
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95, "outcolorspace": "rgb"},
                tile=(256, 256),
                metadata=None,
                software=False,
            )


def _image(
    name: str,
    levels: list[NDArray[np.uint8]],
    l0_xy: tuple[int, int],
    l0_size_px: tuple[int, int],
    power: float,
    first_ifd: int,
    *,
    nm_px: int,
) -> str:
    dimensions = "".join(
        f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{r}" ifd="{first_ifd + r}"/>'
        for r, level in enumerate(levels)
    )
    (x, y), (width, height) = ((nm_px * a, nm_px * b) for a, b in (l0_xy, l0_size_px))
    return (
        f'<image name="{name}" uuid="urn:uuid:{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
        '<device model="Leica SCN400;Leica SCN" version="1"/>'
        f'<pixels sizeX="{levels[0].shape[1]}" sizeY="{levels[0].shape[0]}">{dimensions}</pixels>'
        f'<view sizeX="{width}" sizeY="{height}" offsetX="{x}" offsetY="{y}" spacingZ="0"/>'
        f"<scanSettings><objectiveSettings><objective>{power}</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
    )
