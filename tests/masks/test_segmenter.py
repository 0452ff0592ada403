"""Whole slides out: stitching, edges, tissue, resolution, interruption."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import SlidingWindowInferer
from numpy.typing import NDArray

from histoflare.errors import JobError, MaskError, SlideError
from histoflare.masks.mask_scratch import scratch_folder
from histoflare.masks.segmenter import OUTSIDE, SegmentedSlide, WindowModel, segment_slide
from histoflare.masks.slide_grid import plan_grid, read_windows
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide
from histoflare.slides.tissue import COARSEST_MASK_MPP, MASK_PX_PER_PATCH, find_tissue
from tests.bags.conftest import paint_slide
from tests.masks.window_models import ByDarkness, Slanted, block_means, darkness
from tests.refusals import raises_reason


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "s.tif"
    write_pyramid(path, paint_slide(1, (333, 270)), 0.5)
    return path


def segment(path: Path, model: WindowModel, out: Path, **options: object) -> SegmentedSlide:
    options = {"model_id": "m", **options}
    with Slide(path) as slide:
        return segment_slide(slide, model, out, **options)  # type: ignore[arg-type]


def whole(path: Path, mpp: float = 0.5) -> NDArray[np.uint8]:
    with Slide(path) as slide:
        return slide.thumbnail(mpp)


def tissue_by_pixel(path: Path, shape: tuple[int, int], l0_per_px: float) -> NDArray[np.bool_]:
    """Return which pixels of the mask overlap a pixel of tissue, one after the other."""
    with Slide(path) as slide:
        tissue = find_tissue(slide, COARSEST_MASK_MPP * MASK_PX_PER_PATCH)
    found = np.zeros(shape, bool)
    for row, column in np.argwhere(tissue.mask):
        spans = []
        for place in (row, column):
            low, high = place * tissue.l0_per_px / l0_per_px, (place + 1) * tissue.l0_per_px / l0_per_px
            spans.append(slice(int(np.floor(low + 1e-9)), int(np.ceil(high - 1e-9))))
        found[tuple(spans)] = True
    return found


@pytest.mark.parametrize("stride_px", [64, 48, 32, 20, 7])
def test_what_each_pixel_says_alone_is_kept_however_windows_overlap(
    slide_path: Path, tmp_path: Path, stride_px: int
) -> None:
    result = segment(slide_path, ByDarkness(stride_px=stride_px), tmp_path / "m.tiff")
    image = whole(slide_path)
    inside = tissue_by_pixel(slide_path, image.shape[:2], 1.0)
    expected = np.where(inside, darkness(image.astype(float).mean(axis=2)).argmax(axis=0), OUTSIDE)
    mask = tifffile.imread(tmp_path / "m.tiff")
    assert np.array_equal(mask, expected)
    assert result.size_px == (333, 270)
    assert result.tissue_px == tuple(int((expected == index).sum()) for index in range(3))
    assert sum(result.share(index) for index in range(3)) == pytest.approx(1.0)
    assert result.area_mm2(1) == pytest.approx((expected == 1).sum() * 0.25e-6)
    assert not scratch_folder(tmp_path / "m.tiff").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "m.tiff"]


def test_windows_are_blended_as_monai_does(slide_path: Path, tmp_path: Path) -> None:
    model = Slanted(stride_px=32)
    segment(slide_path, model, tmp_path / "m.tiff", batch=3)
    image = whole(slide_path)

    def ask(windows: torch.Tensor) -> torch.Tensor:
        pixels = windows.permute(0, 2, 3, 1).numpy().astype(np.uint8)
        return torch.from_numpy(model.probabilities(pixels))

    inferer = SlidingWindowInferer((64, 64), sw_batch_size=4, overlap=0.5, mode="gaussian")
    blended = inferer(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float(), ask)
    assert isinstance(blended, torch.Tensor)
    top = blended[0].topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4).numpy()  # roundings decide the others
    inside = tissue_by_pixel(slide_path, image.shape[:2], 1.0)
    mask = tifffile.imread(tmp_path / "m.tiff")
    assert clear[inside].mean() > 0.99
    assert np.array_equal(mask[inside & clear], blended[0].argmax(dim=0).numpy()[inside & clear])
    segment(slide_path, model, tmp_path / "even.tiff", blend="constant")
    assert not np.array_equal(mask, tifffile.imread(tmp_path / "even.tiff"))  # the weights do count


def test_a_coarser_mask_lies_where_the_slide_does(slide_path: Path, tmp_path: Path) -> None:
    result = segment(slide_path, ByDarkness(window_px=96, stride_px=48, patch_px=32), tmp_path / "m.tiff")
    assert (result.size_px, result.mpp) == ((111, 90), pytest.approx(1.5))
    padded = np.full((288, 351, 3), 255, np.uint8)
    padded[:270, :333] = whole(slide_path)
    means = padded[:270, :333].astype(float).mean(axis=2).reshape(90, 3, 111, 3).mean(axis=(1, 3))
    inside = tissue_by_pixel(slide_path, (90, 111), 3.0)
    expected = np.where(inside, darkness(means).argmax(axis=0), OUTSIDE)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tiff"), expected)
    with openslide.OpenSlide(tmp_path / "m.tiff") as opened:
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(1.5)


@pytest.mark.parametrize(("slide_mpp", "expected"), [(0.25, 0.5), (0.499, 0.499), (0.31, 0.5)])
def test_slides_of_other_resolutions(tmp_path: Path, slide_mpp: float, expected: float) -> None:
    """The mask's mpp and size together are the slide's extent, also where the reader resamples."""
    write_pyramid(tmp_path / "s.tif", paint_slide(2, (400, 300)), slide_mpp)
    model = ByDarkness()
    result = segment(tmp_path / "s.tif", model, tmp_path / "m.tiff")
    assert result.mpp == pytest.approx(expected)
    assert abs(result.size_px[0] * result.mpp - 400 * slide_mpp) < result.mpp
    assert {shape[1:] for shape in model.shapes} == {(64, 64, 3)}
    mask = tifffile.imread(tmp_path / "m.tiff")
    image = whole(tmp_path / "s.tif")
    near = darkness(image.astype(float).mean(axis=2)).argmax(axis=0)
    inside = mask != OUTSIDE
    assert inside.mean() > 0.5
    assert (mask[inside] == near[inside]).mean() > 0.97  # resampled in windows and whole: roundings differ


def test_a_slide_coarser_than_the_model_is_refused(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tif", paint_slide(2, (300, 300)), 2.0)
    with pytest.raises(SlideError) as caught:
        segment(tmp_path / "s.tif", ByDarkness(), tmp_path / "m.tiff")
    assert caught.value.reason == "SLIDE_TOO_COARSE"
    assert {path.name for path in tmp_path.iterdir()} == {"s.tif"}


@pytest.mark.parametrize("size", [(40, 50), (40, 200), (200, 40)])
def test_slides_smaller_than_a_window(tmp_path: Path, size: tuple[int, int]) -> None:
    rgb = np.full((size[1], size[0], 3), (200, 120, 180), np.uint8)
    write_pyramid(tmp_path / "s.tif", rgb, 8.0)
    model = ByDarkness(mpp=8.0)
    segment(tmp_path / "s.tif", model, tmp_path / "m.tiff")
    image = whole(tmp_path / "s.tif", 8.0)
    expected = darkness(image.astype(float).mean(axis=2)).argmax(axis=0)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tiff"), expected)


def test_beyond_the_slide_is_white(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tif", np.full((40, 50, 3), (200, 120, 180), np.uint8), 8.0)
    with Slide(tmp_path / "s.tif") as slide:
        grid = plan_grid(slide, window_px=64, stride_px=32, patch_px=64, mpp=8.0)
        (window,) = read_windows(slide, grid, 0, np.array([0]))
    assert (grid.xs, grid.ys, grid.size_px) == ((0,), (0,), (50, 40))
    assert (window[40:] == 255).all()
    assert (window[:, 50:] == 255).all()
    assert window[:40, :50].max() < 230


def test_the_background_class_is_what_lies_outside(slide_path: Path, tmp_path: Path) -> None:
    plain = segment(slide_path, ByDarkness(), tmp_path / "a.tiff")
    filled = segment(slide_path, ByDarkness(background="light"), tmp_path / "b.tiff")
    assert (plain.outside, filled.outside) == (OUTSIDE, 0)
    first, second = (tifffile.imread(tmp_path / name) for name in ("a.tiff", "b.tiff"))
    assert np.array_equal(np.where(first == OUTSIDE, 0, first), second)
    assert plain.tissue_px == filled.tissue_px


def test_only_windows_with_tissue_are_asked(tmp_path: Path) -> None:
    rgb = np.full((1024, 1024, 3), 245, np.uint8)
    rgb[400:500, 600:760] = (200, 120, 180)
    write_pyramid(tmp_path / "s.tif", rgb, 0.5)
    model = ByDarkness(stride_px=64)
    seen: list[tuple[int, int]] = []
    result = segment(
        tmp_path / "s.tif", model, tmp_path / "m.tiff", on_progress=lambda *each: seen.append(each)
    )
    asked = sum(shape[0] for shape in model.shapes)
    assert result.windows == asked == seen[-1][0] == seen[-1][1]
    assert result.grid_windows == 16 * 16
    assert 2 * 3 <= asked <= 4 * 5  # the windows that the rectangle reaches, and what JPEG spread
    mask = tifffile.imread(tmp_path / "m.tiff")
    assert (mask[410:490, 610:750] == 1).all()
    assert (mask[:384] == OUTSIDE).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_cover_every_pixel(data: st.DataObject, slide_path: Path) -> None:
    window_px = data.draw(st.integers(1, 400))
    stride_px = data.draw(st.integers(1, window_px))
    patch_px = data.draw(st.integers(max(1, window_px // 16), window_px))
    with Slide(slide_path) as slide:
        grid = plan_grid(slide, window_px=window_px, stride_px=stride_px, patch_px=patch_px, mpp=0.5)
    for offsets, length in ((grid.xs, grid.size_px[0]), (grid.ys, grid.size_px[1])):
        assert offsets[0] == 0
        assert offsets[-1] + patch_px >= length
        assert all(0 < b - a <= patch_px for a, b in itertools.pairwise(offsets))
        assert len(offsets) == 1 or offsets[-1] + patch_px == length
        # no further apart than wanted, unless that is less than a pixel of the mask
        wanted = max(1.0, stride_px * patch_px / window_px)
        assert all(b - a <= wanted for a, b in itertools.pairwise(offsets))


def test_windows_read_together_are_the_windows_read_alone(slide_path: Path) -> None:
    with Slide(slide_path) as slide:
        grid = plan_grid(slide, window_px=64, stride_px=24, patch_px=64, mpp=0.5)
        columns = np.array([0, 1, 2, 5, 6, len(grid.xs) - 2, len(grid.xs) - 1])
        windows = read_windows(slide, grid, 2, columns)
        for column, window in zip(columns, windows, strict=True):
            alone = slide.read((grid.xs[column], grid.ys[2]), (64, 64), 0.5)
            assert np.array_equal(window, alone)


def test_batches_and_threads_change_nothing(slide_path: Path, tmp_path: Path) -> None:
    for name, options in {"a": {"batch": 1}, "b": {"batch": 5, "threads": 3}}.items():
        segment(slide_path, Slanted(), tmp_path / f"{name}.tiff", **options)
    assert (tmp_path / "a.tiff").read_bytes() == (tmp_path / "b.tiff").read_bytes()


def test_numbers_that_are_none_are_refused_and_the_run_can_go_on(slide_path: Path, tmp_path: Path) -> None:
    class Diverged(ByDarkness):
        def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
            found = super().probabilities(windows)
            if len(self.shapes) > 3:
                found[0, 0, 0, 0] = np.nan
            return found

    with pytest.raises(JobError) as caught:
        segment(slide_path, Diverged(), tmp_path / "m.tiff")
    assert caught.value.reason == "NOT_FINITE"
    assert not (tmp_path / "m.tiff").exists()
    result = segment(slide_path, ByDarkness(), tmp_path / "m.tiff")
    assert 0 < result.windows_before < result.windows
    segment(slide_path, ByDarkness(), tmp_path / "fresh.tiff")
    assert (tmp_path / "m.tiff").read_bytes() == (tmp_path / "fresh.tiff").read_bytes()


def fail(_: SegmentedSlide) -> None:
    raise OSError("disk full")


def test_what_comes_after_the_mask_can_fail_without_losing_it(slide_path: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        segment(slide_path, ByDarkness(), tmp_path / "m.tiff", also=[fail])
    model = ByDarkness()
    result = segment(slide_path, model, tmp_path / "m.tiff")
    assert model.shapes == []  # nothing was asked again
    assert result.windows_before == result.windows > 0


def test_an_unfinished_mask_of_something_else_is_not_continued(slide_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.tiff"
    with pytest.raises(OSError, match="disk full"):
        segment(slide_path, ByDarkness(), out, also=[fail])
    for model, options in (
        (ByDarkness(), {"model_id": "other"}),
        (ByDarkness(stride_px=16), {}),
        (ByDarkness(), {"blend": "constant"}),
    ):
        with raises_reason("SEGMENTATION_CHANGED", "--again"):
            segment(slide_path, model, out, **options)
    model = ByDarkness(stride_px=16)
    assert segment(slide_path, model, out, again=True).windows_before == 0


KILLED = """
import sys, time
from pathlib import Path
from histoflare.masks.segmenter import segment_slide
from histoflare.slides.reader import Slide
from tests.masks.window_models import Slanted

