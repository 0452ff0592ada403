"""A site's page of a segmentation: the right outlines in the right place, Dice as the report has it."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from histoflare.masks.images import ImageCohort, load_image_cohort
from histoflare.masks.windows import IGNORE
from histoflare.report.site_page import write_site_page
from histoflare.site.image_pictures import (
    GAP_COLOUR,
    PICTURE_PX,
    build_image_site_page,
    draw_outlines,
)
from histoflare.slides.mask_overlay import class_colours
from tests.masks.made import LABELS, TASK, make_site
from tests.report.made import full_report
from tests.report.made_masks import segmentation_facts

COLOUR = class_colours(2)[1]


class Threshold(nn.Module):
    """Calls dark pixels nuclei; the discs of ``make_image`` are."""

    loss_weights = (1.0,)

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.0))

    def forward(self, images: Tensor) -> Tensor:
        dark = self.at - images.mean(dim=1)
        return torch.stack([-dark, dark], dim=1) * 10


@pytest.fixture
def cohort(tmp_path: Path) -> ImageCohort:
    return load_image_cohort("tnbc-1", make_site(tmp_path / "images", patients=6), LABELS)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_test_images_come_first_and_every_image_has_its_dice(cohort: ImageCohort, tmp_path: Path) -> None:
    report = full_report(**segmentation_facts())
    model = Threshold().eval()
    ticks: list[tuple[int, int]] = []
    page = build_image_site_page(
        "tnbc-1", cohort, TASK, model, report, most_pictures=3, on_image=lambda *at: ticks.append(at)
    )
    assert ticks == [(done, 6) for done in range(1, 7)]
    assert [row.split for row in page.slides] == ["test", "test", "validation", "train", "train", "train"]
    assert [row.pictures is not None for row in page.slides] == [True] * 3 + [False] * 3
    assert [each.label for each in page.classes] == ["nucleus"]
    header, rows = TASK.predict(model, cohort, "all").listed()
    assert header == ["image", "patient", "dice_nucleus"]
    expected = {name: float(dice) for name, _, dice in rows}
    assert {row.slide: row.dice["nucleus"] for row in page.slides} == pytest.approx(expected, abs=1e-6)
    assert min(expected.values()) > 0.9, "the threshold finds the discs"
    assert [row.status for row in page.sent].count("took") == 30
    write_site_page(page, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3 * 2 * 80_000 + 100_000
    for row in page.slides[:3]:
        for uri in (row.pictures.image, row.pictures.outlines):
            assert max(decoded(uri).size) <= PICTURE_PX
            assert len(base64.b64decode(uri.partition(",")[2])) <= 60_000


def test_without_a_model_only_the_given_outlines(cohort: ImageCohort) -> None:
    page = build_image_site_page("tnbc-1", cohort, TASK, None, full_report(**segmentation_facts()))
    assert all(row.dice == {} for row in page.slides)
    assert all(row.pictures.outlines for row in page.slides)


def test_an_image_that_is_gone_or_another_one_costs_no_other(cohort: ImageCohort) -> None:
    first, second = cohort.test
    first.image.unlink()
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(second.mask)
    report = full_report(**segmentation_facts())
    page = build_image_site_page("tnbc-1", cohort, TASK, Threshold().eval(), report)
    rows = {row.slide: row for row in page.slides}
    for record, reason in ((first, "IMAGE_MISSING"), (second, "MASK_UNUSABLE")):
        assert reason in rows[record.slide_id].pictures.notes[0]
        assert rows[record.slide_id].dice == {}
    others = [row for row in page.slides if row.split != "test"]
    assert len(others) == 4
    assert all(row.dice and row.pictures.image for row in others)


def test_a_class_in_neither_mask_has_no_dice_and_a_class_made_up_has_none_of_it(tmp_path: Path) -> None:
    images = make_site(tmp_path, patients=3)
    labels = (*LABELS, "stroma")
    for path in tmp_path.glob("mask*.png"):
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(path)
    cohort = load_image_cohort("tnbc-1", images, labels)

    class Three(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full_like(x[:, :1], -1e6)], dim=1)

    report = full_report(**segmentation_facts())
    page = build_image_site_page("a", cohort, replace(TASK, labels=labels), Three().eval(), report)
    assert [row.dice for row in page.slides] == [{"nucleus": 0.0, "stroma": None}] * 3


# the outlines: pictures ten times as large as the images


def square(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((72, 72), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


GREY = np.full((72, 72, 3), 200, np.uint8)
GIVEN = square(10, 20, 40, 50)


def test_a_given_square_is_outlined_where_it_ends() -> None:
    pixels = np.array(draw_outlines(GREY, GIVEN, None, [1], 2))
    assert pixels.shape == (720, 720, 3)
    drawn = (pixels == COLOUR).all(axis=2)
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max()) == pytest.approx((200, 500), abs=3)
    assert (columns.min(), columns.max()) == pytest.approx((100, 400), abs=3)
    assert not drawn[206:494, 106:394].any(), "an outline is no area"
    assert np.all(pixels[~drawn] == 200)
    assert 4 * 300 * 1.5 < drawn.sum() < 4 * 300 * 3


def test_the_models_outline_is_dashed_and_lies_on_top() -> None:
    pixels = np.array(draw_outlines(GREY, GIVEN, GIVEN, [1], 2))
    black = (pixels == GAP_COLOUR).all(axis=2)
    rest = ~black & (pixels != 200).any(axis=2)
    assert not (pixels == COLOUR).all(axis=2).any(), "where both agree the model's is seen"
    assert black.sum() == pytest.approx(rest.sum(), rel=0.5)
    apart = np.array(draw_outlines(GREY, GIVEN, square(50, 50, 60, 60), [1], 2))
    whole = np.array(draw_outlines(GREY, GIVEN, None, [1], 2))
    assert np.array_equal(apart[:480, :480], whole[:480, :480])
    assert (apart[500, 505:595] != 200).any(axis=1).all(), "no gap is left bare"


def test_a_class_that_fills_the_image_has_no_outline_and_background_never() -> None:
    full = np.ones((72, 72), np.uint8)
    assert np.all(np.array(draw_outlines(GREY, full, full, [1], 2)) == 200)
    assert np.all(np.array(draw_outlines(GREY, GIVEN, GIVEN, [], 2)) == 200)


def test_what_nobody_annotated_is_pale() -> None:
    given = np.zeros((72, 72), np.uint8)
    given[:, 36:] = IGNORE
    pixels = np.array(draw_outlines(GREY, given, None, [1], 2))
    assert np.all(pixels[:, :355] == 200)
    assert np.all(pixels[:, 365:] == 233)  # 0.4 * 200 + 0.6 * 255


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    picture = draw_outlines(np.zeros((30, 90, 3), np.uint8), np.zeros((30, 90), np.uint8), None, [1], 2)
    assert picture.size == (720, 240)
