"""The picture of a mosaic: it marks what it should where it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.overlay import COLOURS, PICTURE_PX, draw_overlay
from histoflare.slides.reader import Slide


@pytest.mark.parametrize("patch_px", [64, 224])
def test_chosen_patches_are_framed_in_their_colour(test_data: Path, patch_px: int) -> None:
    with Slide(test_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        mosaic = build_mosaic(slide, MosaicParameters(patch_px=patch_px))
        picture = np.asarray(draw_overlay(slide, mosaic))
    scale = PICTURE_PX / 2967
    left = (picture.shape[1] - round(2220 * scale)) // 2
    chosen = set(mosaic.chosen)
    for index, patch in enumerate(mosaic.candidates):
        # the middle of the left edge, three pixels in: inside every frame
        x = left + round(patch.l0_x_px * scale) + 2
        y = round((patch.l0_y_px + mosaic.l0_patch_px / 2) * scale)
        framed = tuple(picture[y, x]) == COLOURS[patch.cluster]
        assert framed == (index in chosen)
    legend = picture[PICTURE_PX:]
    assert legend.shape[0] > 100
    for cluster in {patch.cluster for patch in mosaic.candidates}:
        assert (legend == COLOURS[cluster]).all(axis=2).sum() > 300  # its swatch