class Slow(Slanted):
    def probabilities(self, windows):
        time.sleep(0.05)
        return super().probabilities(windows)

with Slide(Path(sys.argv[1])) as slide:
    segment_slide(slide, Slow(), Path(sys.argv[2]), model_id="m", batch=4)
"""


@pytest.mark.slow
def test_after_sigkill_the_same_call_goes_on_to_the_same_bytes(
    slide_path: Path, tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "m.tiff"
    folder = scratch_folder(out)
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(slide_path), str(out)], cwd=repository, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "row-000002.cells").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(MaskError) as caught:  # it is still at it
            segment(slide_path, Slanted(), out)
        assert caught.value.reason == "SEGMENTATION_BUSY"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    model = Slanted()
    result = segment(slide_path, model, out, batch=4)
    asked = sum(shape[0] for shape in model.shapes)
    assert 0 < asked < result.windows
    assert asked + result.windows_before == result.windows
    segment(slide_path, Slanted(), tmp_path / "fresh.tiff", batch=4)
    assert out.read_bytes() == (tmp_path / "fresh.tiff").read_bytes()
    assert not folder.exists()


def test_a_real_slide(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "wsi" / "CMU-1-Small-Region.svs"
    model = ByDarkness(window_px=448, stride_px=224, patch_px=112)
    result = segment(path, model, tmp_path / "m.tiff")
    assert result.mpp == pytest.approx(0.499 * 4)
    assert result.size_px == (555, 742)
    image = whole(path)[: 741 * 4, : 555 * 4]
    means = image.astype(float).mean(axis=2).reshape(741, 4, 555, 4).mean(axis=(1, 3))
    mask = tifffile.imread(tmp_path / "m.tiff")[:741]
    inside = mask != OUTSIDE
    assert np.array_equal(mask[inside], darkness(means).argmax(axis=0)[inside])
    assert inside.mean() > 0.3


def test_block_means_are_means() -> None:
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert block_means(rgb, 2)[0, 0] == rgb[:2, :2].astype(float).mean()
    assert replace(ByDarkness(), patch_px=2).patch_px == 2
