"""Bags of generated tissue: the classes can be learnt from encoded patches, on patients never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histoflare.bags.bag import read_bag
from histoflare.bags.cohort import load_cohort
from histoflare.bags.encoder import load_encoder
from histoflare.bags.targets.classes import Classes
from histoflare.errors import JobError
from histoflare.slides.manifest import read_manifest
from histoflare.synthetic.bags import FieldParameters, make_bags
from histoflare.synthetic.slides import LABELS, SyntheticCohort

FOLDS = StratifiedGroupKFold(5, shuffle=True, random_state=0)
TINY = SyntheticCohort(hospitals=2, slides_per_hospital=4, slides_external=2)
FIELD = FieldParameters(patches=4, patch_px=32, mpp=2.0)


class MeanColour:
    """An encoder that a test can follow: mean RGB."""

    def __init__(self) -> None:
        self.id = "mean-colour"
        self.features = 3
        self.preprocessing = None
        self.calls = 0

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return patches.float().mean(dim=(2, 3))


def test_bags_make_cohorts_that_load(tmp_path: Path) -> None:
    manifests = make_bags(tmp_path, MeanColour(), TINY, FIELD)
    for site, path in manifests.items():
        manifest = read_manifest(path, check_files=False)
        cohort = load_cohort(
            site, manifest, path.parent / "bags", Classes(tuple(LABELS)), "mean-colour", mpp=2.0, patch_px=32
        )
        assert len(cohort.records) == TINY.sites[site]
        assert cohort.features(cohort.records[0]).shape == (4, 3)
        assert len(cohort.test) == (2 if site == "external" else len(cohort.records) - len(cohort.train))


def test_bags_that_are_there_are_kept_and_changed_ones_made_again(tmp_path: Path) -> None:
    first = MeanColour()
    make_bags(tmp_path, first, TINY, FIELD)
    assert first.calls == 10
    again = MeanColour()
    ticks: list[tuple[int, int]] = []
    make_bags(tmp_path, again, TINY, FIELD, lambda done, total: ticks.append((done, total)))
    assert again.calls == 0
    assert ticks[-1] == (10, 10)
    next(tmp_path.glob("hospital-1/bags/*.h5")).unlink()
    make_bags(tmp_path, again, TINY, FIELD)
    assert again.calls == 1
    make_bags(tmp_path, again, TINY, FieldParameters(patches=9, patch_px=32, mpp=2.0))
    assert again.calls == 11


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_bags(tmp_path / name, MeanColour(), TINY, FIELD)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.h5"))
    assert len(files) == 10
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("wrong", [{"patches": 0}, {"patch_px": 8}, {"mpp": 50.0}, {"patches": 10**6}])
def test_fields_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(JobError):
        FieldParameters(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[NDArray[np.float32], list[str], list[str]]:
    """Features (slides, 9, 1024) by densenet121-random of 160 slides of 4 hospitals, labels, patients.

    The patches are those of the jobs in an eighth of their pixels, which takes an eighth of the time.
    """
    cohort = SyntheticCohort(hospitals=4, external=False, slides_per_hospital=40)
    field = FieldParameters(patch_px=80, mpp=1.4)
    manifests = make_bags(tmp_path_factory.mktemp("bags"), load_encoder("densenet121-random"), cohort, field)
    features, labels, patients = [], [], []
    for path in manifests.values():
        manifest = read_manifest(path, check_files=False)
        for row in manifest.rows:
            features.append(read_bag(path.parent / "bags" / f"{manifest.row_id(row)}.h5").features)
            labels.append(row.label)
            patients.append(row.patient)
    return np.stack(features), labels, patients


def accuracy(features: NDArray[np.float32], labels: list[str], patients: list[str]) -> float:
    """Share of slides told right by logistic regression, every patient held out once."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=2000))
    scores = cross_val_score(model, features, labels, groups=patients, cv=FOLDS)
    return float(scores.mean())


@pytest.mark.slow
def test_random_features_tell_the_classes_apart_and_one_patch_is_too_little(
    encoded: tuple[NDArray[np.float32], list[str], list[str]],
) -> None:
    features, labels, patients = encoded
    whole = accuracy(features.mean(1), labels, patients)
    one_patch = np.mean([accuracy(features[:, patch], labels, patients) for patch in range(4)])
    assert whole > 0.8
    assert 0.5 < one_patch < whole - 0.08


@pytest.mark.slow
def test_shuffled_labels_give_chance(
    encoded: tuple[NDArray[np.float32], list[str], list[str]],
) -> None:
    features, labels, patients = encoded
    names = sorted(set(patients))
    accuracies = []
    for seed in range(6):
        # by patient: slides of one patient look alike and must keep one label
        label_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % 2, strict=True))
        shuffled = [LABELS[label_of[patient]] for patient in patients]
        accuracies.append(accuracy(features.mean(1), shuffled, patients))
    assert len(labels) == 160
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.09)
