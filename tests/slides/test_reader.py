"""The reader, held to raw OpenSlide and to pictures whose pixels are known."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoflare.errors import SlideError
from histoflare.slides.reader import Slide, fingerprint, slide_files
from tests.refusals import raises_reason

MALFORMED = (
    ("broken.svs", "SLIDE_UNSUPPORTED"),
    ("ez_test.dcm", "SLIDE_OPEN_FAILED"),
    ("sm_image_jpegls.dcm", "SLIDE_OPEN_FAILED"),
    ("small_dicom.dcm", "SLIDE_OPEN_FAILED"),
    ("smalltif.tif", "SLIDE_UNSUPPORTED"),
    ("unopenable.tiff", "SLIDE_OPEN_FAILED"),
    ("unreadable.svs", "SLIDE_READ_FAILED"),
)


def write_tiff(path: Path, levels: list[NDArray[np.uint8]], mpp: float | None) -> Path:
    """Write a lossless tiled pyramid, independent of the package's own writer."""
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate(levels):
            tags = {} if mpp is None else {"resolutionunit": "CENTIMETER"}
            per_cm = None if mpp is None else 1e4 / (mpp * levels[0].shape[1] / level.shape[1])
            writer.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(number > 0),
                resolution=None if per_cm is None else (per_cm, per_cm),
                **tags,
            )
    return path


@pytest.fixture(scope="module")
def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)


@pytest.fixture
def noise_slide(noise: NDArray[np.uint8], tmp_path: Path) -> Path:
    """Level 0 is noise at 0.25 µm/px; level 1 (1.0 µm/px) is uniform grey, to see which was read."""
    grey = np.full((64, 96, 3), 128, np.uint8)
    return write_tiff(tmp_path / "noise.tif", [noise, grey], 0.25)


@pytest.fixture
def cmu(test_data: Path) -> Path:
    return test_data / "wsi" / "CMU-1-Small-Region.svs"


