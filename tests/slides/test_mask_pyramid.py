"""Masks as pyramids against raw OpenSlide and tifffile's own decoder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from histoflare.errors import SlideError
from histoflare.slides.mask_pyramid import MaskPyramid, halve_classes, write_mask_pyramid
from histoflare.slides.planes import Plane
from histoflare.slides.reader import Slide


def write(path: Path, values: NDArray[np.uint8], mpp: float = 2.0, **options: object) -> None:
    """Write an array that is in memory."""
    height, width = values.shape
    scratch = path.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    write_mask_pyramid(
        path,
        lambda x, y, w, h: values[y : y + h, x : x + w],
        (width, height),
        mpp,
        plane=Plane("bounds", (3, 4), (width, height)),
        scratch=scratch,
        **options,  # type: ignore[arg-type]
    )
    assert list(scratch.iterdir()) == []  # nothing is left there


def random_mask(width: int, height: int, classes: int = 4) -> NDArray[np.uint8]:
    values = np.random.default_rng(width).integers(0, classes, (height, width), dtype=np.uint8)
    values[: height // 3] = 255
    return values


def mode_by_counting(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = values.shape[0] // 2, values.shape[1] // 2
    found = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            block = values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel().tolist()
            found[y, x] = Counter(block).most_common(1)[0][0]  # ties: the first met
    return found


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_half_is_the_most_frequent_of_four(values: NDArray[np.uint8]) -> None:
    assert np.array_equal(halve_classes(values), mode_by_counting(values))


@pytest.mark.parametrize("size", [(700, 600), (513, 511), (256, 256), (5, 3), (1, 900), (1030, 257)])
def test_openslide_gives_the_classes_back(tmp_path: Path, size: tuple[int, int]) -> None:
    values = random_mask(*size)
    write(tmp_path / "m.tiff", values, mpp=2.232)
    expected = values
    with openslide.OpenSlide(tmp_path / "m.tiff") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(2.232, rel=1e-6)
        for level, level_size in enumerate(slide.level_dimensions):
            shown = np.asarray(slide.read_region((0, 0), level, level_size))
            for channel in range(3):
                assert np.array_equal(shown[..., channel], expected)
            assert (shown[..., 3] == 255).all()
            expected = mode_by_counting(expected)
    assert expected.size == 0 or max(expected.shape) < 256


def test_tifffile_and_the_own_reader_agree(tmp_path: Path) -> None:
    values = random_mask(900, 700)
    write(tmp_path / "m.tiff", values)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tiff"), values)
    with MaskPyramid(tmp_path / "m.tiff") as mask:
        assert mask.sizes_px == [(900, 700), (450, 350), (225, 175)]
        assert mask.mpp == pytest.approx(2.0)
        assert mask.plane == Plane("bounds", (3, 4), (900, 700))
        assert np.array_equal(mask.read(0, 250, 130, 300, 400), values[130:530, 250:550])
        level = tifffile.imread(tmp_path / "m.tiff", series=0, level=1)
        assert np.array_equal(mask.read(1, 0, 0, 450, 350), level)


def test_a_palette_keeps_the_values_and_shows_colours(tmp_path: Path) -> None:
    values = random_mask(400, 300)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    write(tmp_path / "m.tiff", values, colours=colours)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tiff"), values)
    with Slide(tmp_path / "m.tiff") as slide:
        assert np.array_equal(slide.read((0, 0), (400, 300), 2.0), colours[values])


def test_same_values_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tiff", "b.tiff"):
        write(tmp_path / name, random_mask(600, 400))
    assert (tmp_path / "a.tiff").read_bytes() == (tmp_path / "b.tiff").read_bytes()


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), 500.0])
def test_a_resolution_no_slide_has_is_refused(tmp_path: Path, mpp: float) -> None:
    with pytest.raises(SlideError) as caught:
        write(tmp_path / "m.tiff", random_mask(30, 30), mpp)
    assert caught.value.reason == "SLIDE_MPP_INVALID"
    assert not (tmp_path / "m.tiff").exists()


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    (tmp_path / "text.tiff").write_text("no image")
    tifffile.imwrite(tmp_path / "rgb.tiff", np.zeros((300, 300, 3), np.uint8), resolution=(1, 1))
    bytes_only = {"tile": (256, 256), "compression": "adobe_deflate", "resolution": (1, 1)}
    tifffile.imwrite(tmp_path / "no-plane.tiff", np.zeros((300, 300), np.uint8), metadata=None, **bytes_only)
    for name in ("text.tiff", "rgb.tiff", "none.tiff", "no-plane.tiff"):
        with pytest.raises(SlideError) as caught:
            MaskPyramid(tmp_path / name)
        assert caught.value.reason == "SLIDE_UNSUPPORTED"
