"""A slide at two sites of one machine is an error, and so is a patient where an ε rests on it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from histoflare.bags.bag import read_bag, write_bag
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.overlap import LISTED, check_apart
from tests.flare.bags_on_disk import write_site
from tests.masks.made import make_site
from tests.refusals import raises_reason

Sites = dict[str, SiteConfiguration]


def change_cell(manifest: Path, line: int, column: str, value: str) -> None:
    with manifest.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[line - 1][rows[0].index(column)] = value
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def bags(tmp_path: Path) -> Sites:
    return {site: write_site(tmp_path, site) for site in ("a", "b", "external")}


@pytest.fixture
def images(tmp_path: Path) -> Sites:
    return {
        site: SiteConfiguration({"images": make_site(tmp_path / site, seed, mark=f"{site}-")})
        for seed, site in enumerate(("a", "b", "external"))
    }


def refusal(sites: Sites, data: str) -> str:
    with raises_reason("COHORT_INVALID") as caught:
        check_apart(sites, data, protected=True)
    return str(caught.value)


def test_sites_that_share_nobody_are_fine(bags: Sites, images: Sites) -> None:
    for protected in (True, False):
        assert check_apart(bags, "bags", protected=protected) == []
        assert check_apart(images, "images", protected=protected) == []


def test_where_nothing_is_protected_a_name_at_two_sites_is_a_warning(bags: Sites) -> None:
    change_cell(bags["b"].files["manifest"], 4, "patient", "a-p3")
    (said,) = check_apart(bags, "bags", protected=False)
    assert "patient a-p3: a (manifest.csv, line 5) and b (manifest.csv, line 4)" in said
    same_bag(bags)
    with raises_reason("COHORT_INVALID", "slide: a ", " and b "):
        check_apart(bags, "bags", protected=False)


@pytest.mark.parametrize("other", ["b", "external"])
@pytest.mark.parametrize("written", ["a-p3", " a-p3 "])
def test_a_patient_at_two_sites(bags: Sites, other: str, written: str) -> None:
    """An external cohort counts: the figures on it are of patients whom nobody trained on."""
    change_cell(bags[other].files["manifest"], 4, "patient", written)
    said = refusal(bags, "bags")
    assert f"patient a-p3: a (manifest.csv, line 5) and {other} (manifest.csv, line 4)" in said
    assert "different names" in said


def test_a_patient_with_images_at_two_sites(images: Sites) -> None:
    change_cell(images["external"].files["images"], 2, "patient", "b-p1")
    assert "patient b-p1: b (images.csv, line 3) and external (images.csv, line 2)" in refusal(
        images, "images"
    )


def same_bag(bags: Sites) -> None:
    """The features of one slide, imported at both sites."""
    first, second = (sorted(bags[site].files["bags"].glob("*.h5"))[0] for site in ("a", "b"))
    shutil.copyfile(first, second)


def same_hash(bags: Sites) -> None:
    """Bags of one slide, made with other mosaics."""
    for site in ("a", "b"):
        path = sorted(bags[site].files["bags"].glob("*.h5"))[0]
        bag = read_bag(path)
        write_bag(path, replace(bag, header=replace(bag.header, slide_sha256="5" * 64)))


def same_file(bags: Sites) -> None:
    """One file under two names, before there are bags."""
    for site, number in (("a", 0), ("b", 0)):
        shutil.rmtree(bags[site].files["bags"])
        folder = bags[site].files["manifest"].parent / "slides"
        folder.mkdir()
        (folder / f"s{number}.tif").write_bytes(b"slide")
        (folder / "s1.tif").write_bytes(site.encode() * 5)  # as long, and another


def same_path(bags: Sites) -> None:
    """A link of one site to the other's slide, which is on a disk that is away."""
    slides = [bags[site].files["manifest"].parent / "slides" / "s0.tif" for site in ("a", "b")]
    slides[1].parent.mkdir()
    slides[1].symlink_to(slides[0])


@pytest.mark.parametrize("make", [same_bag, same_hash, same_file, same_path])
def test_a_slide_at_two_sites_under_other_names(bags: Sites, make: Callable[[Sites], None]) -> None:
    make(bags)
    said = refusal(bags, "bags")
    assert "one slide: a (manifest.csv, line 2) and b (manifest.csv, line 2)" in said
    assert said.count("\n  ") == 1


def test_an_image_at_two_sites_under_other_names(images: Sites) -> None:
    shutil.copyfile(
        images["a"].files["images"].parent / "image2.png", images["b"].files["images"].parent / "image4.png"
    )
    assert "one image: a (images.csv, line 4) and b (images.csv, line 6)" in refusal(images, "images")


def test_of_many_the_first_are_listed(bags: Sites, tmp_path: Path) -> None:
    bags["c"] = replace(bags["a"])
    said = refusal(bags, "bags")
    assert said.count("\n  patient ") == LISTED and "… and 10 more" in said
