"""Tissue by colour: constructed images with known answers, and real tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides import reader, tissue
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from histoflare.slides.tissue import Light, Tissue, find_tissue, tissue_mask

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])
"""Stain vectors in optical density: Ruifrok & Johnston 2001."""

PENS = {
    "black": (25, 25, 30),
    "grey": (120, 120, 120),
    "blue": (40, 60, 190),
    "dark blue": (20, 30, 90),
    "cyan": (60, 170, 210),
    "green": (40, 140, 70),
    "dark green": (10, 70, 40),
    "red": (200, 25, 35),
    "dark red": (150, 15, 25),
    "orange": (240, 130, 20),
    "yellow": (240, 220, 60),
    "brown": (110, 70, 35),
}


def stained(haematoxylin: float, eosin: float) -> NDArray[np.uint8]:
    """Return the colour (3,) of tissue with these amounts of stain (Beer–Lambert)."""
    density = haematoxylin * HAEMATOXYLIN + eosin * EOSIN
    return np.rint(255 * 10**-density).astype(np.uint8)


def glass(
    height: int = 100, width: int = 100, colour: tuple[int, int, int] = (244, 244, 244)
) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(-3, 4, (height, width, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def light_of(*parts: NDArray[np.uint8]) -> Light:
    light = Light()
    for part in parts:
        light.add(part)
    return light


@settings(deadline=None)
@given(st.floats(0, 1.2), st.floats(0, 0.6))
def test_any_mixture_of_the_stains_is_tissue(haematoxylin: float, eosin: float) -> None:
    if 0.41 * haematoxylin + 0.88 * eosin < 0.06:  # OD_G − OD_B: next to nothing on the glass
        return
    image = glass()
    image[20:80, 20:80] = stained(haematoxylin, eosin)
    mask = tissue_mask(image)
    assert mask[20:80, 20:80].all()
    assert mask.sum() == 60 * 60


@pytest.mark.parametrize(
    "tint", [(255, 255, 255), (244, 244, 244), (235, 232, 222), (225, 230, 240), (205, 205, 205)]
)
def test_glass_is_no_tissue_whatever_its_tint(tint: tuple[int, int, int]) -> None:
    image = glass(colour=tint)
    assert not tissue_mask(image).any()
    image[30:70, 30:70] = (stained(0.3, 0.3) * (np.array(tint) / 255)).astype(np.uint8)
    assert tissue_mask(image)[30:70, 30:70].all()


@pytest.mark.parametrize("name", PENS)
def test_pens_are_no_tissue(name: str) -> None:
    image = glass()
    image[10:40, 10:90] = PENS[name]
    image[60:90, 10:90] = stained(0.3, 0.3)
    mask = tissue_mask(image)
    assert not mask[:50].any()
    assert mask[60:90, 10:90].all()


@settings(deadline=None)
@given(st.integers(0, 255))
def test_no_grey_is_tissue(level: int) -> None:
    image = glass()
    image[30:60, 30:60] = level
    assert not tissue_mask(image).any()


def test_specks_go_and_pinholes_close_by_their_size_on_the_slide() -> None:
    colour = stained(0.4, 0.2)
    image = glass()
    image[2:6, 2:6] = colour  # 16 px
    image[20:80, 20:80] = colour
    image[40:44, 40:44] = 244  # 16 px hole
    coarse = tissue_mask(image, mpp=8.0)  # 16 px = 1024 µm²: under 2500
    assert not coarse[2:6, 2:6].any()
    assert coarse[40:44, 40:44].all()
    coarser = tissue_mask(image, mpp=16.0)  # 4096 µm²: over
    assert coarser[2:6, 2:6].all()
    assert not coarser[40:44, 40:44].any()


def test_image_without_background_is_tissue() -> None:
    """What Otsu's threshold gets wrong: a piece cut from within the tissue."""
    image = np.empty((64, 64, 3), np.uint8)
    image[:, :32] = stained(0.6, 0.2)
    image[:, 32:] = stained(0.05, 0.25)
    assert tissue_mask(image).all()


def test_real_lung_tumour_is_tissue(test_data: Path) -> None:
    """Tiles of squamous cell carcinoma are cut from solid tumour."""
    files = sorted((test_data / "cls_lc25000_lung" / "lung_scc").iterdir())
    shares = [
        tissue_mask(np.asarray(Image.open(file).convert("RGB").reduce(8)), mpp=4.0).mean() for file in files
    ]
    assert len(shares) == 150
    assert np.quantile(shares, 0.05) > 0.9


