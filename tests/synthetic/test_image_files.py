"""Generated images on disk: what segmentation reads is what was drawn, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from histoflare.lab.sites import find_sites
from histoflare.masks.images import load_image_cohort
from histoflare.site.kinds import IMAGES
from histoflare.synthetic.image_files import LABELS, make_images
from histoflare.synthetic.images import IMAGE_MPP, SyntheticImages, plan_images, render_image

MADE = SyntheticImages(sites=2, patients=3, images_per_patient=2, side_px=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_images(folder, MADE)
    return folder


def test_a_cohort_has_what_was_drawn(made: Path) -> None:
    found = find_sites(made, IMAGES)
    assert (set(found.sites), set(found.external)) == ({"hospital-1", "hospital-2"}, {"external"})
    planned = {image.slide_id: image for image in plan_images(MADE)}
    for site, path in (found.sites | found.external).items():
        cohort = load_image_cohort(site, path, LABELS, mpp=IMAGE_MPP, window_px=64)
        assert len(cohort.records) == 6
        assert len(cohort.test) == (6 if site == "external" else 2)
        for record in cohort.records:
            image, mask = render_image(planned[record.image.stem], 64, 0)
            read = cohort.read(record)
            assert np.array_equal(read.image, image)
            assert np.array_equal(read.mask, mask)
            assert record.patient == planned[record.image.stem].patient


def test_the_same_bytes_again_in_the_same_place_or_another(made: Path, tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    for folder in (made, tmp_path):
        ticks.clear()
        make_images(folder, MADE, lambda done, total: ticks.append((done, total)))
    assert ticks == [(done, 18) for done in range(1, 19)]
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 3 * (1 + 2 * 6)
    assert all((made / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)
