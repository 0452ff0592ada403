from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from histoflare.bags.targets.classes import Predictions, weighted_auc
from histoflare.errors import JobError
from histoflare.rounds.evaluation import evaluate, interval_of_no_spread, merge_predictions
from tests.refusals import raises_reason


def table(
    seed: int = 0,
    n: int = 60,
    k: int = 2,
    slides_per_patient: int = 2,
    ties: bool = False,
    subgroups: dict[str, list[str | None]] | None = None,
) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + np.eye(k)[labels]
    if ties:
        logits = np.round(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    patients = [f"patient_{row // slides_per_patient}" for row in range(n)]
    return Predictions(probabilities, labels, patients, subgroups or {})


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_figures_are_sklearns(k: int, ties: bool) -> None:
    rows = table(k=k, ties=ties, n=120)
    metrics = evaluate(rows, bootstraps=0)
    predicted = rows.probabilities.argmax(axis=1)
    scores = rows.probabilities[:, 1] if k == 2 else rows.probabilities
    assert metrics["accuracy"].value == pytest.approx(accuracy_score(rows.labels, predicted))
    assert metrics["balanced_accuracy"].value == pytest.approx(
        balanced_accuracy_score(rows.labels, predicted)
    )
    assert metrics["auc"].value == pytest.approx(roc_auc_score(rows.labels, scores, multi_class="ovr"))
    assert metrics["accuracy"].low is None


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=25
    ).filter(lambda rows: len({positive for _, positive, weight in rows if weight}) == 2)
)
def test_weighted_auc_is_sklearns_with_ties_and_weights(rows: list[tuple[int, bool, int]]) -> None:
    scores = np.array([score for score, _, _ in rows], dtype=np.float64)
    positive = np.array([positive for _, positive, _ in rows])
    weights = np.array([weight for _, _, weight in rows], dtype=np.float64)
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    both = np.stack([weights, 2 * weights])
    np.testing.assert_allclose(weighted_auc(scores, positive, both), expected, rtol=1e-12)


def test_a_weight_is_a_repetition() -> None:
    """The bootstrap's weighted figures are the plain figures of the rows repeated."""
    rows = table(ties=True)
    counts = np.random.default_rng(1).integers(0, 4, len(rows.labels))
    repeated = roc_auc_score(np.repeat(rows.labels, counts), np.repeat(rows.probabilities[:, 1], counts))
    weighted = weighted_auc(rows.probabilities[:, 1], rows.labels == 1, counts[None].astype(np.float64))
    assert weighted[0] == pytest.approx(repeated)


@pytest.mark.parametrize("k", [2, 3])
def test_the_interval_is_that_of_a_plain_bootstrap_over_patients(k: int) -> None:
    rows = table(seed=3, n=80, k=k, slides_per_patient=4)
    metrics = evaluate(rows, bootstraps=4000)
    rng = np.random.default_rng(7)
    owner = np.arange(80) // 4
    accuracies, balanced, areas = [], [], []
    for _ in range(800):
        chosen = np.concatenate([np.flatnonzero(owner == patient) for patient in rng.integers(0, 20, 20)])
        labels, probabilities = rows.labels[chosen], rows.probabilities[chosen]
        accuracies.append(accuracy_score(labels, probabilities.argmax(axis=1)))
        balanced.append(balanced_accuracy_score(labels, probabilities.argmax(axis=1)))
        scores = probabilities[:, 1] if k == 2 else probabilities
        areas.append(roc_auc_score(labels, scores, multi_class="ovr"))
    for figure, plain in (
        (metrics["accuracy"], accuracies),
        (metrics["balanced_accuracy"], balanced),
        (metrics["auc"], areas),
    ):
        assert [figure.low, figure.high] == pytest.approx(list(np.percentile(plain, [2.5, 97.5])), abs=0.02)


def test_patients_are_resampled_and_not_slides() -> None:
    # Ten patients, each all right or all wrong in 20 slides: by slides the interval is 4.5 times narrower.
    right = np.repeat([True, False] * 5, 20)
    labels = np.tile([0, 1], 100)
    probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]
    by_patient = evaluate(Predictions(probabilities, labels, [f"p{i // 20}" for i in range(200)], {}))
    by_slide = evaluate(Predictions(probabilities, labels, [f"s{i}" for i in range(200)], {}))
    widths = [m["accuracy"].high - m["accuracy"].low for m in (by_patient, by_slide)]  # type: ignore[operator]
    # 2 · 1.96 · sqrt(p(1-p)/patients), p = 1/2
    assert widths[0] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 10), rel=0.15)
    assert widths[1] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 200), rel=0.15)