def raw_rgb(path: Path, l0_xy: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The oracle: OpenSlide itself, composited on white by the textbook formula."""
    with openslide.OpenSlide(path) as raw:
        rgba = np.asarray(raw.read_region(l0_xy, level, size)).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("l0_xy", [(0, 0), (700, 1301), (2100, 2900), (-30, -40), (5000, 5000)])
def test_pixels_are_openslides(cmu: Path, l0_xy: tuple[int, int]) -> None:
    with Slide(cmu) as slide:
        pixels = slide.read(l0_xy, (200, 150), 0.5)
    assert pixels.shape == (150, 200, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, raw_rgb(cmu, l0_xy, 0, (200, 150)))


def test_outside_is_white(noise_slide: Path, noise: NDArray[np.uint8]) -> None:
    with Slide(noise_slide) as slide:
        pixels = slide.read((-10, -20), (40, 50), 0.25)
    assert (pixels[:20] == 255).all()
    assert (pixels[:, :10] == 255).all()
    np.testing.assert_array_equal(pixels[20:, 10:], noise[:30, :30])


def test_whole_multiple_is_the_mean_of_the_pixels(noise_slide: Path, noise: NDArray[np.uint8]) -> None:
    with Slide(noise_slide) as slide:
        pixels = slide.read((32, 16), (50, 40), 0.5)
    wanted = noise[16:96, 32:132].reshape(40, 2, 50, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels - wanted).max() <= 0.5


def test_level_is_chosen_by_mpp(noise_slide: Path) -> None:
    with Slide(noise_slide) as slide:
        assert (slide.read((0, 0), (20, 20), 1.0) == 128).all()
        assert (slide.read((0, 0), (10, 10), 2.0) == 128).all()
        assert slide.read((0, 0), (20, 20), 0.9).std() > 0  # level 1 would be too coarse
        assert slide.l0_per_px(1.0) == 4.0
        assert slide.l0_per_px(0.9) == pytest.approx(3.6)


def test_given_mpp_decides_the_level(noise_slide: Path) -> None:
    with Slide(noise_slide, mpp=0.5) as slide:
        assert slide.info.mpp_source == "given"
        assert (slide.read((0, 0), (20, 20), 2.0) == 128).all()
        assert slide.read((0, 0), (20, 20), 1.0).std() > 0


def test_fractional_scale_keeps_the_geometry(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 512)[None, :, None], 64, axis=0)
    picture = np.repeat(ramp, 3, axis=2).round().astype(np.uint8)
    with Slide(write_tiff(tmp_path / "ramp.tif", [picture], 0.4)) as slide:
        pixels = slide.read((100, 10), (80, 20), 0.5)  # 1.25 level-0 px each
    centres = 100 + (np.arange(80) + 0.5) * 1.25 - 0.5
    assert np.abs(pixels[10, 2:-2, 0] - centres[2:-2] * 255 / 511).max() <= 1.0


def test_transparent_parts_are_white(test_data: Path) -> None:
    """The last level of boxes.tiff is 37 x 31: more is asked for, the rest is transparent."""
    path = test_data / "wsi" / "openslide_python_fixtures" / "boxes.tiff"
    with Slide(path, mpp=0.5) as slide:
        for level, each in enumerate(slide.info.levels):
            pixels = slide.read((0, 0), (40, 40), 0.5 * each.downsample)
            np.testing.assert_array_equal(pixels, raw_rgb(path, (0, 0), level, (40, 40)))


def test_thumbnail_covers_the_slide(noise_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Slide(noise_slide) as slide:
        whole = slide.thumbnail(0.5)
        assert whole.shape == (128, 192, 3)
        monkeypatch.setattr("histoflare.slides.reader.BLOCK_PX", 100)
        np.testing.assert_array_equal(slide.thumbnail(0.5), whole)
        assert slide.thumbnail(0.01).shape == (256, 384, 3)  # never finer than the slide


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.65, 1.0, 1.3, 2.0, 7.0])
@pytest.mark.parametrize("size_px", [(383, 255), (386, 257), (200, 130)])
def test_no_pixel_of_a_thumbnail_lies_outside(tmp_path: Path, size_px: tuple[int, int], mpp: float) -> None:
    """Sizes that the levels' factors do not divide: what is partly outside shows the slide, not white."""
    black = np.zeros((size_px[1], size_px[0], 3), np.uint8)
    with Slide(write_tiff(tmp_path / "black.tif", [black, black[3::4, 3::4]], 0.25)) as slide:
        thumbnail = slide.thumbnail(mpp)
        assert not thumbnail.any()
        for length, side in zip(thumbnail.shape[1::-1], size_px, strict=True):
            assert abs(length * slide.l0_per_px(mpp) - side) <= slide.l0_per_px(mpp) + 4


@pytest.mark.parametrize("mpp", [0.5, 0.65])
def test_a_pixel_partly_outside_shows_what_lies_inside(tmp_path: Path, mpp: float) -> None:
    black = np.zeros((101, 101, 3), np.uint8)
    with Slide(write_tiff(tmp_path / "black.tif", [black], 0.25)) as slide:
        step = slide.l0_per_px(mpp)
        pixels = slide.read((-3, -3), (60, 60), mpp)
    first, last = math.floor(3 / step), math.ceil(104 / step)
    assert not pixels[first:last, first:last][2:-2, 2:-2].any()
    if mpp == 0.5:  # exact averages: no neighbour's light
        assert not pixels[first:last, first:last].any()
    for outside in (pixels[: first - 1], pixels[last + 1 :], pixels[:, last + 1 :]):
        assert (outside == 255).all()


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.65, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size_px", [(384, 256), (387, 259)])
@pytest.mark.parametrize("step_px", [32, 35])
def test_each_of_many_is_what_it_is_alone(
    tmp_path: Path, noise: NDArray[np.uint8], size_px: tuple[int, int], mpp: float, step_px: int
) -> None:
    """Levels that fit (factor 4) and do not (4.02), corners on and between their pixels, and the edges."""
    picture = np.pad(noise, ((0, size_px[1] - 256), (0, size_px[0] - 384), (0, 0)), mode="reflect")
    with Slide(write_tiff(tmp_path / "many.tif", [picture, picture[3::4, 3::4]], 0.25)) as slide:
        corners = [(x, y) for y in range(0, size_px[1], step_px) for x in range(0, size_px[0], step_px)]
        together = list(slide.read_each(corners[2:], (9, 8), mpp))
        for corner, pixels in zip(corners[2:], together, strict=True):
            np.testing.assert_array_equal(pixels, slide.read(corner, (9, 8), mpp))


def test_threads_read_the_same(cmu: Path) -> None:
    corners = [(x, y) for x in range(0, 2200, 150) for y in range(0, 2900, 300)]
    with Slide(cmu) as slide, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda xy: slide.read(xy, (64, 64), 0.5), corners))
        alone = [slide.read(xy, (64, 64), 0.5) for xy in corners]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_real_slide_opens(test_data: Path) -> None:
    wsi = test_data / "wsi"
    expected = {
        wsi / "CMU-1-Small-Region.svs": ("aperio", (2220, 2967), 0.499),
        wsi / "dicom" / "camelyon_lymph_node": ("dicom", (1152, 700), 28.9685),
        wsi / "dicom" / "highdicom_sm" / "sm_image_control.dcm": ("dicom", (50, 50), 0.499),
        wsi / "openslide_python_fixtures" / "boxes.tiff": ("generic-tiff", (300, 250), None),
        wsi / "openslide_python_fixtures" / "small.svs": ("aperio", (16, 16), 0.499),
        wsi / "openslide_python_fixtures" / "boxes_1.dcm": ("dicom", (16, 16), 0.499),
    }
    for path, (vendor, size, mpp) in expected.items():
        with Slide(path) as slide:
            slide.probe()
            assert (slide.info.vendor, slide.info.l0_size_px) == (vendor, size)
            assert slide.info.mpp == (None if mpp is None else pytest.approx(mpp))


