"""Augmentation: what changes, what does not, and that a seed decides it all."""

from __future__ import annotations

import colorsys
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import DataLoader
from scipy import ndimage

from histoflare.masks.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RandHSVd,
    RandTurnd,
    WindowDataset,
    change_colours,
    join_hsv,
    plain_transform,
    split_hsv,
    training_transform,
    turn,
)
from histoflare.masks.images import ImageCohort, load_image_cohort
from histoflare.masks.training_windows import training_windows
from histoflare.masks.windows import read_window
from tests.refusals import raises_reason

from .image_folders import rgb, save, write_cohort

PIXELS = torch.tensor(rgb(12, 10)).permute(2, 0, 1) / 255
CORNERS = torch.tensor(
    [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [0.5, 0.5, 0.5]]
).T[:, :, None]


def cohort_of(folder: Path, **options: int) -> ImageCohort:
    return load_image_cohort("s", write_cohort(folder), ["a", "b"], **options)


@pytest.mark.parametrize("image", [PIXELS, CORNERS])
def test_hsv_is_the_standard_librarys(image: torch.Tensor) -> None:
    hue, chroma, value = split_hsv(image)
    for pixel, h, c, v in zip(
        image.flatten(1).T, hue.flatten(), chroma.flatten(), value.flatten(), strict=True
    ):
        expected = colorsys.rgb_to_hsv(*pixel.tolist())
        if expected[1] > 0:
            assert (float(h) / 6) % 1 == pytest.approx(expected[0], abs=1e-5)
        assert float(c) == pytest.approx(expected[1] * expected[2], abs=1e-6)
        assert float(v) == pytest.approx(expected[2], abs=1e-6)
    torch.testing.assert_close(join_hsv(hue, chroma, value), image, atol=2e-6, rtol=0)


@given(st.floats(-0.5, 0.5), st.floats(-1, 1), st.floats(-1, 1))
def test_colours_change_as_in_the_standard_library(turns: float, saturation: float, value: float) -> None:
    changed = change_colours(PIXELS, turns, saturation, value)
    for before, after in zip(PIXELS[:, :2].flatten(1).T, changed[:, :2].flatten(1).T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb((h + turns) % 1, min(1, s * (1 + saturation)), min(1, v * (1 + value)))
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)


def test_no_jitter_changes_no_bit() -> None:
    assert torch.equal(change_colours(PIXELS, 0.0, 0.0, 0.0), PIXELS)
    still = RandHSVd("image", 0, 0, 0)
    still.set_random_state(seed=1)
    assert torch.equal(still({"image": PIXELS})["image"], PIXELS)
    never = RandHSVd("image", prob=0.0)
    assert torch.equal(never({"image": PIXELS})["image"], PIXELS)


def test_jitter_stays_within_its_limits() -> None:
    change = RandHSVd("image", 0.1, 0.2, 0.3)
    change.set_random_state(seed=0)
    drawn = []
    for _ in range(500):
        change.randomize()
        drawn.append(change.drawn)
    most = np.abs(drawn).max(axis=0)
    assert (most <= [0.1, 0.2, 0.3]).all() and (most >= [0.09, 0.18, 0.27]).all()


