"""Generated images: the mask lies where nuclei can be seen, hospitals differ, patients keep to one split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from histoflare.errors import JobError
from histoflare.synthetic.cohort import LABELS, NEUTRAL_STYLE
from histoflare.synthetic.images import SyntheticImages, plan_images, render_image

MADE = SyntheticImages(sites=2, patients=6)


@pytest.mark.parametrize("rank", range(4))
def test_the_mask_lies_on_what_is_dark(rank: int) -> None:
    """Nuclei alone take up much hematoxylin: in red light the mask is told from the rest by a threshold."""
    image = replace(plan_images(MADE)[2 * rank], style=NEUTRAL_STYLE)
    rgb, mask = render_image(image, 256, 0)
    assert rgb.shape == (256, 256, 3)
    assert rgb.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
    assert 0.03 < mask.mean() < 0.5
    assert best_dice(rgb, mask) > 0.9
    for shift in ((4, 0), (-4, 0), (0, 4), (0, -4)):
        assert best_dice(rgb, np.roll(mask, shift, (0, 1))) < best_dice(rgb, mask) - 0.1, shift


def best_dice(rgb: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """Dice of the mask and of what is darker in red light than the threshold that suits it best."""
    dark = [rgb[..., 0] < cut for cut in range(90, 200, 5)]
    return max(float(2 * np.sum(each & (mask == 1)) / (each.sum() + mask.sum())) for each in dark)


def test_a_lumen_is_no_nucleus() -> None:
    for image in plan_images(MADE)[:6]:
        rgb, mask = render_image(image, 128, 0)
        assert not np.any(mask[rgb.min(axis=2) > 225])


def test_patients_keep_to_one_split_and_both_patterns_are_in_each() -> None:
    planned = plan_images(SyntheticImages(sites=3, patients=12, images_per_patient=2))
    assert len(planned) == 4 * 12 * 2
    assert list(dict.fromkeys(image.site for image in planned)) == [
        "hospital-1",
        "hospital-2",
        "hospital-3",
        "external",
    ]
    for site in {image.site for image in planned}:
        of_site = [image for image in planned if image.site == site]
        tested = {image.patient for image in of_site if image.split == "test"}
        assert len(tested) == (12 if site == "external" else 4)
        assert all((image.patient in tested) == (image.split == "test") for image in of_site)
        for split in {image.split for image in of_site}:
            assert {image.label for image in of_site if image.split == split} == set(LABELS)
    assert len({image.slide_id for image in planned}) == len(planned)


@pytest.mark.parametrize("patients", range(3, 14))
def test_every_site_trains_and_tests(patients: int) -> None:
    planned = plan_images(SyntheticImages(sites=1, patients=patients))
    splits = [image.split for image in planned if image.site == "hospital-1"]
    assert {"train", "test"} == set(splits)
    assert splits.count("train") >= splits.count("test")


def test_more_sites_and_patients_leave_the_others_as_they_were() -> None:
    few = plan_images(MADE)
    theirs = {
        image.slide_id: image
        for image in plan_images(replace(MADE, sites=4, patients=9, images_per_patient=3))
    }
    assert all(theirs[image.slide_id] == image for image in few)
    one, again = (render_image(image, 64, 0) for image in (few[5], theirs[few[5].slide_id]))
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])


def test_images_of_a_patient_differ_and_so_do_seeds() -> None:
    first, second = plan_images(MADE)[:2]
    assert first.patient == second.patient
    assert not np.array_equal(render_image(first, 64, 0)[0], render_image(second, 64, 0)[0])
    assert not np.array_equal(render_image(first, 64, 0)[0], render_image(first, 64, 1)[0])


def test_sites_differ_in_stain() -> None:
    styles = {image.site: image.style.stain for image in plan_images(MADE)}
    assert len(set(styles.values())) == 3


@pytest.mark.parametrize(
    "wrong", [{"sites": 0}, {"patients": 2}, {"images_per_patient": 0}, {"side_px": 31}, {"side_px": 5000}]
)
def test_what_cannot_be_made_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(JobError):
        SyntheticImages(**wrong)