def test_perfect_useless_and_reversed() -> None:
    labels = np.array([0, 1] * 10)
    patients = [f"p{i}" for i in range(20)]
    for scores, area in ((labels, 1.0), (np.full(20, 0.5), 0.5), (1 - labels, 0.0)):
        auc = evaluate(Predictions(np.stack([1 - scores, scores], axis=1), labels, patients, {}))["auc"]
        a = 0.025 ** (1 / 10)  # Clopper & Pearson 1934, 10 of 10
        assert (auc.value, auc.low, auc.high) == pytest.approx((area, a * area, 1 - a * (1 - area)))


@pytest.mark.parametrize("figure", ["accuracy", "balanced_accuracy", "auc"])
@pytest.mark.parametrize("k", [2, 3])
def test_a_figure_rests_on_the_patients_of_the_class_that_fewest_have(figure: str, k: int) -> None:
    """Ten patients, one of class 1 with five slides: one is behind it, however many slides she has."""
    labels = np.array([0] * 9 + [1] * 5)
    patients = [f"p{i}" for i in range(9)] + ["only"] * 5
    always = np.zeros((14, k))
    always[:, 1] = 1.0
    found = evaluate(Predictions(always, labels, patients, {}), bootstraps=0)
    assert found[figure].patients == 1
    assert found["accuracy"].value == pytest.approx(5 / 14), "of a model that says one class, its share"
    both = evaluate(Predictions(always, labels, [*patients[:9], *patients[:5]], {}), bootstraps=0)
    assert both[figure].patients == 5, "a patient with slides of both classes is behind both"
    alone = evaluate(Predictions(always[:9], labels[:9], patients[:9], {}), bootstraps=0)
    assert alone[figure].patients == 9, "a class that nobody has has nobody to tell of"


def test_one_class_has_no_auc_and_says_why() -> None:
    rows = table()
    metrics = evaluate(Predictions(rows.probabilities, np.ones(60, dtype=np.int64), rows.patients, {}))
    assert metrics["auc"].value is None and metrics["auc"].reason == "all slides are of one class"
    assert metrics.to_json()["auc"] == {"value": None, "reason": "all slides are of one class"}
    assert metrics["accuracy"].value == metrics["balanced_accuracy"].value
    # Of three classes the one that is absent is left out of the mean.
    three = table(k=3)
    two = three.labels % 2
    expected = np.mean([roc_auc_score(two == c, three.probabilities[:, c]) for c in (0, 1)])
    auc = evaluate(Predictions(three.probabilities, two, three.patients, {}))["auc"]
    assert auc.value == pytest.approx(expected)


@pytest.mark.parametrize("patients", [1, 2, 4])
def test_few_patients_have_no_interval_and_it_is_said(patients: int) -> None:
    rows = table(n=8 * patients, slides_per_patient=8)
    accuracy = evaluate(rows)["accuracy"]
    assert accuracy.value is not None and accuracy.low is None and accuracy.high is None
    assert accuracy.no_interval is not None and accuracy.no_interval.startswith(f"{patients} patient")
    assert evaluate(rows, bootstraps=0)["accuracy"].no_interval is None, "none was asked for"


def test_a_class_of_few_patients_has_no_interval_and_no_number_is_said() -> None:
    labels = np.array([0] * 20 + [1] * 4)
    patients = [f"p{i}" for i in range(24)]
    found = evaluate(Predictions(np.eye(2)[labels], labels, patients, {}))
    for figure in found.figures.values():
        assert figure.low is None and figure.no_interval is not None and "4" not in figure.no_interval


@pytest.mark.parametrize("n", [5, 11, 40])
def test_where_all_are_right_the_interval_is_clopper_and_pearsons(n: int) -> None:
    labels = np.array([0, 1] * n)
    patients = [f"p{i}" for i in range(2 * n)]
    exact = binomtest(n, n).proportion_ci(method="exact")
    right = evaluate(Predictions(np.eye(2)[labels], labels, patients, {}))
    wrong = evaluate(Predictions(np.eye(2)[1 - labels], labels, patients, {}))
    one = evaluate(Predictions(np.eye(2)[np.ones_like(labels)], labels, patients, {}))
    for figure in right.figures.values():
        assert (figure.low, figure.high) == pytest.approx((exact.low, exact.high))
    none = binomtest(0, n).proportion_ci(method="exact")
    for figure in wrong.figures.values():
        assert (figure.low, figure.high) == pytest.approx((none.low, none.high))
    balanced = one["balanced_accuracy"]  # one class all right, the other all wrong
    assert (balanced.low, balanced.high) == pytest.approx((exact.low / 2, (1 + none.high) / 2))