def test_the_plain_transform_normalises() -> None:
    image = torch.tensor([[[0]], [[255]], [[51]]], dtype=torch.uint8)
    made = plain_transform()({"image": image, "mask": torch.zeros(1, 1, 1)})["image"].flatten()
    expected = [(v - m) / s for v, m, s in zip((0.0, 1.0, 0.2), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("quarters", [-1, 0, 1])
def test_a_turn_by_a_right_angle_moves_each_pixel_to_its_place(quarters: int) -> None:
    image = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(81, dtype=torch.uint8).reshape(1, 9, 9)
    turned, turned_mask = turn(image, mask, 90.0 * quarters)
    torch.testing.assert_close(turned, torch.rot90(image, quarters, (1, 2)), atol=1e-5, rtol=0)
    assert torch.equal(turned_mask, torch.rot90(mask, quarters, (1, 2)))


@pytest.mark.parametrize("degrees", [-75.0, -30.0, 12.5, 45.0, 88.0])
def test_a_turn_is_scipys(degrees: float) -> None:
    pixels = np.random.default_rng(0).random((3, 32, 32)).astype(np.float32)
    classes = np.random.default_rng(1).integers(0, 4, (1, 32, 32)).astype(np.uint8)
    image, mask = turn(torch.tensor(pixels), torch.tensor(classes), degrees)
    options = {"axes": (2, 1), "reshape": False, "mode": "reflect"}
    expected = ndimage.rotate(pixels, degrees, order=1, **options)
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-4)
    same = mask.numpy() == ndimage.rotate(classes, degrees, order=0, **options)
    assert same.mean() > 0.99  # a pixel that is as near to two may be either


def test_a_turned_mask_has_its_own_classes_and_follows_its_image() -> None:
    """Classes 0, 3 and 255: nothing lies between them, and nothing that was not annotated becomes a class."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[:, 5:25, 8:30], mask[:, 20:, 20:] = 3, 255
    gray = mask.float().repeat(3, 1, 1) / 255
    move = training_transform()
    imagenet = torch.tensor([*zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    for seed in range(30):
        move.set_random_state(seed=seed)
        made = move({"image": (gray * 255).byte(), "mask": mask})
        found = torch.as_tensor(made["mask"])
        assert found.dtype == torch.uint8 and set(found.unique().tolist()) == {0, 3, 255}
        shown = made["image"][0] * imagenet[0, 1] + imagenet[0, 0]  # value moves by up to 20 %
        assert shown[found[0] == 255].mean() > 0.7 and shown[found[0] != 255].mean() < 0.1


def test_angles_are_uniform_to_90_degrees_either_way_and_flips_are_even() -> None:
    """1000 draws: the mean of the angles has a deviation of 1.6 degrees; a quarter of them, of 1.4 %."""
    move = training_transform()
    angles = []
    for seed in range(1000):
        move.set_random_state(seed=seed)
        (turning,) = (each for each in move.transforms if isinstance(each, RandTurnd))
        turning.randomize()
        angles.append(turning.degrees)
    assert -90 <= min(angles) < -88 and 88 < max(angles) <= 90 and abs(np.mean(angles)) < 8
    quarters = np.histogram(angles, bins=4, range=(-90, 90))[0] / 1000
    assert (abs(quarters - 0.25) < 0.07).all()
    assert sum(abs(angle) % 90 < 1e-9 for angle in angles) == 0


def test_items_are_windows_ready_for_a_network(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    windows = training_windows(cohort, 32, 16)
    dataset = WindowDataset(cohort, windows, patch_px=16, window_px=32, augment=False)
    assert len(dataset) == len(windows) == 12
    for index in (0, 5, 11):
        record, xy = windows[index]
        pixels = cohort.read(record)
        image, mask = read_window(pixels.image, pixels.mask, xy, 32, 16)
        item = dataset.item(index, 0)
        assert type(item["image"]) is torch.Tensor and item["image"].dtype == torch.float32
        assert item["image"].shape == (3, 16, 16) and item["image"].is_contiguous()
        assert item["mask"].dtype == torch.int64 and item["mask"].shape == (16, 16)
        expected = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        np.testing.assert_allclose(item["image"].permute(1, 2, 0).numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(item["mask"].numpy(), mask)


@pytest.mark.parametrize(("window_px", "patch_px"), [(32, 16), (32, 32), (16, 32)])
def test_a_seed_decides_an_item(tmp_path: Path, window_px: int, patch_px: int) -> None:
    cohort = cohort_of(tmp_path)
    windows = training_windows(cohort, window_px, 16)
    dataset = WindowDataset(cohort, windows, patch_px, window_px, augment=True)
    first = dataset.item(3, 7)
    np.random.seed(1)
    torch.manual_seed(2)
    others = [dataset.item(3, seed) for seed in range(8, 13)]
    again = WindowDataset(cohort, windows, patch_px, window_px, augment=True).item(3, 7)
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["mask"], again["mask"])
    assert all(not torch.equal(first["image"], other["image"]) for other in others)
    assert first["image"].shape == (3, patch_px, patch_px) and first["image"].is_contiguous()
    dataset.item(0, (1 << 63) - 1)  # seeds are as derive_seed makes them


def test_items_do_not_touch_the_global_generators(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    dataset = WindowDataset(cohort, training_windows(cohort, 32, 16), 32, 32, augment=True)
    states = (torch.get_rng_state().clone(), np.random.get_state()[1].copy())
    dataset.item(0, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    code = """
import hashlib, sys
from pathlib import Path
from histoflare.masks.augmentation import WindowDataset
from histoflare.masks.images import load_image_cohort
from histoflare.masks.training_windows import training_windows
cohort = load_image_cohort("s", Path(sys.argv[1]), ["a", "b"])
item = WindowDataset(cohort, training_windows(cohort, 32, 16), 16, 32, augment=True).item(4, 99)
print(hashlib.sha256(item["image"].numpy().tobytes() + item["mask"].numpy().tobytes()).hexdigest())
"""
    cohort = cohort_of(tmp_path)
    item = WindowDataset(cohort, training_windows(cohort, 32, 16), 16, 32, augment=True).item(4, 99)
    here = hashlib.sha256(item["image"].numpy().tobytes() + item["mask"].numpy().tobytes()).hexdigest()
    command = [sys.executable, "-c", code, str(tmp_path / "images.csv")]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert there.strip() == here


def test_monais_loader_takes_it(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    dataset = WindowDataset(cohort, training_windows(cohort, 32, 16), 16, 32, augment=False)
    batches = list(DataLoader(dataset, batch_size=5))
    assert [tuple(batch["image"].shape) for batch in batches] == [
        (5, 3, 16, 16),
        (5, 3, 16, 16),
        (2, 3, 16, 16),
    ]


def test_shrunk_windows_are_kept_and_their_images_are_not(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, cache_bytes=3 * 4 * 16 * 16 * 4)
    windows = training_windows(cohort, 32, 16)
    dataset = WindowDataset(cohort, windows, 16, 32, augment=False)
    before = [dataset.item(index, 0) for index in range(len(windows))]
    assert cohort.cache.held_bytes == cohort.cache.limit_bytes and not cohort.cache.images
    for path in tmp_path.glob("*.png"):
        path.unlink()
    for index, item in enumerate(before):
        assert torch.equal(dataset.item(index, 0)["image"], item["image"])


def test_without_memory_items_are_the_same(tmp_path: Path) -> None:
    rich, poor = cohort_of(tmp_path), cohort_of(tmp_path, cache_bytes=0)
    windows = training_windows(rich, 32, 16)
    for index in range(0, 12, 5):
        first = WindowDataset(rich, windows, 16, 32, augment=True).item(index, 3)
        second = WindowDataset(poor, training_windows(poor, 32, 16), 16, 32, augment=True).item(index, 3)
        assert torch.equal(first["image"], second["image"])
    assert poor.cache.held_bytes == 0


def test_kept_images_make_room_for_windows(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, cache_bytes=2 * 48 * 48 * 4)
    for record in cohort.records:
        cohort.read(record)
    assert len(cohort.cache.images) == 2
    dataset = WindowDataset(cohort, training_windows(cohort, 32, 16), 16, 32, augment=False)
    for index in range(12):
        dataset.item(index, 0)
    assert len(cohort.cache.patches) == 3 and cohort.cache.held_bytes <= cohort.cache.limit_bytes


def test_an_image_that_changed_is_an_error_of_its_own(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    dataset = WindowDataset(cohort, training_windows(cohort, 32, 16), 16, 32, augment=True)
    save(tmp_path / "i0.png", rgb(48, 48, 77))
    save(tmp_path / "i1.png", rgb(48, 48, 78))
    save(tmp_path / "i2.png", rgb(48, 48, 79))
    with raises_reason("MASK_UNUSABLE", tmp_path / "i0.png"):
        dataset.item(0, 0)
