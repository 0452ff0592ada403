"""The tally of classes: rows against a loop over slides, figures against truths that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from histoflare.bags.targets.class_tally import ClassTally, _Side
from histoflare.bags.targets.classes import Classes, Predictions
from histoflare.rounds.evaluation import evaluate
from tests.refusals import raises_reason

TWO = ClassTally(("benign", "tumour"))
THREE = ClassTally(("a", "b", "c"))


def draw(rng: np.random.Generator, form: ClassTally, n: int, slides: int = 1, **settings: Any) -> Predictions:
    """Return predictions of n patients; ``gap`` sets how good they are, ``sure`` how far from 1/K."""
    k, gap, sure = len(form.labels), settings.get("gap", 1.5), settings.get("sure", 1.0)
    labels = rng.choice(k, size=n, p=settings.get("shares"))
    labels = np.repeat(labels, slides)
    logits = rng.normal(size=(n * slides, k))
    logits[np.arange(n * slides), labels] += gap
    powers = np.exp(sure * logits)
    names = [f"p{index // slides}" for index in range(n * slides)]
    return Predictions(powers / powers.sum(axis=1, keepdims=True), labels, names, {})


def pairs(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the AUC by looking at all pairs."""
    over = np.sign(scores[positive][:, None] - scores[~positive][None, :])
    return float((over.mean() + 1) / 2)


@pytest.mark.parametrize("form", [TWO, THREE, ClassTally(tuple("abcdefgh")), ClassTally(("a", "b"), (1.0,))])
def test_rows_by_hand(form: ClassTally) -> None:
    table = draw(np.random.default_rng(0), form, 9, slides=3)
    rows = form.rows(table)
    k, curves = len(form.labels), [1] if len(form.labels) == 2 else range(len(form.labels))
    assert rows.shape == (9, form.length)
    confusion, histograms = np.zeros((9, k, k)), np.zeros((9, len(curves), 2, form.bins))
    for index, (chances, label) in enumerate(zip(table.probabilities, table.labels, strict=True)):
        patient = index // 3
        confusion[patient, label, int(np.argmax(chances))] += 1 / 3
        for curve, of_class in enumerate(curves):
            log_odds = math.log(chances[of_class] / (1 - chances[of_class])) + math.log(k - 1)
            edges = [-each for each in form.log_odds] + [0.0, *form.log_odds]
            histograms[patient, curve, int(label == of_class), sum(log_odds > edge for edge in edges)] += (
                1 / 3
            )
    np.testing.assert_allclose(rows[:, : k * k], confusion.reshape(9, -1) * math.sqrt(1 / 2))
    expected = histograms.reshape(9, -1) * math.sqrt(1 / 2 / len(curves))
    np.testing.assert_allclose(rows[:, k * k :], expected)
    found = form.counts(rows.sum(axis=0))
    np.testing.assert_allclose(found[0], confusion.sum(axis=0))
    np.testing.assert_allclose(found[1], histograms.sum(axis=0))


@pytest.mark.parametrize(("form", "slides"), product([TWO, THREE, ClassTally(tuple("abcdefgh"))], [1, 4]))
def test_a_row_has_norm_one_at_most(form: ClassTally, slides: int) -> None:
    norms = np.linalg.norm(form.rows(draw(np.random.default_rng(1), form, 50, slides)), axis=1)
    assert norms.max() <= 1 + 1e-12
    if slides == 1:
        np.testing.assert_allclose(norms, 1.0)  # nothing of the room is given away


def test_a_row_is_of_its_patient_alone() -> None:
    table = draw(np.random.default_rng(2), THREE, 6, slides=2)
    rows = THREE.rows(table)
    for patient in range(6):
        own = slice(2 * patient, 2 * patient + 2)
        alone = Predictions(table.probabilities[own], table.labels[own], table.patients[own], {})
        np.testing.assert_array_equal(THREE.rows(alone), rows[patient : patient + 1])


class Raw:
    """A table that nobody has checked."""

    def __init__(self, probabilities: Any, labels: Any, patients: Sequence[str]) -> None:
        self.columns = {"probabilities": np.array(probabilities), "labels": np.array(labels)}
        self.patients = patients


