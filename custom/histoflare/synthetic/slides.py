"""Generated slides of tissue that looks a little like H&E: for demos, tests and experiments.

Two classes, ``glandular`` and ``solid``, differ in how tumour cells grow and in nothing else (see
:mod:`histoflare.synthetic.tissue_layout`). Hospitals differ in stain, blur, noise and resolution. A patient
has one to three slides that share the tissue's composition. Nothing here comes from a patient.

Slides at 0.25 um/px are drawn at 0.5 and enlarged: more pixels, not more detail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoflare.seeds import derive_seed
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.threads import make_each
from histoflare.synthetic.cohort import (
    LABELS,
    NEUTRAL_STYLE,
    HospitalStyle,
    PlannedSlide,
    SyntheticCohort,
    hospital_style,
    plan_slides,
    slide_path,
    write_site_manifests,
)
from histoflare.synthetic.tissue_layout import Composition, lay_out
from histoflare.synthetic.tissue_texture import Plane, Stain, enlarge, render_densities, stain_rgb

__all__ = [
    "LABELS",
    "NEUTRAL_STYLE",
    "HospitalStyle",
    "PlannedSlide",
    "SyntheticCohort",
    "draw_composition",
    "hospital_style",
    "make_slides",
    "plan_slides",
    "reference_patches",
    "render_mosaic",
    "render_patch",
    "render_slide",
]

DRAWN_MPP = 0.5
GLAND_SHARE = {"glandular": (0.66, 0.94), "solid": (0.06, 0.34)}  # range of the share of gland units


def make_slides(
    out_dir: Path, cohort: SyntheticCohort, progress: Callable[[int, int], None] | None = None
) -> dict[str, Path]:
    """Write the slides of ``cohort`` and one manifest per site; slides that are there already are made again.

    A manifest also lists the slides that are not drawn: read it with ``check_files=False`` then.

    Args:
        out_dir: Gets ``<site>/manifest.csv`` and ``<site>/slides/*.tif``.
        cohort: What to make.
        progress: Called with (slides made, slides in all) after each.

    Returns:
        The manifest of each site.
    """
    planned = plan_slides(cohort)
    drawn = [slide for slide in planned if slide.drawn]

    def make(slide: PlannedSlide) -> None:
        rgb = render_slide(slide, cohort)
        write_pyramid(slide_path(out_dir, slide), rgb, slide.style.mpp, jpeg_quality=slide.style.jpeg_quality)

    with closing(make_each(make, drawn)) as made:
        for done, _ in enumerate(made, start=1):
            if progress is not None:
                progress(done, len(drawn))
    return write_site_manifests(out_dir, planned)


def render_slide(slide: PlannedSlide, cohort: SyntheticCohort) -> NDArray[np.uint8]:
    """Return the pixels of one slide at its style's mpp: uint8 (h, w, 3), an island of tissue on glass."""
    composition, stain = _slide_traits(slide, cohort.seed)
    rng = np.random.default_rng(derive_seed(cohort.seed, "tissue", slide.site, slide.patient, slide.number))
    side_px = round(cohort.um_field / DRAWN_MPP)
    level = _island(rng, side_px)
    cell = cohort.um_field / level.shape[0]

    def inside(um_x: NDArray[np.float64], um_y: NDArray[np.float64]) -> NDArray[np.bool_]:
        last = level.shape[0] - 1
        columns = np.clip(um_x / cell, 0, last).astype(int)
        rows = np.clip(um_y / cell, 0, last).astype(int)
        found: NDArray[np.bool_] = level[rows, columns] > 0
        return found

    layout = lay_out(composition, (cohort.um_field, cohort.um_field), rng, inside)
    cover = np.clip(0.5 + enlarge(level, (side_px, side_px)) * 120, 0, 1)
    densities = render_densities(layout, (side_px, side_px), DRAWN_MPP, rng, cover)
    rgb = stain_rgb(densities, stain, DRAWN_MPP, rng)
    if slide.style.mpp == DRAWN_MPP:
        return rgb
    enlarged_px = round(cohort.um_field / slide.style.mpp)
    return np.asarray(Image.fromarray(rgb).resize((enlarged_px, enlarged_px), Image.Resampling.BICUBIC))


def render_mosaic(
    slide: PlannedSlide, seed: int, patches: int, patch_px: int, mpp: float
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return patches of ``slide`` without making the slide, for experiments with many.

    Args:
        slide: Whose tissue and stain; ``seed`` is its cohort's.
        seed: As in :class:`SyntheticCohort`.
        patches: How many, side by side in a field as square as they fill.
        patch_px: Side of a patch.
        mpp: Resolution of the patches in um/px.

    Returns:
        uint8 (patches, patch_px, patch_px, 3), and their corners (patches, 2) as x, y in pixels of ``mpp``.
    """
    composition, stain = _slide_traits(slide, seed)
    rng = np.random.default_rng(derive_seed(seed, "field", slide.site, slide.patient, slide.number))
    columns = math.ceil(math.sqrt(patches))
    rows = math.ceil(patches / columns)
    width_px, height_px = columns * patch_px, rows * patch_px
    layout = lay_out(composition, (width_px * mpp, height_px * mpp), rng)
    rgb = stain_rgb(render_densities(layout, (width_px, height_px), mpp, rng), stain, mpp, rng)
    corners = np.array([(x, y) for y in range(rows) for x in range(columns)][:patches], np.int64) * patch_px
    cut = np.stack([rgb[y : y + patch_px, x : x + patch_px] for x, y in corners])  # (n, h, w, 3)
    return cut, corners


def render_patch(
    style: HospitalStyle, label: str, seed: int, size_px: int | tuple[int, int], mpp: float
) -> NDArray[np.uint8]:
    """Return a field of nothing but tissue: uint8 (h, w, 3) at ``mpp``; the same seed gives the same patient.

    Args:
        style: The hospital; its own mpp plays no part.
        label: One of :data:`LABELS`.
        seed: Of the patient and of the field.
        size_px: Side, or (width, height).
        mpp: Resolution of the patch in um/px.
    """
    size_px = (size_px, size_px) if isinstance(size_px, int) else size_px
    rng = np.random.default_rng(seed)
    composition = draw_composition(label, rng)
    layout = lay_out(composition, (size_px[0] * mpp, size_px[1] * mpp), rng)
    densities = render_densities(layout, size_px, mpp, rng)
    return stain_rgb(densities, _vary(style.stain, rng), mpp, rng)


def reference_patches(count: int, size_px: int, seed: int = 0, mpp: float = 0.5) -> NDArray[np.uint8]:
    """Return patches for normalisation statistics that depend on no patient: uint8 (count, h, w, 3).

    The classes take turns, and so do the neutral style and seven hospital styles of seed 0.
    """
    styles = [NEUTRAL_STYLE, *(hospital_style(index) for index in range(7))]
    patches = [
        render_patch(styles[i % 8], LABELS[i // 8 % 2], derive_seed(seed, "reference", i), size_px, mpp)
        for i in range(count)
    ]
    return np.stack(patches)


def draw_composition(label: str, rng: np.random.Generator) -> Composition:
    """Draw what a patient's tissue is made of. Only ``gland_share`` looks at ``label``."""
    low, high = GLAND_SHARE[label]
    return Composition(
        gland_share=float(rng.uniform(low, high)),
        units_per_mm2=float(rng.uniform(130, 180)),
        um_lumen_radius=float(np.exp(rng.normal(np.log(13), 0.14))),
        um_nucleus=float(rng.normal(9.0, 0.6)),
        stroma_nuclei_per_mm2=float(rng.uniform(700, 1400)),
        nuclear_stain=float(rng.uniform(0.85, 1.2)),
    )


def _slide_traits(slide: PlannedSlide, seed: int) -> tuple[Composition, Stain]:
    """The composition is the patient's; the slide adds a little of its own."""
    patient = np.random.default_rng(derive_seed(seed, "composition", slide.site, slide.patient))
    own = np.random.default_rng(derive_seed(seed, "slide", slide.site, slide.patient, slide.number))
    composition = draw_composition(slide.label, patient)
    composition = replace(
        composition,
        gland_share=float(np.clip(composition.gland_share + own.normal(0, 0.05), 0, 1)),
        units_per_mm2=composition.units_per_mm2 * float(np.exp(own.normal(0, 0.05))),
    )
    return composition, _vary(slide.style.stain, own)


def _vary(stain: Stain, rng: np.random.Generator) -> Stain:
    """Return ``stain`` as one slide took it up."""
    hematoxylin, eosin = np.exp(rng.normal(0, 0.1, 2))
    return replace(
        stain, hematoxylin=stain.hematoxylin * float(hematoxylin), eosin=stain.eosin * float(eosin)
    )


def _island(rng: np.random.Generator, side_px: int) -> Plane:
    """Return a coarse square field that is positive on tissue; its outline is a wobbly circle with bays."""
    cells = max(32, side_px // 16)
    y, x = (np.mgrid[:cells, :cells].astype(np.float32) + 0.5) / cells - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    outline = 0.42 + sum(
        0.035 * rng.uniform(0.2, 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5, 8)
    )
    bays = enlarge(rng.standard_normal((9, 9), dtype=np.float32), (cells, cells))
    level = np.minimum(outline, 0.475) - radius + 0.012 * bays
    return np.asarray(level, np.float32)
