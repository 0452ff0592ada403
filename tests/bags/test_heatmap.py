"""Attention against the model itself, on bags that hold the patches; the heat map against OpenSlide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoflare.bags.classifier import Answer, Attention
from histoflare.bags.heatmap import (
    FLATTEST,
    NO_PATCH,
    BagAttention,
    attention_levels,
    attention_limit,
    is_even,
    write_heat,
)
from histoflare.bags.models.mem import InputNorm
from histoflare.slides.mask_pyramid import MaskPyramid
from histoflare.slides.overlay import attention_colours
from histoflare.slides.planes import Plane
from histoflare.slides.reader import Slide

from ..mem import make_mem


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    norm=st.sampled_from(["none", "rms"]),
    blocks=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_the_figures_are_the_models_own(
    n: int, scale: float, norm: InputNorm, blocks: int, seed: int
) -> None:
    model = make_mem(
        2, features=5, memories=3, dim=16, hidden=8, blocks=blocks, input_norm=norm, seed=seed
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    bag = scale * torch.randn((n, 5), generator=generator)
    others = scale * torch.randn((4, 5), generator=generator)
    attention = BagAttention(model, bag)

    def by_the_model(features: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            found = model.attend(features[None]).attention[0].double().mean(dim=0)
        return (found * len(features)).numpy()

    assert np.allclose(attention.bag, by_the_model(bag), rtol=1e-4, atol=1e-4)
    assert attention.bag.mean() == pytest.approx(1.0)
    expected = [by_the_model(torch.cat([bag, other[None]]))[-1] for other in others]
    assert np.allclose(attention.added(others), expected, rtol=1e-4, atol=1e-4)


def test_memories_that_saturate_stay_finite() -> None:
    model = make_mem(2, features=4, memories=2, dim=1024, hidden=4).eval()
    bag = 1e4 * torch.ones((3, 4))  # scores near 1024: exp would overflow even in float64
    attention = BagAttention(model, bag)
    assert np.allclose(attention.bag, 1.0)
    assert np.allclose(attention.added(bag[:1]), 1.0)


@pytest.mark.parametrize(
    ("columns", "l0_patch_px", "repeat"),
    [(150, 1000, 16), (257, 224, 4), (257, 64, 1), (257, 65, 2), (5, 1000, 64), (5, 64, 64)],
)
def test_the_heat_map_lies_on_the_slide(tmp_path: Path, columns: int, l0_patch_px: int, repeat: int) -> None:
    l0_coords = l0_patch_px * np.array([[0, 0], [2, 1], [3, 0]])
    levels = np.array([0.0, 0.5, 1.0])
    l0_size_px = (int((columns - 0.6) * l0_patch_px), int(2.5 * l0_patch_px))
    (tmp_path / "scratch").mkdir()
    plane = Plane("bounds", (0, 0), l0_size_px)
    mpp = write_heat(tmp_path / "h.tiff", levels, l0_coords, l0_patch_px, plane, 0.5, tmp_path / "scratch")
    assert mpp == pytest.approx(l0_patch_px * 0.5 / repeat)
    expected = np.full((3, columns), NO_PATCH, np.uint8)
    expected[0, 0], expected[1, 2], expected[0, 3] = 0, 127, 254
    large = np.kron(expected, np.ones((repeat, repeat), np.uint8))
    assert np.array_equal(tifffile.imread(tmp_path / "h.tiff"), large)
    with Slide(tmp_path / "h.tiff") as slide:
        assert slide.mpp == pytest.approx(mpp)
        shown = slide.read((0, 0), slide.info.l0_size_px, mpp)
    colours = attention_colours(np.array([0.0, 0.5, 1.0]))
    for (x, y), colour in zip(l0_coords // l0_patch_px * repeat, colours, strict=True):
        assert np.abs(shown[y, x].astype(int) - colour).max() <= 1
    assert (shown[large == NO_PATCH] == 255).all()


@pytest.mark.parametrize("columns", [2, 40, 700])
def test_every_heat_map_is_a_pyramid(tmp_path: Path, columns: int) -> None:
    """OpenSlide (and with it QuPath) and tifffile find levels, each half as large as the one above."""
    side = 224
    l0_coords = side * np.array([[0, 0], [1, 1]])
    plane = Plane("bounds", (0, 0), (columns * side, 40 * side))
    write_heat(tmp_path / "h.tiff", np.array([0.0, 1.0]), l0_coords, side, plane, 0.5, tmp_path)
    with openslide.OpenSlide(tmp_path / "h.tiff") as opened, tifffile.TiffFile(tmp_path / "h.tiff") as tiff:
        assert opened.properties["openslide.vendor"] == "generic-tiff"
        sizes = list(opened.level_dimensions)
        (series,) = tiff.series
        assert [(level.shape[1], level.shape[0]) for level in series.levels] == sizes
        below = opened.read_region((0, 0), 1, (1, 1)).getpixel((0, 0))
    assert len(sizes) >= 2 and max(sizes[-1]) <= 256
    assert sizes[1:] == [(width // 2, height // 2) for width, height in sizes[:-1]]
    assert below[:3] == tuple(attention_colours(np.array([0.0]))[0])


def test_patches_off_the_grid_are_refused(tmp_path: Path) -> None:
    plane = Plane("level0", (0, 0), (640, 640))
    with pytest.raises(ValueError, match="grid"):
        write_heat(tmp_path / "h.tiff", np.ones(1), np.array([[3, 0]]), 64, plane, 0.5, tmp_path)


@pytest.mark.parametrize("l0_xy", [(256, 128), (300, 190), (-20, 7)])
@pytest.mark.parametrize("columns", [7, 257])
def test_a_heat_map_begins_where_its_plane_does(tmp_path: Path, l0_xy: tuple[int, int], columns: int) -> None:
    """Each pixel's middle lies in the patch whose value it has, wherever the plane's corner cuts the grid."""
    side = 64
    l0_coords = side * np.array([[4, 2], [5, 2], [7, 4]])
    plane = Plane("bounds", l0_xy, (side * columns - 48, 300))
    mpp = write_heat(tmp_path / "h.tiff", np.array([0.0, 0.5, 1.0]), l0_coords, side, plane, 0.5, tmp_path)
    l0_per_px = mpp / 0.5
    assert l0_per_px == (1 if columns == 7 else 64 if l0_xy == (256, 128) else 4)
    values = tifffile.imread(tmp_path / "h.tiff")
    assert values.shape[1] * l0_per_px >= side * columns - 48 and values.shape[0] * l0_per_px >= 300
    y, x = (
        (np.arange(n) + 0.5) * l0_per_px + corner for n, corner in zip(values.shape, l0_xy[::-1], strict=True)
    )
    expected = np.full(values.shape, NO_PATCH)
    for (left, top), value in zip(l0_coords, (0, 127, 254), strict=True):
        rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
        expected[np.ix_(rows, columns)] = value
    assert np.array_equal(values, expected)
    with MaskPyramid(tmp_path / "h.tiff") as opened:
        assert opened.plane == plane


def test_levels_are_symmetric_about_the_average() -> None:
    """Twice the average is as far from the middle as half of it; beyond the limit is the end."""
    levels = attention_levels(np.array([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0]), limit=4.0)
    assert levels == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_even_attention_looks_even_and_an_outlier_does_not_set_the_scale() -> None:
    assert attention_limit([]) == FLATTEST
    assert attention_limit([np.array([0.99, 1.01])]) == FLATTEST
    assert attention_limit([np.array([0.5, 2.0] * 10)]) == pytest.approx(2.0)
    assert attention_limit([np.array([0.5, 2.0] * 200), np.array([50.0])]) == pytest.approx(2.0)
    assert attention_limit([np.zeros(5)]) == 100.0
    for relative, even in (([0.9, 1.2], True), ([0.5, 2.0], False)):
        attention = Attention(np.array(relative), attention_limit([np.array(relative)]))
        answer = Answer("a", {"a": 1.0}, 9, "enc:1", attention)
        assert is_even(attention.limit) == even == bool(answer.notes)
        assert answer.to_json()["attention"]["even"] == even and not answer.warnings
