"""The resolution on which images agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.masks.resolution import agreed_mpp, read_stated_mpps
from tests.refusals import raises_reason


@pytest.mark.parametrize(
    ("stated", "agreed"),
    [
        ({"a": [0.5, 0.5], "b": [0.5]}, 0.5),
        ({"a": [0.499, 0.5, 0.5], "b": [0.504]}, 0.5),  # within 1 % of what most say
        ({"a": [0.5], "b": [0.4975]}, 0.4975),
        ({"a": [0.5, None], "b": [0.5]}, 0.5),
        ({"a": [None], "b": []}, None),
        ({}, None),
    ],
)
def test_what_all_images_agree_on(stated: dict[str, list[float | None]], agreed: float | None) -> None:
    assert agreed_mpp(stated) == agreed


@pytest.mark.parametrize(
    "stated",
    [{"a": [0.25], "b": [0.5, 0.5]}, {"a": [0.25, 0.5, 0.5]}, {"a": [0.5], "b": [0.52, None]}],
)
def test_two_resolutions_are_one_clear_error(stated: dict[str, list[float | None]]) -> None:
    with raises_reason("COHORT_INVALID", "0.5"):
        agreed_mpp(stated)


def test_manifests_say_it_without_their_images(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,mask,patient,mpp\ni.png,m.png,p,0.25\nj.png,n.png,q,\n")
    (tmp_path / "b.csv").write_text("image\n")
    manifests = {name: tmp_path / f"{name}.csv" for name in ("a", "b", "gone")}
    assert read_stated_mpps(manifests) == {"a": [0.25, None]}