def test_missing_mpp_names_slide_and_remedy(test_data: Path) -> None:
    path = test_data / "wsi" / "openslide_python_fixtures" / "boxes.tiff"
    with Slide(path) as slide, pytest.raises(SlideError) as caught:
        slide.read((0, 0), (10, 10), 0.5)
    assert caught.value.reason == "SLIDE_MPP_MISSING"
    for word in (str(path), "manifest", "--mpp", "352.8"):
        assert word in str(caught.value)


def test_label_and_macro_are_never_opened(cmu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with openslide.OpenSlide(cmu) as raw:
        assert {"label", "macro"} <= set(raw.associated_images)

    def refuse(*_: object) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", refuse)
    with Slide(cmu) as slide:
        slide.probe()
        slide.thumbnail(8.0)
        assert "Label" not in str(slide.info.to_json())


def test_malformed_folder_is_the_expected_one(test_data: Path) -> None:
    files = {file.name for file in (test_data / "wsi_malformed").iterdir()} - {"README.txt"}
    assert files == {name for name, _ in MALFORMED}


@pytest.mark.parametrize(("name", "reason"), MALFORMED)
def test_malformed_gives_one_clear_error(test_data: Path, name: str, reason: str) -> None:
    path = test_data / "wsi_malformed" / name
    with pytest.raises(SlideError) as caught, Slide(path) as slide:
        slide.probe()
    assert caught.value.reason == reason
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dead_handle_goes_on_to_say_so(test_data: Path) -> None:
    with Slide(test_data / "wsi_malformed" / "unreadable.svs") as slide:
        for _ in range(2):
            with raises_reason("SLIDE_READ_FAILED", "Bogus marker length"):
                slide.read((0, 0), (16, 16), 0.5)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf"), 1e5])
def test_given_mpp_must_be_one(cmu: Path, mpp: float) -> None:
    with pytest.raises(SlideError) as caught:
        Slide(cmu, mpp=mpp)
    assert caught.value.reason == "SLIDE_MPP_INVALID"


def test_missing_file(tmp_path: Path) -> None:
    for act in (Slide, fingerprint, slide_files):
        with pytest.raises(SlideError) as caught:
            act(tmp_path / "none.svs")
        assert caught.value.reason == "SLIDE_MISSING"


def test_picture_is_no_slide(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "picture.png")
    with pytest.raises(SlideError) as caught:
        Slide(tmp_path / "picture.png")
    assert caught.value.reason == "SLIDE_UNSUPPORTED"


def test_closing_waits_for_the_reads_that_have_begun(noise_slide: Path) -> None:
    """OpenSlide ends the whole process if a slide is closed under a reader, as after Ctrl-C."""
    slide = Slide(noise_slide)
    handle, begun, order = slide._handle, threading.Event(), []

    def read_slowly(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        image = handle.read_region(*arguments)
        order.append("read")
        return image

    def close() -> None:
        order.append("closed")
        handle.close()

    slide._handle = SimpleNamespace(read_region=read_slowly, close=close)
    reader = threading.Thread(target=slide.read, args=((0, 0), (8, 8), 0.25))
    reader.start()
    assert begun.wait(5)
    slide.close()
    reader.join()
    assert order == ["read", "closed"]
    with raises_reason("SLIDE_READ_FAILED"):
        slide.read((0, 0), (8, 8), 0.25)
    with raises_reason("SLIDE_READ_FAILED"):
        slide.drop_cache()
