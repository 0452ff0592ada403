from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, compute_dice
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from histoflare.errors import MaskError
from histoflare.masks import metrics
from histoflare.masks.metrics import MaskPredictions, confusion
from histoflare.masks.windows import IGNORE

LABELS = ("background", "tumour", "stroma")
Mask = NDArray[np.uint8]


def masks(seed: int, n: int = 12, k: int = 3, side: int = 8) -> tuple[list[Mask], list[Mask]]:
    """Truths (some pixels not annotated) and predictions; a class is often missing in either or both."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], []
    for _ in range(n):
        pair = []
        for _ in range(2):
            present = np.flatnonzero(rng.random(k) < 0.6)
            mask = rng.choice(present, (side, side)) if len(present) else np.zeros((side, side))
            pair.append(mask.astype(np.uint8))
        pair[0][rng.random((side, side)) < 0.1] = IGNORE
        truths.append(pair[0])
        predictions.append(pair[1])
    return truths, predictions


def table(
    truths: list[Mask],
    predictions: list[Mask],
    *,
    background: str | None = "background",
    tissues: list[NDArray[np.bool_]] | None = None,
    labels: tuple[str, ...] = LABELS,
) -> MaskPredictions:
    def matrices(given: list[Mask]) -> NDArray[np.int64]:
        found = [confusion(t, p, len(labels)) for t, p in zip(truths, given, strict=True)]
        return np.array(found, dtype=np.int64).reshape(-1, len(labels), len(labels))

    columns = {"confusion": matrices(predictions)}
    if tissues is not None:
        inside = [np.where(tissue, p, 0) for p, tissue in zip(predictions, tissues, strict=True)]
        columns["confusion_tissue"] = matrices(inside)
    names = [str(index) for index in range(len(truths))]
    return MaskPredictions(labels, background, columns, names, {}, names)


def figures(rows: MaskPredictions, weights: list[float] | None = None) -> dict[str, float]:
    given = np.array([weights if weights is not None else [1.0] * len(rows.patients)], dtype=np.float64)
    return {name: float(measure(rows.columns, given)[0]) for name, measure in rows.measures.items()}


def known(truth: Mask, predicted: Mask) -> tuple[Mask, Mask]:
    return truth[truth != IGNORE], predicted[truth != IGNORE]


def monai_scores(truth: Mask, predicted: Mask, k: int) -> NDArray[np.float64]:
    """MONAI's Dice of the foreground classes, 0 for one made up, 1 for one that is nowhere: (k - 1,)."""
    hot = [
        F.one_hot(torch.from_numpy(mask.astype(np.int64)), k).T[None, ..., None]
        for mask in known(truth, predicted)
    ]
    return compute_dice(hot[1], hot[0], include_background=False, ignore_empty=False)[0].numpy()


def mean(scores: NDArray[np.float64]) -> float:
    """Mean over images (rows) then classes, NaN left out, by hand."""
    of_classes = []
    for column in scores.T:
        values = [value for value in column if not math.isnan(value)]
        of_classes += [sum(values) / len(values)] if values else []
    return sum(of_classes) / len(of_classes)


# One row of pixels: three of the class in the truth, two in the prediction, one in both; five in all.
TRUTH = np.array([[1, 1, 1, 0, 0]], dtype=np.uint8)
PREDICTED = np.array([[0, 0, 1, 1, 0]], dtype=np.uint8)


def test_the_figures_of_a_mask_counted_by_hand() -> None:
    found = figures(table([TRUTH], [PREDICTED], labels=("background", "nucleus")))
    assert found == pytest.approx(
        {
            "dice": 2 / 5,
            "jaccard": 1 / 4,
            "dice_pooled": 2 / 5,
            "jaccard_pooled": 1 / 4,
            "pixel_accuracy": 2 / 5,
            "dice_authors": 2 / 5,
            "jaccard_authors": 1 / 4,
            "accuracy_authors": 2 / 5,
        }
    )


def test_large_images_weigh_more_in_pooled_figures_only() -> None:
    truths = [TRUTH, np.ones((10, 10), dtype=np.uint8)]
    found = figures(table(truths, [PREDICTED, truths[1]], labels=("background", "nucleus")))
    assert found["dice"] == pytest.approx((2 / 5 + 1) / 2)
    assert found["dice_pooled"] == pytest.approx(2 * 101 / (103 + 102))
    assert found["jaccard_pooled"] == pytest.approx(101 / 104)
    assert found["pixel_accuracy"] == pytest.approx(102 / 105)