def test_real_slide_is_a_third_tissue_and_its_glass_is_not(test_data: Path) -> None:
    with Slide(test_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        image = slide.thumbnail(4.0)
    mask = tissue_mask(image, mpp=4.0)
    bright = (image.min(axis=2) > 235) & (np.ptp(image, axis=2) < 8)
    assert 0.25 < mask.mean() < 0.45
    assert mask[bright].mean() < 0.05  # only what pinholes close over
    height, width = mask.shape
    assert not mask[height // 8 : height // 3, : width // 4].any()  # bare glass, with dust on it


def test_white_point_is_the_glass() -> None:
    image = glass(colour=(240, 238, 228))
    image[:60] = stained(0.3, 0.3)
    assert np.abs(light_of(image).white_point() - [241, 241, 229]).max() <= 2
    np.testing.assert_array_equal(light_of(image[:60]).white_point(), [255, 255, 255])


def test_light_of_an_image_is_that_of_its_parts() -> None:
    image = glass(colour=(240, 238, 228))
    image[30:60] = stained(0.3, 0.3)
    image[60:] = 20
    whole, parts = light_of(image), light_of(image[:10], image[10:11], image[11:])
    np.testing.assert_array_equal(parts.white_point(), whole.white_point())
    assert parts.is_dark() == whole.is_dark()


def test_dark_background() -> None:
    fluorescence = np.zeros((100, 100, 3), np.uint8)
    fluorescence[30:50, 30:60] = (30, 60, 220)
    fluorescence[55:70, 30:60] = (200, 40, 200)
    assert light_of(fluorescence).is_dark()
    black_margin = glass()
    black_margin[:, 40:] = 0  # a scanner that fills with black what it did not scan
    assert not light_of(black_margin).is_dark()
    assert not light_of(glass()).is_dark()


def test_shares_of_a_known_mask() -> None:
    mask = np.zeros((10, 20), np.bool_)
    mask[:, :5] = True
    shares = Tissue(mask, 10.0).shares(np.array([[0, 0], [40, 0], [100, 50], [150, 50]]), 50)
    np.testing.assert_allclose(shares, [1.0, 0.2, 0.0, 0.0])


def slide_of(path: Path, rgb: NDArray[np.uint8]) -> Slide:
    write_pyramid(path, rgb, 0.5)
    return Slide(path)


def test_empty_and_dark_slides_are_named(tmp_path: Path) -> None:
    with slide_of(tmp_path / "empty.tif", glass(512, 512)) as empty, pytest.raises(SlideError) as caught:
        find_tissue(empty, 100.0)
    assert caught.value.reason == "SLIDE_NO_TISSUE"
    assert "empty.tif" in str(caught.value)
    dark = np.zeros((512, 512, 3), np.uint8)
    dark[100:200, 100:200] = (20, 200, 40)
    with slide_of(tmp_path / "dark.tif", dark) as fluorescent, pytest.raises(SlideError) as caught:
        find_tissue(fluorescent, 100.0)
    assert caught.value.reason == "SLIDE_DARK_BACKGROUND"


@pytest.mark.parametrize("kept_bytes", [100, 1 << 24])  # read twice, kept in memory
def test_tissue_of_a_slide_is_that_of_its_thumbnail(
    test_data: Path, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tissue, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(reader, "SMALL_BLOCK_PX", 100)
    monkeypatch.setattr(reader, "BLOCK_PX", 100)
    with Slide(test_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        found = find_tissue(slide, 256.0)
        blocks: list[object] = []
        slide.each_block(8.0, blocks.append)
        assert len(blocks) > 1
        expected = tissue_mask(slide.thumbnail(8.0), mpp=slide.l0_per_px(8.0) * slide.mpp)
    np.testing.assert_array_equal(found.mask, expected)


@pytest.mark.parametrize("um_patch", [64.0, 112.0, 500.0, 2000.0])
@pytest.mark.parametrize(("size_px", "mpp", "levels"), [((777, 901), 0.37, 2), ((1025, 1537), 0.5, 3)])
def test_fluorescence_is_refused_whatever_the_size(
    tmp_path: Path, size_px: tuple[int, int], mpp: float, levels: int, um_patch: float
) -> None:
    """Few lit pixels: a white rim, of a thumbnail that is larger than the slide, would outnumber them."""
    dark = np.full((size_px[1], size_px[0], 3), 6, np.uint8)
    for place in range(40, min(size_px) - 20, 90):
        dark[place : place + 12, place : place + 12] = (60, 30, 230)
    write_pyramid(tmp_path / "dark.tif", dark, mpp, levels=levels)
    with Slide(tmp_path / "dark.tif") as slide, pytest.raises(SlideError) as caught:
        find_tissue(slide, um_patch)
    assert caught.value.reason == "SLIDE_DARK_BACKGROUND"


def test_what_was_not_scanned_is_no_glass(tmp_path: Path) -> None:
    """Tiles that are not in the file are transparent; a fluorescence slide may lack most of them."""
    tile = np.full((64, 64, 3), 5, np.uint8)
    tile[20:26, 20:26] = (30, 60, 220)
    with tifffile.TiffWriter(tmp_path / "sparse.tif") as writer:
        writer.write(
            (tile if index < 20 else None for index in range(64)),
            shape=(512, 512, 3),
            dtype=np.uint8,
            tile=(64, 64),
            photometric="rgb",
            compression="deflate",
            resolution=(1e4 / 2.0, 1e4 / 2.0),
            resolutionunit="CENTIMETER",
        )
    with Slide(tmp_path / "sparse.tif") as slide:
        scanned_px: list[int] = []
        slide.each_block(8.0, lambda block: scanned_px.append(int(block.scanned().sum())))
        assert sum(scanned_px) == 20 * 16 * 16
        with pytest.raises(SlideError) as caught:
            find_tissue(slide, 500.0)
    assert caught.value.reason == "SLIDE_DARK_BACKGROUND"
