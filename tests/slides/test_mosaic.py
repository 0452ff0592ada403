"""The mosaic, on slides whose tissue and colours are known, and on a real one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from histoflare.errors import SlideError
from histoflare.slides import colours as colours_module
from histoflare.slides import reader
from histoflare.slides.colours import GridColours
from histoflare.slides.mosaic import Mosaic, MosaicParameters, build_mosaic
from histoflare.slides.pyramid import write_pyramid
from histoflare.slides.reader import Slide

PATCH_PX = 64
VIOLET, PINK, PALE = (110, 60, 150), (225, 120, 170), (240, 190, 215)


def checkered(columns: int, rows: int, colours: list[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Return an image of patches, each of one colour, going through ``colours`` row by row; a white rim."""
    image = np.full((rows * PATCH_PX + 40, columns * PATCH_PX + 40, 3), 245, np.uint8)
    for index in range(columns * rows):
        y, x = index // columns * PATCH_PX, index % columns * PATCH_PX
        image[y : y + PATCH_PX, x : x + PATCH_PX] = colours[index % len(colours)]
    return image


@pytest.fixture(scope="module")
def three_colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 patches: 20 violet, 20 pink, 20 pale, in columns; white at the right and lower edge."""
    path = tmp_path_factory.mktemp("slides") / "three.tif"
    write_pyramid(path, checkered(12, 5, [VIOLET, PINK, PALE]), 0.5, jpeg_quality=95)
    return path


def parameters(**changes: object) -> MosaicParameters:
    return MosaicParameters(**{"patch_px": PATCH_PX, "clusters": 3, **changes})  # type: ignore[arg-type]


def test_defaults_are_the_papers() -> None:
    default = MosaicParameters()
    assert (default.patch_px, default.mpp, default.cluster_mpp) == (1000, 0.5, 2.0)  # 1000² at 20x, 5x
    assert (default.tissue_fraction, default.clusters, default.fraction) == (0.7, 9, 0.10)
    assert default.selection == "random"


def test_grid_clusters_and_counts(three_colours: Path) -> None:
    with Slide(three_colours) as slide:
        mosaic = build_mosaic(slide, parameters())
    assert mosaic.l0_patch_px == PATCH_PX
    corners = [(patch.l0_x_px, patch.l0_y_px) for patch in mosaic.candidates]
    assert corners == [(x * PATCH_PX, y * PATCH_PX) for y in range(5) for x in range(12)]
    for index, patch in enumerate(mosaic.candidates):
        assert patch.cluster == index % 3  # numbered from dark to light: violet, pink, pale
        assert patch.tissue == 1.0
    assert Counter(patch.cluster for patch in mosaic.patches) == {0: 2, 1: 2, 2: 2}  # ⌊20 · 0.1⌋ of each
    assert list(mosaic.chosen) == sorted(set(mosaic.chosen))


@pytest.mark.parametrize(
    ("fraction", "each"), [(0.01, 1), (0.05, 1), (0.15, 3), (0.29, 5), (0.35, 7), (1.0, 20)]
)
@pytest.mark.parametrize("selection", ["random", "spatial"])
def test_share_of_each_cluster(three_colours: Path, fraction: float, each: int, selection: str) -> None:
    with Slide(three_colours) as slide:
        mosaic = build_mosaic(slide, parameters(fraction=fraction, selection=selection))
    assert Counter(patch.cluster for patch in mosaic.patches) == {0: each, 1: each, 2: each}


def test_seed_decides(three_colours: Path) -> None:
    with Slide(three_colours) as slide:
        first, again, threaded, other = (
            build_mosaic(slide, parameters(seed=seed), threads)
            for seed, threads in ((1, 1), (1, 1), (1, 4), (2, 1))
        )
    assert first == again == threaded
    assert first.candidates == other.candidates
    assert first.chosen != other.chosen


@pytest.mark.parametrize("rim", [0, 37])
@pytest.mark.parametrize("mpp", [0.25, 0.26, 0.5])
def test_blocks_of_patches_give_the_mosaic_of_patches_read_one_by_one(
    tmp_path: Path, mpp: float, rim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On slides whose levels fit the patches and on others, with patches at the edge; the same JSON."""
    generator = np.random.default_rng(0)
    image = checkered(9, 7, [VIOLET, PINK, PALE])[: 7 * PATCH_PX + rim, : 9 * PATCH_PX + rim]
    noisy = np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    write_pyramid(tmp_path / "a.tif", noisy, mpp)
    wanted = parameters(patch_px=round(PATCH_PX * mpp / 0.5))
    with Slide(tmp_path / "a.tif") as slide:
        found = [build_mosaic(slide, wanted)]
        found.append(build_mosaic(slide, wanted, threads=3))
        monkeypatch.setattr(GridColours, "add", lambda grid, block: None)
        found.append(build_mosaic(slide, wanted))
        monkeypatch.setattr(colours_module, "BLOCK_PX", 40)
        found.append(build_mosaic(slide, wanted, threads=3))
        monkeypatch.setattr(
            slide, "read_each", lambda corners, *rest: (slide.read(corner, *rest) for corner in corners)
        )
        alone = build_mosaic(slide, wanted)
    assert len(alone.candidates) == 63
    for mosaic in found:
        assert json.dumps(mosaic.to_json()) == json.dumps(alone.to_json())