@pytest.mark.parametrize("seed", range(4))
def test_confusion_is_sklearns_without_what_is_not_annotated(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_PX", 7)
    for truth, predicted in zip(*masks(seed), strict=True):
        counted = confusion(truth, predicted.astype(np.int64), 3)
        assert counted.dtype == np.int64
        np.testing.assert_array_equal(counted, confusion_matrix(*known(truth, predicted), labels=range(3)))


@pytest.mark.parametrize(
    ("truth", "predicted", "reason"),
    [
        ([[0, 1]], [[0], [1]], "MASK_SIZE"),
        ([[0, 3]], [[0, 1]], "MASK_CLASS"),
        ([[0, 1]], [[0, 3]], "MASK_CLASS"),
        ([[0, 1]], [[0, IGNORE]], "MASK_CLASS"),
        ([[0, 1]], [[0, -1]], "MASK_CLASS"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    truth: list[list[int]], predicted: list[list[int]], reason: str
) -> None:
    with pytest.raises(MaskError) as error:
        confusion(np.array(truth, dtype=np.uint8), np.array(predicted), 3)
    assert error.value.reason == reason


@pytest.mark.parametrize("seed", range(8))
def test_honest_figures_are_monais_and_sklearns_with_what_is_nowhere_left_out(seed: int) -> None:
    truths, predictions = masks(seed)
    pairs = [known(truth, predicted) for truth, predicted in zip(truths, predictions, strict=True)]
    nowhere = np.array([[not ((t == c) | (p == c)).any() for c in (1, 2)] for t, p in pairs])
    dice = np.array([monai_scores(t, p, 3) for t, p in zip(truths, predictions, strict=True)])
    jaccard = np.array([jaccard_score(t, p, labels=[1, 2], average=None, zero_division=0) for t, p in pairs])
    assert nowhere.any() and (~nowhere & (dice == 0)).any()  # both kinds of empty truth are there
    found = figures(table(truths, predictions))
    assert found["dice"] == pytest.approx(mean(np.where(nowhere, np.nan, dice)))
    assert found["jaccard"] == pytest.approx(mean(np.where(nowhere, np.nan, jaccard)))


def test_where_every_class_is_in_every_truth_dice_is_monais_metric() -> None:
    rng = np.random.default_rng(5)
    truths, predictions = (rng.integers(0, 3, (6, 16, 16), dtype=np.uint8) for _ in range(2))
    metric = DiceMetric(include_background=False, reduction="mean_batch")
    hot = [
        F.one_hot(torch.from_numpy(mask.astype(np.int64)), 3).movedim(-1, 1) for mask in (predictions, truths)
    ]
    metric(*hot)
    found = figures(table(list(truths), list(predictions)))
    assert found["dice"] == pytest.approx(float(metric.aggregate().mean()))
    assert found["dice_authors"] == pytest.approx(found["dice"])


@pytest.mark.parametrize("seed", range(4))
def test_pooled_figures_are_sklearns_of_all_pixels(seed: int) -> None:
    truths, predictions = masks(seed)
    pairs = [known(truth, predicted) for truth, predicted in zip(truths, predictions, strict=True)]
    truth, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    found = figures(table(truths, predictions))
    of = {"labels": [1, 2], "average": "macro"}
    assert found["dice_pooled"] == pytest.approx(f1_score(truth, predicted, **of))
    assert found["jaccard_pooled"] == pytest.approx(jaccard_score(truth, predicted, **of))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(truth, predicted))


@pytest.mark.parametrize("seed", range(8))
def test_authors_figures_follow_their_four_cases(seed: int) -> None:
    truths, predictions = masks(seed)
    scores: dict[str, list[list[float]]] = {"dice": [], "jaccard": [], "accuracy": []}
    for truth, predicted in zip(truths, predictions, strict=True):
        rows: dict[str, list[float]] = {name: [] for name in scores}
        for c in (1, 2):
            t, p = (mask == c for mask in known(truth, predicted))
            if t.any() and p.any():
                values = [f1_score(t, p), jaccard_score(t, p), accuracy_score(t, p)]
            elif t.any() or not p.any():
                values = [0.0 if t.any() else 1.0] * 3
            else:
                values = [math.nan] * 3
            for name, value in zip(scores, values, strict=True):
                rows[name].append(value)
        for name in scores:
            scores[name].append(rows[name])
    found = figures(table(truths, predictions))
    for name, values in scores.items():
        assert found[f"{name}_authors"] == pytest.approx(mean(np.array(values)))


def test_a_made_up_class_is_free_to_the_authors_and_not_here() -> None:
    """An image without the class, all of which is said to be of it, costs the authors' figures nothing."""
    labels = ("background", "nucleus")
    nothing = np.zeros((20, 20), dtype=np.uint8)
    before = figures(table([TRUTH], [PREDICTED], labels=labels))
    after = figures(table([TRUTH, nothing], [PREDICTED, nothing + 1], labels=labels))
    for name in before:
        if name.endswith("_authors"):
            assert after[name] == before[name]
        else:
            assert after[name] <= before[name] / 2


def test_predictions_outside_the_tissue_count_in_honest_figures_only() -> None:
    predicted = np.array([[1, 1, 1, 1, 1]], dtype=np.uint8)
    tissue = np.array([[True, True, True, False, False]])
    found = figures(table([TRUTH], [predicted], tissues=[tissue], labels=("background", "nucleus")))
    assert found["dice"] == found["dice_pooled"] == pytest.approx(6 / 8)
    assert found["pixel_accuracy"] == pytest.approx(3 / 5)
    assert found["dice_authors"] == found["jaccard_authors"] == found["accuracy_authors"] == 1


def test_without_a_background_every_class_counts() -> None:
    found = figures(table([TRUTH], [PREDICTED], background=None, labels=("other", "nucleus")))
    assert found["dice"] == pytest.approx((2 / 5 + 2 / 5) / 2)
    truth = np.array([[1, 1, 1, 1, 0]], dtype=np.uint8)
    predicted = np.array([[1, 1, 1, 0, 0]], dtype=np.uint8)
    assert figures(table([truth], [predicted], background="a", labels=("a", "b")))["dice"] == pytest.approx(
        6 / 7
    )
    found = figures(table([truth], [predicted], background=None, labels=("a", "b")))
    assert found["dice"] == pytest.approx((6 / 7 + 2 / 3) / 2)


def test_figures_that_do_not_exist_are_nan() -> None:
    labels = ("background", "nucleus")
    empty = np.zeros((4, 4), dtype=np.uint8)
    found = figures(table([empty], [empty], labels=labels))
    absent = {name for name, value in found.items() if math.isnan(value)}
    assert absent == {"dice", "jaccard", "dice_pooled", "jaccard_pooled"}
    assert {found[name] for name in set(found) - absent} == {1.0}

    unknown = figures(table([np.full_like(empty, IGNORE)], [empty + 1], labels=labels))
    assert all(math.isnan(value) for value in unknown.values())

    # Nothing of the class in the image that is drawn; the other has some of it.
    drawn = figures(table([empty, empty + 1], [empty, empty + 1], labels=labels), [1.0, 0.0])
    assert math.isnan(drawn["dice"]) and math.isnan(drawn["dice_pooled"])


def test_a_class_that_is_nowhere_is_left_out_of_the_mean_over_classes() -> None:
    assert figures(table([TRUTH], [PREDICTED]))["dice"] == pytest.approx(2 / 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(any))
def test_a_weight_is_a_repetition(seed: int, counts: list[int]) -> None:
    truths, predictions = masks(seed, n=len(counts))
    tissues = [np.arange(64).reshape(8, 8) % 5 > 0] * len(counts)
    rows = table(truths, predictions, tissues=tissues)
    chosen = [index for index, count in enumerate(counts) for _ in range(count)]
    repeated = table(
        [truths[index] for index in chosen],
        [predictions[index] for index in chosen],
        tissues=[tissues[index] for index in chosen],
    )
    both = np.array([counts, [2 * count for count in counts]], dtype=np.float64)
    for name, expected in figures(repeated).items():
        found = rows.measures[name](rows.columns, both)
        np.testing.assert_allclose(found, [expected] * 2, rtol=1e-12, err_msg=name)


def test_rows_of_two_tables_make_one() -> None:
    """The measures of one table hold for the joined columns of several."""
    parts = [table(*masks(seed, n=5)) for seed in (0, 1)]
    truths, predictions = zip(*(masks(seed, n=5) for seed in (0, 1)), strict=True)
    whole = figures(table([*truths[0], *truths[1]], [*predictions[0], *predictions[1]]))
    joined = {"confusion": np.concatenate([part.columns["confusion"] for part in parts])}
    for name, measure in parts[0].measures.items():
        assert measure(joined, np.ones((1, 10)))[0] == pytest.approx(whole[name])


def test_notes_list_each_images_dice() -> None:
    empty = np.zeros((1, 5), dtype=np.uint8)
    rows = table([TRUTH, empty], [PREDICTED, empty + 2])
    assert rows.listed() == (
        ["image", "patient", "dice_tumour", "dice_stroma"],
        [["0", "0", "0.400000", ""], ["1", "1", "", "0.000000"]],
    )


def test_tables_whose_parts_do_not_fit_are_refused() -> None:
    matrices = np.zeros((2, 3, 3), dtype=np.int64)
    two = ["a", "b"]
    for broken in (
        {"columns": {}},
        {"columns": {"confusion": matrices[:1]}},
        {"columns": {"confusion": matrices, "confusion_tissue": matrices[:, :2]}},
        {"image_ids": ["a"]},
        {"subgroups": {"sex": ["f"]}},
        {"background": "necrosis"},
    ):
        whole = {
            "labels": LABELS,
            "background": "background",
            "columns": {"confusion": matrices},
            "patients": two,
            "subgroups": {},
            "image_ids": two,
        }
        MaskPredictions(**whole)
        with pytest.raises(MaskError):
            MaskPredictions(**(whole | broken))
