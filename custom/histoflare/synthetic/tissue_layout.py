"""Where nuclei and lumens lie in generated tissue: geometry in micrometres, no pixels.

Tissue is made of units. A unit is one lumen and the nuclei of one group of tumour cells. In a *gland* the
nuclei stand in a ring around the lumen, in a *sheet* they fill a nest of their own and the lumen lies bare
somewhere else. Everything else (how many units, how large, how many nuclei, their size, shape and stain) is
drawn in the same way for both, so that only the growth pattern tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]
Inside = Callable[[Floats, Floats], NDArray[np.bool_]]  # (um_x, um_y) -> is there tissue

UM_NUCLEUS_SPACING = 7.4  # between centres of neighbouring tumour nuclei in a ring
UM_NEST_SPACING = 8.8  # in a nest; larger, since nuclei there touch on all sides: both cover the same area
UM_RING_GAP = 6.0  # from the lumen's edge to the centres of the first row of nuclei
UM_MARGIN = 45.0  # tissue laid out around the field, so that units are cut by its border and do not end there
HARMONICS = np.arange(2, 5)  # of the outline r(angle) of lumens and nests


@dataclass(frozen=True)
class Composition:
    """What one slide is made of, drawn without looking at its label, except for ``gland_share``.

    Attributes:
        gland_share: Probability that a unit is a gland, in [0, 1].
        units_per_mm2: Density of units.
        um_lumen_radius: Median radius of lumens.
        um_nucleus: Median long axis of tumour nuclei.
        stroma_nuclei_per_mm2: Density of spindle cells and lymphocytes.
        nuclear_stain: Hematoxylin of tumour nuclei, about 1.
    """

    gland_share: float
    units_per_mm2: float
    um_lumen_radius: float
    um_nucleus: float
    stroma_nuclei_per_mm2: float
    nuclear_stain: float


@dataclass(frozen=True)
class Lumens:
    """n lumens; the outline is r(a) = um_radius * (1 + sum over k of amplitude_k * cos(k * a + phase_k))."""

    um_x: Floats  # (n,)
    um_y: Floats  # (n,)
    um_radius: Floats  # (n,)
    amplitude: Floats  # (n, 3)
    phase: Floats  # (n, 3)

    def um_outline(self, index: NDArray[np.intp], angle: Floats) -> Floats:
        """Return r(angle) of the lumens ``index``; both (m,)."""
        waves = np.cos(angle[:, None] * HARMONICS + self.phase[index])
        outline: Floats = self.um_radius[index] * (1 + (self.amplitude[index] * waves).sum(1))
        return outline


@dataclass(frozen=True)
class Nuclei:
    """n nuclei as ellipses; ``angle`` is that of the long axis, in radians."""

    um_x: Floats
    um_y: Floats
    um_long: Floats
    um_short: Floats
    angle: Floats
    stain: Floats
    vesicular: Floats  # 0 solid chromatin ... 1 pale with a rim and a nucleolus

    def take(self, keep: NDArray[np.bool_]) -> Nuclei:
        """Return the nuclei where ``keep`` is true."""
        return Nuclei(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Layout:
    """All that lies in a field whose corner is (0, 0); parts of it lie in the margin around the field."""

    um_size: tuple[float, float]
    lumens: Lumens
    nuclei: Nuclei


def lay_out(
    composition: Composition,
    um_size: tuple[float, float],
    rng: np.random.Generator,
    inside: Inside | None = None,
) -> Layout:
    """Place the units and the stroma of a field.

    Args:
        composition: What the tissue is made of.
        um_size: (width, height) of the field.
        rng: Source of every random choice.
        inside: Where tissue is; by default everywhere.
    """
    um_span = np.array(um_size) + 2 * UM_MARGIN
    count = max(1, round(composition.units_per_mm2 * um_span.prod() * 1e-6))
    um_radius = composition.um_lumen_radius * np.exp(0.3 * rng.standard_normal(count))
    amplitude = np.array([0.16, 0.08, 0.05]) * rng.uniform(0.3, 1.0, (count, 3))
    phase = rng.uniform(0, 2 * np.pi, (count, 3))
    is_gland = rng.random(count) < composition.gland_share
    ring = 2 * np.pi * (um_radius + UM_RING_GAP) / UM_NUCLEUS_SPACING
    nuclei_count = np.maximum(6, np.round(ring * rng.uniform(1.0, 1.7, count))).astype(int)

    um_nest = UM_NEST_SPACING * np.sqrt(
        nuclei_count * 0.9 / np.pi
    )  # hexagonal packing: sqrt(3)/2 per nucleus
    um_lumen_room = um_radius + np.where(is_gland, 2.1 * UM_RING_GAP + 2.0, 4.0)
    um_rooms = np.concatenate([um_lumen_room, um_nest[~is_gland] + 3.0])
    um_centres = _place_discs(um_rooms, um_span, rng) - UM_MARGIN
    lumens = Lumens(um_centres[:count, 0], um_centres[:count, 1], um_radius, amplitude, phase)

    parts = [_ring_positions(lumens, np.flatnonzero(is_gland), nuclei_count, rng)]
    parts.append(_nest_positions(um_centres[count:], nuclei_count[~is_gland], um_nest[~is_gland], rng))
    um_xy, angle = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    tumour = _tumour_nuclei(um_xy, angle, composition, rng)
    stroma = _stroma_nuclei(composition, um_span, rng)
    nuclei = Nuclei(
        *(np.concatenate([getattr(tumour, n), getattr(stroma, n)]) for n in tumour.__dataclass_fields__)
    )
    nuclei = nuclei.take(_free(nuclei, lumens, um_spacing=4.6))
    if inside is not None:
        nuclei = nuclei.take(inside(nuclei.um_x, nuclei.um_y))
    return Layout(um_size, lumens, nuclei)


def _place_discs(um_rooms: Floats, um_span: Floats, rng: np.random.Generator) -> Floats:
    """Return centres (n, 2) of discs that overlap as little as 30 tries each allow, the largest first."""
    centres = np.empty((len(um_rooms), 2))
    tries = rng.random((len(um_rooms), 30, 2)) * um_span
    placed: list[int] = []
    for disc in np.argsort(-um_rooms, kind="stable"):
        if placed:
            distance = np.hypot(*(tries[disc][:, None] - centres[placed]).transpose(2, 0, 1))  # (30, placed)
            gap = (distance - um_rooms[placed] - um_rooms[disc]).min(axis=1)
            fitting = np.flatnonzero(gap > 0)
            centres[disc] = tries[disc][fitting[0] if fitting.size else gap.argmax()]
        else:
            centres[disc] = tries[disc][0]
        placed.append(int(disc))
    return centres


def _ring_positions(
    lumens: Lumens, glands: NDArray[np.intp], nuclei_count: NDArray[np.int_], rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return centres (m, 2) and angles (m,) of nuclei that stand around their lumen, long axis outwards."""
    of = np.repeat(glands, nuclei_count[glands])
    rank = np.concatenate([np.arange(nuclei_count[gland]) for gland in glands] or [np.empty(0)])
    first_row = np.floor(2 * np.pi * (lumens.um_radius[of] + UM_RING_GAP) / UM_NUCLEUS_SPACING)
    second = rank >= first_row
    around = np.where(second, (rank - first_row) * 1.0 + 0.5, rank) / first_row * 2 * np.pi
    around = around + lumens.phase[of, 0] + rng.normal(0, 0.12, len(of)) * 2 * np.pi / first_row
    um_out = UM_RING_GAP + np.where(second, UM_NUCLEUS_SPACING, 0) + rng.normal(0, 0.9, len(of))
    um_from_centre = lumens.um_outline(of, around) + um_out
    um_xy = np.stack([lumens.um_x[of], lumens.um_y[of]], 1)
    um_xy = um_xy + um_from_centre[:, None] * np.stack([np.cos(around), np.sin(around)], 1)
    return um_xy, around + rng.normal(0, 0.35, len(of))