def test_colours_summed_up_are_those_of_patches_read_one_by_one(tmp_path: Path) -> None:
    """To the last bit, with blocks that cut the patches, and averages of 2 x 2 pixels of the level."""
    noise = np.random.default_rng(1).integers(0, 256, (7 * 60 + 9, 9 * 60 + 30, 3)).astype(np.uint8)
    write_pyramid(tmp_path / "a.tif", noise, 1.0, levels=1)
    with Slide(tmp_path / "a.tif") as slide:
        grid = GridColours(slide, 60, 2.0)
        assert not grid.complete
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "SMALL_BLOCK_PX", 100)
            slide.each_block(2.0, grid.add, threads=2)
        assert grid.complete
        corners = [(60 * x, 60 * y) for y in range(7) for x in range(9)]
        alone = [slide.read(each, (30, 30), 2.0).reshape(-1, 3).mean(axis=0) for each in corners]
    np.testing.assert_array_equal(grid.means(np.array(corners)), np.array(alone))


def test_spatial_is_spread_out(three_colours: Path) -> None:
    """Two of a cluster: one in each half of the slide, near the middle of it."""
    with Slide(three_colours) as slide:
        mosaic = build_mosaic(slide, parameters(selection="spatial", fraction=0.1))
    for cluster in range(3):
        columns = sorted(patch.l0_x_px // PATCH_PX for patch in mosaic.patches if patch.cluster == cluster)
        assert columns[0] < 6 <= columns[1]


def test_fewer_colours_than_clusters(three_colours: Path) -> None:
    with Slide(three_colours) as slide:
        mosaic = build_mosaic(slide, parameters(clusters=9, max_patches=4))
    assert len(mosaic.chosen) == 4
    assert {patch.cluster for patch in mosaic.candidates} <= set(range(9))


def test_one_patch_is_a_mosaic(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "one.tif", checkered(1, 1, [VIOLET]), 0.5)
    with Slide(tmp_path / "one.tif") as slide:
        mosaic = build_mosaic(slide, parameters())
    assert mosaic.chosen == (0,)


def test_tissue_threshold(tmp_path: Path) -> None:
    """Patches of which the first is full, the second six tenths and the third four tenths tissue."""
    image = np.full((PATCH_PX * 2, PATCH_PX * 4, 3), 245, np.uint8)
    for column, share in enumerate((1.0, 0.6, 0.4)):
        image[: round(PATCH_PX * share), column * PATCH_PX : (column + 1) * PATCH_PX] = VIOLET
    write_pyramid(tmp_path / "shares.tif", image, 4.0, jpeg_quality=95)
    with Slide(tmp_path / "shares.tif") as slide:
        for threshold, count in ((0.7, 1), (0.5, 2), (0.3, 3), (0.0, 8)):
            mosaic = build_mosaic(slide, parameters(mpp=4.0, tissue_fraction=threshold))
            assert len(mosaic.candidates) == count
        with pytest.raises(SlideError) as caught:
            build_mosaic(slide, parameters(mpp=4.0, patch_px=2 * PATCH_PX, tissue_fraction=0.9))
    assert caught.value.reason == "SLIDE_NO_PATCHES"
    assert "--patch-px" in str(caught.value)


def test_same_tissue_at_two_resolutions_gives_the_same_mosaic(tmp_path: Path) -> None:
    """Pyramid levels are picked by mpp: 0.25 µm/px has twice the pixels and the same patches in µm."""
    image = checkered(6, 4, [VIOLET, PINK, PALE])
    write_pyramid(tmp_path / "half.tif", image, 0.5, jpeg_quality=95)
    write_pyramid(tmp_path / "quarter.tif", image.repeat(2, axis=0).repeat(2, axis=1), 0.25, jpeg_quality=95)
    with Slide(tmp_path / "half.tif") as half, Slide(tmp_path / "quarter.tif") as quarter:
        coarse, fine = build_mosaic(half, parameters()), build_mosaic(quarter, parameters())
        assert fine.l0_patch_px == 2 * coarse.l0_patch_px
        for one, other in zip(coarse.candidates, fine.candidates, strict=True):
            assert (other.l0_x_px, other.l0_y_px) == (2 * one.l0_x_px, 2 * one.l0_y_px)
            assert other.cluster == one.cluster
        assert fine.chosen == coarse.chosen
        patch = fine.patches[0]
        pixels = quarter.read((patch.l0_x_px, patch.l0_y_px), (PATCH_PX, PATCH_PX), 0.5)
    assert pixels.shape == (PATCH_PX, PATCH_PX, 3)
    assert pixels.std(axis=(0, 1)).max() < 4  # one colour: the patch is where it should be


def test_real_slide(test_data: Path) -> None:
    with Slide(test_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        mosaic = build_mosaic(slide, MosaicParameters(patch_px=224))
        assert mosaic.l0_patch_px == 224  # 0.499 counts as 0.5: nothing is resampled
        for patch in mosaic.patches:
            assert patch.tissue >= 0.7
            pixels = slide.read((patch.l0_x_px, patch.l0_y_px), (224, 224), 0.5)
            assert (pixels.min(axis=2) > 225).mean() < 0.5
        with pytest.raises(SlideError) as caught:
            build_mosaic(slide, MosaicParameters())  # 1000 px patches do not fit the narrow piece
    assert caught.value.reason == "SLIDE_NO_PATCHES"


def test_slide_smaller_than_a_patch(test_data: Path) -> None:
    with (
        Slide(test_data / "wsi" / "openslide_python_fixtures" / "small.svs") as slide,
        pytest.raises(SlideError) as caught,
    ):
        build_mosaic(slide, MosaicParameters())
    assert caught.value.reason == "SLIDE_TOO_SMALL"


def test_json_round_trip(three_colours: Path) -> None:
    with Slide(three_colours) as slide:
        mosaic = build_mosaic(slide, parameters(max_patches=3))
    assert Mosaic.from_json(json.loads(json.dumps(mosaic.to_json()))) == mosaic


@pytest.mark.parametrize(
    "content", [{}, {"version": 99}, {"version": 1}, {"version": 1, "parameters": {"patchpx": 3}}]
)
def test_json_of_something_else(content: dict[str, object]) -> None:
    with pytest.raises(SlideError):
        Mosaic.from_json(content)


def test_all_wrong_parameters_are_named_at_once() -> None:
    with pytest.raises(SlideError) as caught:
        MosaicParameters(mpp=0, patch_px=1, tissue_fraction=2, clusters=0, fraction=0, max_patches=0)
    for name in ("mpp", "patch_px", "tissue_fraction", "clusters", "fraction", "max_patches"):
        assert name in str(caught.value)
    assert caught.value.reason == "MOSAIC_PARAMETERS"
