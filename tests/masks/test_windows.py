"""Windows: every pixel covered, nothing outside, sizes right."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from histoflare.errors import JobError
from histoflare.masks.images import load_image_cohort
from histoflare.masks.training_windows import training_windows
from histoflare.masks.windows import IGNORE, read_window, resize_mask, window_grid
from tests.refusals import raises_reason

from .image_folders import rgb, save, write_cohort


@given(st.data())
def test_every_pixel_is_covered_and_no_window_leaves_the_image(data: st.DataObject) -> None:
    window_px = data.draw(st.integers(1, 20))
    stride_px = data.draw(st.integers(1, window_px))
    width, height = data.draw(st.tuples(st.integers(window_px, 60), st.integers(window_px, 60)))
    covered = np.zeros((height, width), int)
    corners = window_grid((width, height), window_px, stride_px)
    for x, y in corners:
        assert 0 <= x <= width - window_px and 0 <= y <= height - window_px
        covered[y : y + window_px, x : x + window_px] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners)
    # no more than it takes: a regular grid, and one more along each side whose stride does not fit
    along = [-(-(side - window_px) // stride_px) + 1 for side in (width, height)]
    assert len(corners) == along[0] * along[1]


def test_the_papers_windows() -> None:
    assert window_grid((2000, 1000), 1000, 500) == [(0, 0), (500, 0), (1000, 0)]
    assert window_grid((1700, 1000), 1000, 500) == [(0, 0), (500, 0), (700, 0)]


def test_what_cannot_be_cut_is_refused() -> None:
    with raises_reason("IMAGE_TOO_SMALL", "1000 x 99"):
        window_grid((1000, 99), 100, 50)
    for stride_px in (0, 101):
        with pytest.raises(JobError):
            window_grid((200, 200), 100, stride_px)


def test_a_window_is_what_lies_there() -> None:
    image, mask = rgb(30, 40), np.arange(1200, dtype=np.uint8).reshape(30, 40)
    window, classes = read_window(image, mask, (5, 7), 16, 16)
    np.testing.assert_array_equal(window, image[7:23, 5:21])
    np.testing.assert_array_equal(classes, mask[7:23, 5:21])


def test_shrinking_averages_pixels_and_picks_classes() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, ::2] = 200  # stripes of one pixel: without averaging all 0 or all 200
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 7
    window, classes = read_window(image, mask, (0, 0), 8, 2)
    assert np.all((window > 60) & (window < 140))
    np.testing.assert_array_equal(classes, [[0, 7], [0, 7]])


@given(st.integers(1, 70), st.integers(1, 70))
def test_a_resized_mask_has_the_class_at_each_pixels_middle(window_px: int, patch_px: int) -> None:
    mask = np.random.default_rng(window_px).integers(0, 256, (window_px, window_px), np.uint8)
    places = [math.floor(Fraction(2 * index + 1, 2) * window_px / patch_px) for index in range(patch_px)]
    expected = [[mask[y, x] for x in places] for y in places]
    np.testing.assert_array_equal(resize_mask(mask, patch_px), expected)


def test_masks_are_resized_as_pillow_does() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8)
    nearest = Image.fromarray(mask).resize((224, 224), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resize_mask(mask, 224), np.asarray(nearest))


def test_windows_with_nothing_to_learn_are_left_out(tmp_path: Path) -> None:
    mask = np.full((40, 40), IGNORE, np.uint8)
    mask[:3, :3] = 1  # inside the window at (0, 0) alone
    save(tmp_path / "i.png", rgb(40, 40))
    save(tmp_path / "m.png", mask)
    (tmp_path / "m.csv").write_text("image,mask,patient,split\ni.png,m.png,p,train\n")
    cohort = load_image_cohort("s", tmp_path / "m.csv", ["a", "b"], window_px=20)
    assert [xy for _, xy in training_windows(cohort, 20, 10)] == [(0, 0)]
    # a network that sees every tenth pixel sees none of these: (5, 5) is the first it looks at
    assert training_windows(cohort, 20, 10, patch_px=2) == []


def test_only_training_images_are_trained_on(tmp_path: Path) -> None:
    cohort = load_image_cohort("s", write_cohort(tmp_path), ["a", "b"])
    windows = training_windows(cohort, 32, 16)
    assert len(windows) == 3 * 4
    assert {record.patient for record, _ in windows} == {"p0", "p1", "p2"}
    assert training_windows(cohort, 32, 16) is windows
    assert {record.patient for record, _ in training_windows(cohort, 32, 16, split="test")} == {"p3"}