def _nest_positions(
    um_centres: Floats, nuclei_count: NDArray[np.int_], um_nest: Floats, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return centres (m, 2) and angles (m,) of nuclei that fill discs: a jittered hexagonal grid."""
    reach = int(np.ceil(um_nest.max(initial=0) / UM_NEST_SPACING)) + 2
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    grid = np.stack([column + row / 2, row * np.sqrt(3) / 2], 1) * UM_NEST_SPACING
    found = [np.empty((0, 2))]
    for um_centre, count in zip(um_centres, nuclei_count, strict=True):
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
        shifted = grid + rng.uniform(-4, 4, 2)
        along = shifted @ np.array([np.cos(turn), np.sin(turn)])
        across = shifted @ np.array([-np.sin(turn), np.cos(turn)])
        nearest = np.argsort(np.hypot(along * stretch, across / stretch), kind="stable")[:count]
        found.append(um_centre + shifted[nearest] + rng.normal(0, 0.11 * UM_NEST_SPACING, (count, 2)))
    um_xy = np.concatenate(found)
    return um_xy, rng.uniform(0, np.pi, len(um_xy))


def _tumour_nuclei(
    um_xy: Floats, angle: Floats, composition: Composition, rng: np.random.Generator
) -> Nuclei:
    count = len(um_xy)
    um_long = composition.um_nucleus * np.exp(0.13 * rng.standard_normal(count))
    return Nuclei(
        um_x=um_xy[:, 0],
        um_y=um_xy[:, 1],
        um_long=um_long,
        um_short=um_long * rng.uniform(0.55, 0.9, count),
        angle=angle,
        stain=composition.nuclear_stain * np.exp(0.16 * rng.standard_normal(count)),
        vesicular=np.clip(rng.normal(0.45, 0.3, count), 0, 1),
    )


def _stroma_nuclei(composition: Composition, um_span: Floats, rng: np.random.Generator) -> Nuclei:
    """Return spindle cells, aligned with their neighbours, and every third one a lymphocyte."""
    count = round(composition.stroma_nuclei_per_mm2 * um_span.prod() * 1e-6)
    um_xy = rng.random((count, 2)) * um_span - UM_MARGIN
    waves = rng.uniform(0, 2 * np.pi, 2)
    flow = np.sin(um_xy[:, 0] / 90 + waves[0]) + np.cos(um_xy[:, 1] / 110 + waves[1])
    lymphocyte = rng.random(count) < 1 / 3
    um_long = np.where(lymphocyte, rng.normal(6.2, 0.4, count), rng.normal(12.5, 2.0, count))
    thin = rng.uniform(0.22, 0.4, count)
    return Nuclei(
        um_x=um_xy[:, 0],
        um_y=um_xy[:, 1],
        um_long=np.maximum(um_long, 4.0),
        um_short=np.maximum(um_long, 4.0) * np.where(lymphocyte, 0.92, thin),
        angle=flow * 1.2 + rng.normal(0, 0.3, count),
        stain=np.where(lymphocyte, 1.25, 0.95) * np.exp(0.1 * rng.standard_normal(count)),
        vesicular=np.zeros(count),
    )


def _free(nuclei: Nuclei, lumens: Lumens, um_spacing: float) -> NDArray[np.bool_]:
    """Return which nuclei lie in no lumen and nearer than ``um_spacing`` to no nucleus before them."""
    um_xy = np.stack([nuclei.um_x, nuclei.um_y], 1)
    keep = np.ones(len(um_xy), bool)
    for lumen in range(len(lumens.um_x)):
        um_dx, um_dy = nuclei.um_x - lumens.um_x[lumen], nuclei.um_y - lumens.um_y[lumen]
        near = np.flatnonzero(um_dx**2 + um_dy**2 < (2 * lumens.um_radius[lumen] + 4) ** 2)
        outline = lumens.um_outline(np.full(len(near), lumen), np.arctan2(um_dy[near], um_dx[near]))
        keep[near] &= np.hypot(um_dx[near], um_dy[near]) > outline + 2.5
    pairs = cKDTree(um_xy).query_pairs(um_spacing, output_type="ndarray")  # (pairs, 2), first < second
    for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]:
        if keep[first]:
            keep[second] = False
    return keep