def test_what_is_undefined_is_no_error() -> None:
    wrong = [[np.nan, np.nan], [np.inf, 0.0], [0.5, 0.5], [0.5, 0.5], [1e9, -1e9], [0.2, 0.8]]
    rows = TWO.rows(Raw(wrong, [0, 1, 7, -1, 0, 1], [f"p{index}" for index in range(6)]))
    assert not rows[:4].any() and np.isfinite(rows).all()
    assert np.linalg.norm(rows, axis=1).max() <= 1 + 1e-12 and rows[5].any()
    assert TWO.rows(Raw(np.zeros((0, 2)), np.zeros(0, int), [])).shape == (0, TWO.length)
    half = TWO.rows(Raw([[np.nan, np.nan], [0.2, 0.8]], [1, 1], ["p", "p"]))
    assert half.sum() == pytest.approx(rows[5].sum() / 2)  # the other slide's share is nobody's


def test_each_half_of_the_bins_is_a_cell() -> None:
    near = 0.5 + np.array([-1e-9, -1e-17, 0.0, 1e-17, 1e-16, 1e-9])
    table = Raw(np.stack([1 - near, near], axis=1), [0, 1] * 3, [f"p{index}" for index in range(6)])
    rounded = Raw([[0.5 + 2e-9, 0.5 + 1e-9], [0.5 - 2e-9, 0.5 - 1e-9]], [0, 1], ["p", "q"])
    for each in (table, rounded, draw(np.random.default_rng(3), TWO, 60)):
        confusion, histograms = TWO.counts(TWO.rows(each).sum(axis=0))
        np.testing.assert_allclose(histograms[0].reshape(2, 2, -1).sum(axis=2), confusion)


@pytest.mark.parametrize("form", [TWO, THREE])
def test_without_noise_figures_are_those_of_the_table(form: ClassTally) -> None:
    table = draw(np.random.default_rng(4), form, 90)
    found, raw = form.figures(form.rows(table).sum(axis=0), 0.0, seed=0), evaluate(table)
    assert list(found) == list(raw.figures)
    for name in ("accuracy", "balanced_accuracy"):
        assert found[name].value == pytest.approx(raw[name].value)
    curves = [1] if len(form.labels) == 2 else range(len(form.labels))
    binned = [
        pairs(np.searchsorted(form.edges, table.probabilities[:, each]), table.labels == each)
        for each in curves
    ]
    assert found["auc"].value == pytest.approx(np.mean(binned))
    assert found["auc"].value == pytest.approx(raw["auc"].value, abs=0.03)


def test_a_patient_counts_once_however_many_slides() -> None:
    chances = [[0.1, 0.9]] * 4 + [[0.9, 0.1]] * 2
    table = Predictions(np.array(chances), np.array([1, 1, 1, 1, 1, 0]), ["p"] * 4 + ["q", "r"], {})
    found = TWO.figures(TWO.rows(table).sum(axis=0), 0.0, seed=0)
    assert found["accuracy"].value == pytest.approx(2 / 3)  # of slides it is 5/6
    assert found["balanced_accuracy"].value == pytest.approx(3 / 4)


