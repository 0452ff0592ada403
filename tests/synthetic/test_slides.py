"""Generated slides: the classes differ in growth pattern and in nothing else, and slides are real slides."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histoflare.errors import JobError
from histoflare.slides.manifest import read_manifest
from histoflare.slides.reader import Slide
from histoflare.slides.tissue import tissue_mask
from histoflare.synthetic.slides import (
    LABELS,
    NEUTRAL_STYLE,
    SyntheticCohort,
    hospital_style,
    make_slides,
    plan_slides,
    reference_patches,
    render_mosaic,
    render_patch,
    render_slide,
)
from histoflare.synthetic.tissue_layout import Composition, Layout, lay_out
from histoflare.synthetic.tissue_texture import render_densities

FOLDS = StratifiedGroupKFold(5, shuffle=True, random_state=0)
SMALL = SyntheticCohort(hospitals=2, slides_per_hospital=4, slides_external=2, um_field=320)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def small_cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_slides(tmp_path_factory.mktemp("slides"), SMALL)


def field(gland_share: float, seed: int, um_side: float = 400.0) -> Layout:
    composition = Composition(gland_share, 150, 13.0, 9.0, 1000, 1.0)
    return lay_out(composition, (um_side, um_side), np.random.default_rng(seed))


def um_to_lumen(layout: Layout) -> NDArray[np.float64]:
    """Distance of every nucleus to the nearest lumen's outline, negative inside."""
    lumens, nuclei = layout.lumens, layout.nuclei
    dx, dy = nuclei.um_x[:, None] - lumens.um_x, nuclei.um_y[:, None] - lumens.um_y
    nearest = np.empty((len(nuclei.um_x), len(lumens.um_x)))
    for lumen in range(len(lumens.um_x)):
        outline = lumens.um_outline(np.full(len(nuclei.um_x), lumen), np.arctan2(dy[:, lumen], dx[:, lumen]))
        nearest[:, lumen] = np.hypot(dx[:, lumen], dy[:, lumen]) - outline
    return nearest.min(1)


# the classes


def test_glands_have_their_nuclei_around_lumens_and_sheets_have_not() -> None:
    near = {
        share: np.mean([np.mean(um_to_lumen(field(share, s)) < 12) for s in range(8)]) for share in (0, 1)
    }
    assert near[1] > 2 * near[0]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_nucleus_lies_in_a_lumen(share: float) -> None:
    assert um_to_lumen(field(share, 3)).min() > 0


def test_both_patterns_have_the_same_amount_of_everything() -> None:
    amounts: dict[int, list[list[float]]] = {0: [], 1: []}
    for share, found in amounts.items():
        for seed in range(100):
            layout = field(share, seed)
            densities = render_densities(layout, (200, 200), 2.0, np.random.default_rng(seed))
            found.append(
                [
                    len(layout.nuclei.um_x),
                    densities.nuclei.mean(),
                    densities.lumens.mean(),
                    densities.hematoxylin.mean(),
                    densities.eosin.mean(),
                ]
            )
    sheets, glands = (np.mean(amounts[share], axis=0) for share in (0, 1))
    # number and area of nuclei, area of lumens, both stains; lumens are few and vary most
    assert np.all(np.abs(glands / sheets - 1) < [0.03, 0.04, 0.08, 0.04, 0.03])


def colours(cohort: SyntheticCohort) -> NDArray[np.float64]:
    """Mean and standard deviation of the tissue's RGB, one row (6,) a slide."""
    rows = []
    for slide in plan_slides(cohort):
        rgb = render_mosaic(slide, cohort.seed, 4, 84, 2.0)[0].reshape(-1, 3).astype(float)
        tissue = rgb[rgb.min(1) < 215]
        rows.append(np.concatenate([tissue.mean(0), tissue.std(0)]))
    return np.array(rows)


