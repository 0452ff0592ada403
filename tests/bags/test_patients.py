"""Slides by patient, and their padded batches."""

from __future__ import annotations

import math

import pytest
import torch

from histoflare.bags.patients import collate_patients, group, mean_over_slides
from histoflare.errors import JobError

from .stand_in import Record

SLIDES = [Record(str(i), patient, 0, "train") for i, patient in enumerate("baabca")]


def names(record: str, most: int | None) -> list[str]:
    return ["".join(slide.slide_id for slide in one) for one in group(SLIDES, record, most)]


def test_groups_are_in_the_order_of_appearance() -> None:
    assert names("patient", None) == ["03", "125", "4"]
    assert names("slide", None) == ["0", "3", "1", "2", "5", "4"]
    assert group([], "patient", None) == []


def test_a_patients_first_slides_are_kept() -> None:
    assert names("patient", 2) == ["03", "12", "4"]
    assert names("slide", 1) == ["0", "1", "4"]
    assert names("slide", 9) == names("slide", None)


@pytest.mark.parametrize(("record", "most"), [("patch", None), ("patient", 0), ("slide", -1)])
def test_other_records_are_refused(record: str, most: int | None) -> None:
    with pytest.raises(JobError) as caught:
        group(SLIDES, record, most)
    assert caught.value.reason == "PRIVACY_INVALID"


def test_a_batch_is_padded_in_slides_and_in_patches() -> None:
    batch = collate_patients([[torch.ones(2, 3), torch.ones(4, 3)], [torch.ones(1, 3)]], [[1, 2], [1]])
    assert batch.features.shape == (2, 2, 4, 3) and batch.features.dtype == torch.float32
    assert batch.mask.sum(dim=2).tolist() == [[2, 4], [1, 0]]
    assert batch.slides.tolist() == [[True, True], [True, False]]
    assert batch.labels.tolist() == [[1, 2], [1, 0]]
    assert batch.features.sum() == 7 * 3 and bool((batch.features[~batch.mask] == 0).all())


def test_a_mean_is_over_the_slides_there_are() -> None:
    losses = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    slides = torch.tensor([[True, True], [True, False], [False, False]])
    assert mean_over_slides(losses, slides).tolist() == [2.0, 5.0, 0.0]
    assert math.isfinite(float(mean_over_slides(torch.zeros(1, 0), torch.zeros((1, 0), dtype=torch.bool))))