def test_the_interval_without_spread_covers_the_truth_as_often_as_it_says() -> None:
    """The chance that all of n are right, and the interval then misses a share p, is at most 2.5 %."""
    for n in (5, 10, 30):
        low, _ = interval_of_no_spread(1.0, n)
        for p in np.linspace(0.01, 0.999, 200):
            assert p >= low or p**n < 0.025


def test_the_seed_and_nothing_else_makes_the_interval() -> None:
    rows = table()
    assert evaluate(rows, seed=1).to_json() == evaluate(rows, seed=1).to_json()
    assert evaluate(rows, seed=1).to_json() != evaluate(rows, seed=2).to_json()
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    evaluate(rows)
    assert (np.random.get_state()[1] == state).all()  # type: ignore[union-attr]


def test_subgroups_are_figures_of_their_own_rows_and_small_ones_are_suppressed() -> None:
    sex: list[str | None] = ["F"] * 30 + ["M"] * 18 + ["X"] * 8 + [None] * 4
    rows = table(subgroups={"sex": sex})
    metrics = evaluate(rows, bootstraps=50)  # two slides a patient: X are 4 patients
    groups = metrics.subgroups["sex"]
    assert list(groups) == ["F", "M", "X"] and groups["X"] is None
    women = groups["F"]
    assert women is not None and (women.n_slides, women.n_patients) == (30, 15)
    assert women["auc"].value == pytest.approx(roc_auc_score(rows.labels[:30], rows.probabilities[:30, 1]))
    assert metrics.to_json()["subgroups"]["sex"]["X"] == {"suppressed": True}
    assert evaluate(rows, bootstraps=50, min_patients=4).subgroups["sex"]["X"] is not None


def test_json_has_no_nan_and_no_numpy() -> None:
    one_class = Predictions(
        np.full((3, 2), 0.5), np.zeros(3, dtype=np.int64), ["a", "b", "c"], {"sex": ["F"] * 3}
    )
    for rows in (one_class, table(subgroups={"scanner": ["A", "B"] * 30})):
        text = json.dumps(evaluate(rows, bootstraps=20, min_patients=1).to_json(), allow_nan=False)
        assert set(json.loads(text)) == {
            "n_slides",
            "n_patients",
            "accuracy",
            "balanced_accuracy",
            "auc",
            "subgroups",
        }
    assert "subgroups" not in evaluate(table(), bootstraps=0).to_json()


def test_tables_of_sites_are_joined_with_patients_kept_apart() -> None:
    sites = {"a": table(0, subgroups={"sex": ["F"] * 60}), "b": table(1, n=40)}
    merged = merge_predictions(sites)
    assert len(merged.columns["labels"]) == 100 and len(set(merged.patients)) == 30 + 20
    assert merged.subgroups["site"] == ["a"] * 60 + ["b"] * 40
    assert merged.subgroups["sex"] == ["F"] * 60 + [None] * 40
    metrics = evaluate(merged, bootstraps=0)
    assert metrics.subgroups["site"]["b"] == evaluate(sites["b"], bootstraps=0)


@pytest.mark.parametrize(
    ("probabilities", "labels", "patients", "groups"),
    [
        (np.full((2, 2), 0.5), [0], ["a", "b"], {}),
        (np.full((2, 2), 0.5), [0, 1], ["a"], {}),
        (np.full((2, 1), 1.0), [0, 0], ["a", "b"], {}),
        (np.full((2, 2), 0.4), [0, 1], ["a", "b"], {}),
        (np.full((2, 2), np.nan), [0, 1], ["a", "b"], {}),
        (np.array([[1.5, -0.5], [0.5, 0.5]]), [0, 1], ["a", "b"], {}),
        (np.full((2, 2), 0.5), [0, 2], ["a", "b"], {}),
        (np.full((2, 2), 0.5), [0, -1], ["a", "b"], {}),
        (np.full((2, 2), 0.5), [0, 1], ["a", "b"], {"sex": ["F"]}),
    ],
)
def test_parts_that_do_not_fit_are_refused(probabilities, labels, patients, groups) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(JobError):
        Predictions(probabilities, np.array(labels), patients, groups)


def test_nothing_to_evaluate_is_an_error() -> None:
    with raises_reason("NOTHING_TO_EVALUATE"):
        evaluate(Predictions(np.empty((0, 2)), np.empty(0, dtype=np.int64), [], {}))


def test_a_thousand_resamples_of_two_thousand_slides_take_a_moment() -> None:
    started = time.perf_counter()
    evaluate(table(n=2000), bootstraps=1000)
    assert time.perf_counter() - started < 20.0  # 0.3 s on a quiet core
