"""Outlines that were drawn in Aperio ImageScope: its XML, which MoNuSeg uses for nuclei.

A file has layers (``Annotation``) of regions, each with its corners (``Vertex``) in pixels of the image; a
region with ``NegativeROA`` is cut out of its layer. Pixel (0, 0) spans 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.masks.image_files import read_file
from histoflare.masks.importers.polygons import LARGEST_L0, Polygon, fill
from histoflare.masks.windows import IGNORE
from histoflare.slides.resolution import given_mpp_fault

ELLIPSE = "2"
"""Type of a region whose two corners span an ellipse."""
ELLIPSE_CORNERS = 64


@dataclass(frozen=True)
class Layer:
    """One layer: the regions drawn in it, and those cut out of it."""

    name: str
    regions: tuple[Polygon, ...]
    cut_out: tuple[Polygon, ...]


@dataclass(frozen=True)
class Outlines:
    """The layers of a file that hold a region with an area, and its resolution in µm/px, if it states one.

    A figure that cannot be µm/px of an image of tissue counts as none.
    """

    layers: tuple[Layer, ...]
    mpp: float | None


def read_outlines(path: Path) -> Outlines:
    """Return what is drawn in an ImageScope XML.

    Raises:
        MaskError: It is missing, no such XML, or has a corner that is not two finite numbers
            (``MASK_UNREADABLE``).
    """
    try:
        root = ElementTree.fromstring(read_file(path, "MASK"))
    except ElementTree.ParseError as error:
        raise _unreadable(path, f"the XML is damaged ({error})") from error
    if root.tag != "Annotations":
        raise _unreadable(path, f"not an XML of Aperio ImageScope (it begins with <{root.tag}>)")
    layers = []
    for number, layer in enumerate(root.iter("Annotation"), start=1):
        regions: tuple[list[Polygon], list[Polygon]] = ([], [])
        for region in layer.iter("Region"):
            ring = _ring(path, region)
            if len(ring) >= 3:
                regions[region.get("NegativeROA") == "1"].append((ring,))
        if regions[0]:
            layers.append(Layer(_name(layer, number), *map(tuple, regions)))
    return Outlines(tuple(layers), _mpp(root.get("MicronsPerPixel")))


def draw_outlines(
    layers: Sequence[Layer], chosen: Sequence[str], size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return uint8 (h, w): 1 in the layers of the names ``chosen``, 255 in others, 0 elsewhere.

    What two layers cover belongs to the chosen one.
    """
    mask = np.zeros((size_px[1], size_px[0]), np.uint8)
    for layer in sorted(layers, key=lambda each: each.name in chosen):
        inside = fill(layer.regions, size_px) & ~fill(layer.cut_out, size_px)
        mask[inside] = 1 if layer.name in chosen else IGNORE
    return mask


def _ring(path: Path, region: ElementTree.Element) -> NDArray[np.float64]:
    try:
        corners = [(float(each.attrib["X"]), float(each.attrib["Y"])) for each in region.iter("Vertex")]
    except (KeyError, ValueError) as error:
        raise _unreadable(path, f"region {region.get('Id')} has a corner that is not two numbers") from error
    ring = np.array(corners, np.float64).reshape(-1, 2)
    if not (np.abs(ring) < LARGEST_L0).all():
        raise _unreadable(path, f"region {region.get('Id')} has a corner that is not two finite numbers")
    if region.get("Type") == ELLIPSE and len(ring) >= 2:
        low, high = ring.min(axis=0), ring.max(axis=0)
        angles = np.linspace(0, 2 * math.pi, ELLIPSE_CORNERS, endpoint=False)
        ring = (low + high) / 2 + np.column_stack([np.cos(angles), np.sin(angles)]) * (high - low) / 2
    return ring


def _name(layer: ElementTree.Element, number: int) -> str:
    """Return a layer's name: its own, or that of its attribute, as MoNuSAC has it, or its number."""
    if layer.get("Name"):
        return str(layer.get("Name"))
    for attribute in layer.iter("Attribute"):
        for said in (attribute.get("Value"), attribute.get("Name")):
            if said and said != "Description":
                return said
    return str(number)


def _mpp(said: str | None) -> float | None:
    try:
        mpp = float(said or "")
    except ValueError:
        return None
    return None if given_mpp_fault(mpp) else mpp


def _unreadable(path: Path, what: str) -> MaskError:
    return MaskError(f"{path}: {what}", reason="MASK_UNREADABLE")
