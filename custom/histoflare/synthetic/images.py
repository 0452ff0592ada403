"""Generated images of tissue of which it is known where the nuclei lie: for learning to outline them.

Patients, hospitals and tissue are as in :mod:`histoflare.synthetic.slides`. All images have one resolution,
so that hospitals differ in look and not in scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.seeds import derive_seed
from histoflare.slides.splits import Split
from histoflare.synthetic.cohort import (
    AGE_BANDS,
    EXTERNAL,
    EXTERNAL_STYLE,
    LABELS,
    HospitalStyle,
    PlannedSlide,
    hospital_style,
)
from histoflare.synthetic.slides import DRAWN_MPP, _slide_traits
from histoflare.synthetic.tissue_layout import lay_out
from histoflare.synthetic.tissue_texture import render_densities, stain_rgb

IMAGE_MPP = DRAWN_MPP
"""Of every image, µm/px."""

INSIDE = 0.5
"""A pixel is nucleus if more of it than this lies in one."""


@dataclass(frozen=True)
class SyntheticImages:
    """How many images of which size to make.

    Attributes:
        sites: Sites ``hospital-1`` and on; a further one, ``external``, is for testing alone.
        patients: Of each site.
        images_per_patient: Each a field of its own.
        side_px: Of the square images.
        seed: Of everything.
        stain_power: The strengths of a site's stains (1 is that of a neutral one) are raised to it: at 1
            sites stain as those of :mod:`histoflare.synthetic.slides`, above it they differ more.
    """

    sites: int = 4
    patients: int = 12
    images_per_patient: int = 2
    side_px: int = 256
    seed: int = 0
    stain_power: float = 1.0

    def __post_init__(self) -> None:
        if self.sites < 1 or self.images_per_patient < 1:
            raise JobError("made-up images need at least one site, and one image of each patient")
        if self.patients < 3:
            raise JobError("a site needs at least 3 patients: two to train on and one to test on")
        if not 32 <= self.side_px <= 4096:
            raise JobError(f"the side of a made-up image must be 32 to 4096 px, not {self.side_px}")


def plan_images(made: SyntheticImages) -> list[PlannedSlide]:
    """Return all images of ``made``, site by site, ``external`` last.

    Growth patterns take turns by patient, and of three pairs of patients the second is for testing. The first
    patients of many are those of few.
    """
    planned = []
    styles = {f"hospital-{index + 1}": index for index in range(made.sites)} | {EXTERNAL: EXTERNAL_STYLE}
    for site, index in styles.items():
        style = _raised(hospital_style(index, made.seed), made.stain_power)
        for rank in range(made.patients):
            patient = f"{site}-p{rank + 1:03d}"
            rng = np.random.default_rng(derive_seed(made.seed, "image patient", site, patient))
            traits = (("F", "M")[rng.integers(2)], AGE_BANDS[rng.integers(len(AGE_BANDS))])
            split: Split = "test" if site == EXTERNAL or rank // 2 % 3 == 1 else "train"
            planned += [
                PlannedSlide(site, patient, number + 1, LABELS[rank % 2], split, *traits, style)
                for number in range(made.images_per_patient)
            ]
    return planned


def _raised(style: HospitalStyle, power: float) -> HospitalStyle:
    stain = style.stain
    strengths = {"hematoxylin": stain.hematoxylin**power, "eosin": stain.eosin**power}
    return replace(style, stain=replace(stain, **strengths))


def render_image(image: PlannedSlide, side_px: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return pixels uint8 (h, w, 3) at :data:`IMAGE_MPP`, and a mask uint8 (h, w): 1 where a nucleus is.

    The mask is that of the nuclei as they are drawn, before blur and noise.

    Args:
        image: Whose tissue and stain.
        side_px: Of the square image.
        seed: As in :class:`SyntheticImages`.
    """
    composition, stain = _slide_traits(image, seed)
    rng = np.random.default_rng(derive_seed(seed, "image", image.site, image.patient, image.number))
    um_side = side_px * IMAGE_MPP
    layout = lay_out(composition, (um_side, um_side), rng)
    densities = render_densities(layout, (side_px, side_px), IMAGE_MPP, rng)
    return stain_rgb(densities, stain, IMAGE_MPP, rng), (densities.nuclei > INSIDE).astype(np.uint8)