def accuracy(features: NDArray[np.float64], labels: list[str], patients: list[str]) -> float:
    """Share of slides told right by logistic regression, every patient held out once."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores = cross_val_score(model, features, labels, groups=patients, cv=FOLDS)
    return float(scores.mean())


@pytest.mark.slow
def test_colour_tells_the_hospitals_apart_but_not_the_classes() -> None:
    of_mean, of_all, of_sites = [], [], []
    for seed in range(3):
        cohort = SyntheticCohort(hospitals=5, external=False, slides_per_hospital=40, seed=seed)
        planned = plan_slides(cohort)
        labels, sites, patients = ([getattr(s, n) for s in planned] for n in ("label", "site", "patient"))
        features = colours(cohort)
        centred = features.copy()
        for site in set(sites):
            here = np.array(sites) == site
            centred[here] -= features[here].mean(0)
        of_mean.append(accuracy(features[:, :3], labels, patients))
        of_all.append(accuracy(centred, labels, patients))
        of_sites.append(accuracy(features, sites, patients))
    assert max(of_mean) < 0.6
    assert np.mean(of_all) < 0.6  # standard deviations too, freed of the hospital
    assert min(of_sites) > 0.6  # these features can tell something apart: chance is 0.2


# patients and hospitals


def test_patients_have_one_to_three_slides_of_one_label_in_one_split() -> None:
    per_patient = defaultdict(list)
    for slide in plan_slides(SyntheticCohort(slides_per_hospital=60, slides_external=30)):
        per_patient[slide.patient].append(slide)
    counts = [len(slides) for slides in per_patient.values()]
    assert set(counts) == {1, 2, 3}
    for slides in per_patient.values():
        assert len({(s.label, s.split, s.site, s.sex, s.age_band) for s in slides}) == 1


def test_every_site_trains_and_tests_on_both_classes_at_both_resolutions() -> None:
    cohort = SyntheticCohort(slides_per_hospital=12)
    planned = plan_slides(cohort)
    for site in ("hospital-1", "hospital-2", "hospital-3", "hospital-4"):
        found = {(s.split, s.label) for s in planned if s.site == site}
        assert found == {(split, label) for split in ("train", "test") for label in LABELS}
    assert {s.split for s in planned if s.site == "external"} == {"test"}
    assert [hospital_style(i).mpp for i in range(4)] == [0.5, 0.25, 0.5, 0.25]


@pytest.mark.parametrize("slides", [4, 5, 12, 40])
def test_a_hospital_has_as_many_slides_as_asked_for(slides: int) -> None:
    cohort = SyntheticCohort(hospitals=3, slides_per_hospital=slides, slides_external=slides)
    planned = plan_slides(cohort)
    assert {site: sum(s.site == site for s in planned) for site in cohort.sites} == dict.fromkeys(
        cohort.sites, slides
    )


def test_a_large_share_of_patients_trains() -> None:
    planned = plan_slides(SyntheticCohort(hospitals=1, external=False, slides_per_hospital=400))
    tested = {s.patient for s in planned if s.split == "test"}
    assert len(tested) / len({s.patient for s in planned}) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_shares_of_patients_without_slides_are_kept_exactly(seed: int) -> None:
    """With forty patients to train on, drawn labels would make one cohort easy and the next hard."""
    planned = plan_slides(SyntheticCohort(more_patients=80, more_external=40, seed=seed))
    more = Counter((s.site, s.split, s.label) for s in planned if not s.drawn)
    for number, most in enumerate((*LABELS, *LABELS), start=1):
        for split in ("train", "test"):
            shares = {label: more[f"hospital-{number}", split, label] for label in LABELS}
            assert shares == {label: 36 if label == most else 4 for label in LABELS}
    assert {more["external", "test", label] for label in LABELS} == {20}


def test_more_patients_without_slides_leave_the_others_as_they_were() -> None:
    few, many = (plan_slides(SyntheticCohort(external=False, more_patients=n)) for n in (7, 30))
    assert {s.slide_id: s for s in few}.items() <= {s.slide_id: s for s in many}.items()


def test_more_slides_and_hospitals_leave_the_others_as_they_were() -> None:
    few = SyntheticCohort(hospitals=2, slides_per_hospital=12, um_field=240)
    many = SyntheticCohort(hospitals=5, slides_per_hospital=30, um_field=240)
    theirs = {s.slide_id: s for s in plan_slides(many)}
    shared = [s for s in plan_slides(few) if s.slide_id in theirs]
    assert len(shared) >= 24
    assert all(theirs[s.slide_id] == s for s in shared)
    assert np.array_equal(render_slide(shared[-1], few), render_slide(theirs[shared[-1].slide_id], many))


@pytest.mark.parametrize(
    "wrong", [{"hospitals": 0}, {"slides_per_hospital": 1}, {"slides_external": 1}, {"um_field": 10.0}]
)
def test_a_cohort_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(JobError):
        SyntheticCohort(**wrong)  # type: ignore[arg-type]


# the files


def test_slides_open_in_openslide_at_their_resolution(small_cohort: dict[str, Path]) -> None:
    found = set()
    for site, manifest in small_cohort.items():
        for row in read_manifest(manifest, labels=LABELS).rows:
            assert row.site == site
            with openslide.OpenSlide(row.slide) as slide:
                mpp = float(slide.properties["openslide.mpp-x"])
                assert slide.dimensions[0] * mpp == pytest.approx(SMALL.um_field)
                assert slide.level_count > 1
                found.add(round(mpp, 4))
    assert found == {0.25, 0.5}


def test_a_part_of_each_slide_is_tissue(small_cohort: dict[str, Path]) -> None:
    for manifest in small_cohort.values():
        for row in read_manifest(manifest).rows:
            with Slide(row.slide) as slide:
                share = tissue_mask(slide.thumbnail(4.0), mpp=4.0).mean()
            assert 0.3 < share < 0.9, row.slide


def test_same_seed_same_bytes(small_cohort: dict[str, Path], tmp_path: Path) -> None:
    again = make_slides(tmp_path, SMALL)
    for site, manifest in small_cohort.items():
        assert manifest.read_bytes() == again[site].read_bytes()
        for row, other in zip(read_manifest(manifest).rows, read_manifest(again[site]).rows, strict=True):
            assert sha256(row.slide.read_bytes()) == sha256(other.slide.read_bytes())


def test_no_two_slides_are_the_same(small_cohort: dict[str, Path]) -> None:
    slides = [row.slide for path in small_cohort.values() for row in read_manifest(path).rows]
    assert len({sha256(slide.read_bytes()) for slide in slides}) == len(slides)


def test_another_seed_is_another_cohort() -> None:
    one, other = (SyntheticCohort(um_field=240, seed=seed) for seed in (0, 1))
    assert not np.array_equal(
        render_slide(plan_slides(one)[0], one), render_slide(plan_slides(other)[0], other)
    )


def test_progress_counts_every_slide(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    cohort = SyntheticCohort(hospitals=1, external=False, slides_per_hospital=2, um_field=200)
    make_slides(tmp_path, cohort, lambda done, total: ticks.append((done, total)))
    assert ticks == [(1, 2), (2, 2)]


# patches


def test_reference_patches_are_the_same_each_time_and_a_prefix_of_more() -> None:
    few, more = reference_patches(4, 64), reference_patches(6, 64)
    assert few.shape == (4, 64, 64, 3)
    assert few.dtype == np.uint8
    assert np.array_equal(few, more[:4])
    assert not np.array_equal(few, reference_patches(4, 64, seed=1))


def test_a_patch_has_the_size_asked_for() -> None:
    assert render_patch(NEUTRAL_STYLE, "glandular", 0, (90, 50), 1.0).shape == (50, 90, 3)


def test_a_mosaic_is_cut_from_one_field() -> None:
    slide = plan_slides(SMALL)[0]
    four, corners = render_mosaic(slide, 0, 4, 64, 1.0)
    assert corners.tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]
    three, _ = render_mosaic(slide, 0, 3, 64, 1.0)
    assert np.array_equal(four[:3], three)
    two, corners = render_mosaic(slide, 0, 2, 64, 1.0)
    assert two.shape == (2, 64, 64, 3) and corners.tolist() == [[0, 0], [64, 0]]