def test_two_blocks_tell_a_cell_better_than_one_histogram() -> None:
    """Noise of variance 1: a cell gets 2, and B/2 = 5 where it has to be added up from a histogram."""
    noise = np.random.default_rng(5).normal(size=(20_000, TWO.length))
    cells = np.array([TWO.counts(each)[0][1, 1] for each in noise])
    added = noise[:, 4 : 4 + TWO.bins // 2].sum(axis=1)  # of a histogram alone, at norm 1
    assert np.var(cells) == pytest.approx(2.0, rel=0.05)
    assert np.var(added) == pytest.approx(TWO.bins / 2, rel=0.05) and TWO.bins == 10


@pytest.mark.parametrize("parts", [1, 2])
def test_a_histogram_is_made_better_by_its_sums(parts: int) -> None:
    rng = np.random.default_rng(6)
    truth = np.arange(8.0)
    sums = truth.reshape(parts, -1).sum(axis=1)
    fits = [
        _Side.fitted(truth + rng.normal(0, 2, 8), 2.0, sums + rng.normal(0, 1.5, parts), 2.25)
        for _ in range(20_000)
    ]
    counts = np.array([fit.counts for fit in fits])
    np.testing.assert_allclose(counts.mean(axis=0), truth, atol=0.06)
    np.testing.assert_allclose(np.cov(counts.T), fits[0].covariance, atol=0.12)
    # the sum, known in two ways, is as well known as both together say
    assert fits[0].size_std ** 2 == pytest.approx(1 / (1 / 32 + 1 / (2.25 * parts)))
    bare = _Side.fitted(truth, 0.0, sums, 0.0)
    assert not bare.covariance.any() and (bare.counts == truth).all()


def test_a_class_that_the_noise_drowns_has_no_figure() -> None:
    table = draw(np.random.default_rng(7), TWO, 40, shares=(0.95, 0.05))
    total = TWO.rows(table).sum(axis=0)
    found = TWO.figures(total, 1.0, seed=0)
    assert found["accuracy"].value is not None
    for name in ("balanced_accuracy", "auc"):
        assert found[name].value is None and "tumour" in str(found[name].reason)
    for figure in TWO.figures(total, 50.0, seed=0).values():
        assert figure.value is None and figure.reason
    for figure in TWO.figures(np.zeros(TWO.length), 0.0, seed=0).values():
        assert figure.value is None  # nobody at all
    assert "reason" in found["auc"].to_json() and found["auc"].patients == 0


def test_figures_are_the_same_again_and_keep_their_range() -> None:
    rng = np.random.default_rng(8)
    for form, size in product((TWO, THREE), (10, 100)):
        total = form.rows(draw(rng, form, size)).sum(axis=0) + rng.normal(0, 0.5, form.length)
        once, again = (form.figures(total, 0.5, seed=seed) for seed in (0, 1))
        assert once == again
        for figure in once.values():
            if figure.value is not None:
                assert 0 <= figure.low <= figure.value <= figure.high <= 1  # type: ignore[operator]


CASES = {
    "two even classes": (TWO, {}),
    "few of one class": (TWO, {"shares": (0.8, 0.2)}),
    "nearly perfect": (TWO, {"gap": 4.0}),
    "chance": (TWO, {"gap": 0.0}),
    "three classes": (THREE, {"gap": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_truth(case: str) -> None:
    """Patients of 1 and of 4 sites are drawn, asked about and noised; how many intervals hold the truth."""
    form, settings = CASES[case]
    rng = np.random.default_rng(9)
    everybody = draw(rng, form, 4000, **settings)  # drawn from, with replacement: their figures are the truth
    raw, rows = evaluate(everybody, bootstraps=0), form.rows(everybody)
    for sites, std in product((1, 4), (0.0, 0.8, 2.0)):
        held: dict[str, list[bool]] = {name: [] for name in raw.figures}
        noise = std * math.sqrt(sites)  # each has its own
        for _ in range(300):
            total = rows[rng.integers(len(rows), size=40 * sites)].sum(axis=0)
            total = total + rng.normal(size=form.length) * noise
            for name, figure in form.figures(total, noise, seed=0).items():
                if figure.value is not None:
                    held[name].append(figure.low <= raw[name].value <= figure.high)  # type: ignore[operator]
        for name, each in held.items():
            # where the noise drowns nearly all of them there is no share to speak of
            assert len(each) < 100 or np.mean(each) >= 0.92, (case, sites, std, name, np.mean(each))
        assert len(held["accuracy"]) > 250, (case, sites, std)
        if std < 1 and sites == 4:
            assert min(map(len, held.values())) > 250, (case, sites, std)


def test_it_is_the_tally_of_the_target() -> None:
    assert Classes(("a", "b", "c")).tally_form == THREE and THREE.name == Classes.name
    for wrong in ((("a",), (1.0,)), (("a", "b"), (1.0, 0.5)), (("a", "b"), (0.0, 1.0))):
        with raises_reason("JOB_INVALID"):
            ClassTally(*wrong)
