"""Finding one manifest per site."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoflare.lab.sites import find_sites
from tests.refusals import raises_reason


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_both_layouts_are_found_and_the_external_cohort_is_apart(tmp_path: Path) -> None:
    one = touch(tmp_path / "clinic-a" / "manifest.csv")
    two = touch(tmp_path / "clinic-b.csv")
    external = touch(tmp_path / "external" / "manifest.csv")
    further = touch(tmp_path / "external" / "clinic-c.csv")
    for companion in ("._clinic-b.csv", "~$clinic-b.csv", "external/._clinic-c.csv"):
        touch(tmp_path / companion)
    found = find_sites(tmp_path)
    assert found.sites == {"clinic-a": one, "clinic-b": two}
    assert found.external == {"external": external, "external-clinic-c": further}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "<site>/manifest.csv"),
        (["external.csv"], "<site>/manifest.csv"),
        (["a.csv", "a/manifest.csv"], "a: "),
        (["St Mary/manifest.csv"], "St Mary: "),
        (["St. Mary's/manifest.csv"], "St-Mary-s"),
    ],
)
def test_what_cannot_be_used_is_one_error(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        touch(tmp_path / name)
    with raises_reason("MANIFEST_INVALID", says):
        find_sites(tmp_path)
