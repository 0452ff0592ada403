"""Pyramids against raw OpenSlide, which shares no code with the writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from PIL import Image

from histoflare.slides.pyramid import halve, level_count, write_pyramid, write_pyramid_bands
from tests.refusals import raises_reason


def smooth_picture(width_px: int, height_px: int) -> NDArray[np.uint8]:
    """A picture without edges, which JPEG keeps within a few grey values."""
    x, y = np.meshgrid(np.arange(width_px), np.arange(height_px))
    planes = [128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 55), 128 + 100 * np.sin((x + y) / 70)]
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.25, 0.499, 1.0, 29.0])
def test_openslide_reads_the_resolution(tmp_path: Path, mpp: float) -> None:
    write_pyramid(tmp_path / "a.tif", smooth_picture(300, 200), mpp)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(mpp, rel=1e-6)


@pytest.mark.parametrize("size_px", [(1024, 768), (1000, 515), (301, 1207), (256, 256), (40, 30)])
def test_every_level_shows_the_picture(tmp_path: Path, size_px: tuple[int, int]) -> None:
    picture = smooth_picture(*size_px)
    write_pyramid(tmp_path / "a.tif", picture, 0.5)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_count == level_count(size_px)
        for level in range(slide.level_count):
            width_px, height_px = size_px[0] >> level, size_px[1] >> level
            assert slide.level_dimensions[level] == (width_px, height_px)
            used = picture[: height_px << level, : width_px << level]
            wanted = np.asarray(Image.fromarray(used).resize((width_px, height_px), Image.Resampling.BOX))
            shown = np.asarray(slide.read_region((0, 0), level, (width_px, height_px)).convert("RGB"))
            difference = np.abs(shown.astype(int) - wanted.astype(int))
            assert difference.mean() < 3
            assert difference.max() < 30


def test_colours_are_not_swapped(tmp_path: Path) -> None:
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 250
    write_pyramid(tmp_path / "red.tif", red, 0.5)
    with openslide.OpenSlide(tmp_path / "red.tif") as slide:
        r, g, b, a = slide.read_region((10, 10), 0, (1, 1)).getpixel((0, 0))
    assert r > 240
    assert max(g, b) < 10
    assert a == 255


def test_levels_can_be_given(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", smooth_picture(600, 600), 0.5, levels=1)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_count == 1


def test_level_count_ends_when_one_tile_holds_the_slide() -> None:
    assert [level_count((side, side)) for side in (1, 256, 257, 512, 513, 4096)] == [1, 1, 2, 2, 3, 5]


def test_same_pixels_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_pyramid(tmp_path / f"{name}.tif", smooth_picture(500, 400), 0.5)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_halve_is_the_mean_of_blocks() -> None:
    block = np.array([[[0, 10, 255], [1, 10, 255]], [[2, 10, 255], [3, 11, 255]]], np.uint8)
    assert halve(block).tolist() == [[[2, 10, 255]]]  # 1.5 is rounded up, 10.25 down


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf"), 352.8])
def test_a_resolution_no_slide_has_is_refused(tmp_path: Path, mpp: float) -> None:
    with raises_reason("SLIDE_MPP_INVALID", "um/px"):
        write_pyramid(tmp_path / "a.tif", smooth_picture(30, 30), mpp)
    assert list(tmp_path.iterdir()) == []


def test_bands_that_stop_early_leave_no_file(tmp_path: Path) -> None:
    picture = smooth_picture(300, 600)
    with pytest.raises(ValueError, match="256 of 600"):
        write_pyramid_bands(tmp_path / "a.tif", [picture[:256]], (300, 600), 0.5)
    assert list(tmp_path.iterdir()) == []
