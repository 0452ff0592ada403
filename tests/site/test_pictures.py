"""A site's page from its slides and bags: the right pictures of the right slides, whatever is missing."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histoflare.bags.heatmap import relative_attention
from histoflare.bags.prepare import prepare
from histoflare.report.site_page import write_site_page
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.data import load_site_data
from histoflare.site.kinds import BAGS
from histoflare.site.pictures import (
    build_site_page,
)
from histoflare.slides.manifest import Manifest, read_manifest
from histoflare.slides.mosaic import MosaicParameters
from histoflare.slides.pyramid import write_pyramid
from tests.bags.conftest import MeanColour, paint_slide
from tests.flare.bags_on_disk import write_site
from tests.refusals import raises_reason
from tests.report.made import full_report

from ..mem import make_mem, make_mem_task

TASK = make_mem_task(
    labels=["a", "b"], encoder="mean-colour", mpp=0.5, patch_px=64, features=3, memories=2, dim=4, hidden=4
)


@pytest.fixture
def configuration(tmp_path: Path) -> SiteConfiguration:
    """Six slides, prepared; a seventh has no tissue and is left out."""
    rows = []
    for index in range(7):
        path = tmp_path / "slides" / f"s{index}.tif"
        write_pyramid(path, paint_slide(index, tissue=index < 6), 0.5)
        split = "test" if index in (4, 5) else "train"
        rows.append((f"slides/s{index}.tif", f"p{index}", "ab"[index % 2], split))
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide", "patient", "label", "split"), *rows])
    manifest = read_manifest(tmp_path / "manifest.csv")
    prepare(
        manifest, tmp_path / "bags", MeanColour(), MosaicParameters(patch_px=64, fraction=0.5, clusters=3)
    )
    return SiteConfiguration({"manifest": tmp_path / "manifest.csv", "bags": tmp_path / "bags"})


def slides_of(configuration: SiteConfiguration) -> tuple[Manifest, Path]:
    """Return the site's slides and the folder of their bags."""
    return BAGS.read_manifest(configuration), configuration.files["bags"]


def test_test_slides_come_first_and_the_others_are_in_the_table(
    configuration: SiteConfiguration, tmp_path: Path
) -> None:
    cohort = load_site_data("graz", TASK, configuration)
    model = TASK.build_model().eval()
    report = full_report()
    page = build_site_page("graz", *slides_of(configuration), cohort, TASK, model, report, most_pictures=3)
    assert [slide.slide[:2] for slide in page.slides] == ["s4", "s5", "s0", "s1", "s2", "s3"]
    assert [slide.pictures is not None for slide in page.slides] == [True] * 3 + [False] * 3
    for slide in page.slides[:3]:
        drawn = slide.pictures
        assert drawn is not None
        assert drawn.notes == ()
        assert len({drawn.thumbnail, drawn.mosaic, drawn.attention}) == 3
        assert drawn.chosen is not None
        assert drawn.candidates is not None
        assert drawn.chosen < drawn.candidates
    for slide, record in zip(page.slides[:2], cohort.test, strict=True):
        assert sum(slide.probabilities.values()) == pytest.approx(1.0)
        expected = list(TASK.answer(model, cohort.features(record)).probabilities.values())
        assert list(slide.probabilities.values()) == pytest.approx(expected)
    assert [(row.slide[:2], row.reason) for row in page.left_out] == [("s6", "SLIDE_NO_TISSUE")]
    assert [row.status for row in page.sent].count("silent") == 2
    write_site_page(page, tmp_path / "site-graz.html")
    assert (tmp_path / "site-graz.html").stat().st_size < 3 * 3 * 80_000 + 100_000


def test_pictures_do_not_depend_on_the_number_of_threads(configuration: SiteConfiguration) -> None:
    cohort = load_site_data("graz", TASK, configuration)
    model = TASK.build_model().eval()
    pages = [
        build_site_page(
            "graz",
            *slides_of(configuration),
            cohort,
            TASK,
            model,
            {"participation": [], "sites": {}},
            threads=n,
        )
        for n in (1, 3)
    ]
    assert pages[0].slides == pages[1].slides


def test_without_a_model_there_is_no_attention(configuration: SiteConfiguration) -> None:
    cohort = load_site_data("graz", TASK, configuration)
    page = build_site_page("graz", *slides_of(configuration), cohort, TASK, None, full_report())
    assert page.scale is None
    for slide in page.slides:
        assert slide.probabilities == {}
        assert slide.pictures is not None
        assert slide.pictures.attention == ""
        assert slide.pictures.mosaic != ""


def test_a_slide_that_is_gone_or_another_one_costs_no_other(configuration: SiteConfiguration) -> None:
    slides = configuration.files["manifest"].parent / "slides"
    (slides / "s4.tif").unlink()
    write_pyramid(slides / "s5.tif", paint_slide(77), 0.5)
    (slides / "s0.tif").write_bytes(b"no slide")
    with raises_reason("COHORT_INVALID", "line 2 ", "s0.tif", "line 7 ", "s5.tif"):
        load_site_data("graz", TASK, configuration)
    cohort = BAGS.load("graz", TASK, configuration, is_over=True)
    model = TASK.build_model().eval()
    page = build_site_page("graz", *slides_of(configuration), cohort, TASK, model, full_report())
    drawn = {slide.slide[:2]: slide.pictures for slide in page.slides}
    assert "SLIDE_MISSING" in drawn["s4"].notes[0]
    assert drawn["s4"].thumbnail == ""
    assert "not as it was" in drawn["s5"].notes[0]
    assert drawn["s5"].mosaic == ""
    assert "No pictures" in drawn["s0"].notes[0]
    assert drawn["s1"].notes == ()
    assert all(slide.probabilities for slide in page.slides), "bags are read, not slides"


def test_imported_features_without_slides(tmp_path: Path) -> None:
    configuration = write_site(tmp_path, "graz")
    task = replace(
        TASK, labels=["glandular", "solid"], encoder="densenet121-random:v1", features=1024, patch_px=224
    )
    cohort = load_site_data("graz", task, configuration)
    page = build_site_page(
        "graz", *slides_of(configuration), cohort, task, task.build_model().eval(), full_report()
    )
    assert len(page.slides) == 10
    assert all(slide.pictures and slide.pictures.notes for slide in page.slides)
    assert page.scale is None


def test_attention_is_relative_to_the_average_patch() -> None:
    model = make_mem(2, features=3, memories=2, dim=4, hidden=4).eval()
    features = torch.randn((7, 3), generator=torch.Generator().manual_seed(0)) * 3
    relative = relative_attention(model, features)
    assert relative.mean() == pytest.approx(1.0)
    assert relative.std() > 0.01
    assert relative_attention(model, features[:1].repeat(5, 1)) == pytest.approx(np.ones(5))
