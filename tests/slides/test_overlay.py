"""The picture of a mosaic: it marks what it should where it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoflare.slides.mosaic import MosaicParameters, find_mosaic
from histoflare.slides.overlay import (
    COLOURS,
    PICTURE_PX,
    SlidePicture,
    attention_colours,
    draw_attention,
    draw_overlay,
)
from histoflare.slides.reader import Slide


@pytest.mark.parametrize("patch_px", [64, 224])
def test_chosen_patches_are_framed_in_their_colour(test_data: Path, patch_px: int) -> None:
    with Slide(test_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        mosaic, tissue = find_mosaic(slide, MosaicParameters(patch_px=patch_px))
        picture = np.asarray(draw_overlay(slide, mosaic, tissue))
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


def test_attention_cells_lie_where_their_patches_do() -> None:
    """A slide of 1000 x 600 at a tenth: patches of 200 are cells of 20 pixels, their last one inside."""
    base = SlidePicture(Image.new("RGB", (100, 60), (200, 200, 200)), px_per_l0=0.1)
    corners = np.array([(0, 0), (400, 200), (800, 400)], dtype=np.int64)
    picture = np.asarray(draw_attention(base, corners, 200, np.array([0.0, 0.5, 1.0])))
    touched = (picture != 200).any(axis=2)
    expected = np.zeros((60, 100), dtype=bool)
    for x, y in ((0, 0), (40, 20), (80, 40)):
        expected[y : y + 20, x : x + 20] = True
    assert (touched == expected).all()
    for (x, y), colour in zip(((10, 10), (50, 30), (90, 50)), ("440154", "21918c", "fde725"), strict=True):
        wanted = 0.75 * np.array([int(colour[at : at + 2], 16) for at in (0, 2, 4)]) + 0.25 * 200
        assert np.abs(picture[y, x] - wanted).max() <= 1, "viridis at its ends and in its middle"


def test_the_slide_under_the_attention_is_grey() -> None:
    base = SlidePicture(Image.new("RGB", (50, 50), (200, 60, 150)), px_per_l0=1.0)
    picture = np.asarray(draw_attention(base, np.zeros((1, 2), dtype=np.int64), 10, np.array([0.5])))
    assert len(set(picture[40, 40].tolist())) == 1
    assert len(set(picture[5, 5].tolist())) > 1


def test_equal_steps_of_attention_look_equally_large() -> None:
    """Lightness (CIE L*) rises everywhere and its steps differ by less than half from their mean."""
    linear = attention_colours(np.linspace(0, 1, 33)).astype(float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = 116 * np.cbrt(luminance) - 16  # all above the linear toe at 0.9 %
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert np.abs(steps / steps.mean() - 1).max() < 0.5


@pytest.mark.parametrize("levels", [np.array([0.1]), np.array([0.1, np.nan])])
def test_levels_that_do_not_go_with_the_patches_are_refused(levels: np.ndarray) -> None:
    base = SlidePicture(Image.new("RGB", (50, 50)), px_per_l0=1.0)
    with pytest.raises(ValueError, match="2 patches"):
        draw_attention(base, np.zeros((2, 2), dtype=np.int64), 10, levels)
