"""Slides and images by record: what DP-SGD samples and clips."""

from __future__ import annotations

import pytest

from histoflare.errors import JobError
from histoflare.slides.cohort import group

from ..bags.stand_in import Record

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
