"""The tally of masks: rows by hand, and how often intervals hold a truth that is known."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from histoflare.masks.dice_tally import DiceTally
from histoflare.masks.metrics import MaskPredictions

from .made import TASK

ONE = DiceTally((1,))
TWO = DiceTally((1, 2))


class Raw:
    """Confusions that nobody has checked."""

    def __init__(self, matrices: list[list[list[float]]], patients: list[str]) -> None:
        self.columns = {"confusion": np.array(matrices)}
        self.patients = patients


def test_rows_by_hand() -> None:
    """Classes 1 and 2: Dice 0.8 and absent; missed and made up; two images of one patient."""
    matrices = [
        [[10, 1, 0], [1, 4, 0], [0, 0, 0]],
        [[10, 0, 3], [5, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 6, 0], [0, 0, 2]],
        [[4, 0, 0], [0, 0, 0], [4, 0, 0]],
    ]
    rows = TWO.rows(Raw(matrices, ["p", "q", "r", "r"]))
    dice = np.array([[0.8, 1.0], [0.0, 0.0], [1.0, 0.5]])
    expected = np.concatenate([np.ones((3, 1)), dice - 0.5, 2 * dice * (1 - dice)], axis=1)
    np.testing.assert_allclose(rows, expected / math.sqrt(1 + 2 / 4))
    assert rows.shape == (3, TWO.length)


def test_what_is_undefined_is_a_constant() -> None:
    matrices = [
        [[np.nan, 0], [0, 0]],
        [[np.nan, np.nan], [np.nan, np.nan]],
        [[0, -5], [1, np.inf]],
        [[0, 0], [0, 0]],
    ]
    with np.errstate(invalid="ignore"):
        rows = ONE.rows(Raw(matrices, list("pqrs"))) * ONE.norm
    assert np.isfinite(rows).all() and np.linalg.norm(rows / ONE.norm, axis=1).max() <= 1 + 1e-12
    assert (rows[1, 1], rows[3, 1]) == (-0.5, 0.5)  # NaN is 0; in neither is 1


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_row_has_norm_one_at_most(classes: int) -> None:
    """The norm is 1 where each Dice is 0, 1/2 or 1, and less between."""
    form = DiceTally(tuple(range(1, classes + 1)))
    norms = []
    for right in range(0, 101, 5):  # per cent, Dice likewise
        matrix = np.diag([1.0, *[right] * classes])
        matrix[0, 1:] = matrix[1:, 0] = 100 - right
        norms.append(float(np.linalg.norm(form.rows(Raw([matrix.tolist()], ["p"])))))
    whole = [index for index, norm in enumerate(norms) if norm == pytest.approx(1.0)]
    assert whole == [0, 10, 20] and max(norms) <= 1 + 1e-12


def tallied(form: DiceTally, dice: np.ndarray) -> np.ndarray:
    """Return the sum of the rows of patients with Dice (n, c), by the definition."""
    rows = np.concatenate([np.ones((len(dice), 1)), dice - 0.5, 2 * dice * (1 - dice)], axis=1)
    total: np.ndarray = rows.sum(axis=0) / math.sqrt(1 + len(form.classes) / 4)
    return total


def test_without_noise_it_is_the_mean_of_patients() -> None:
    dice = np.random.default_rng(0).beta(6, 2, (60, 2))
    (name, figure), *others = TWO.figures(tallied(TWO, dice), 0.0, seed=0).items()
    assert (name, others) == ("dice_patients", []) and figure.value == pytest.approx(dice.mean())
    assert figure.low < dice.mean() < figure.high and figure.patients == 0  # type: ignore[operator]


def test_no_spread_is_no_certainty() -> None:
    (figure,) = ONE.figures(tallied(ONE, np.ones((20, 1))), 0.0, seed=0).values()
    assert figure.value == 1.0 and figure.high == 1.0
    assert figure.low == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)  # Wilson's of 20 out of 20


def test_what_the_noise_drowns_has_no_figure() -> None:
    for form, size, std in ((ONE, 6, 2.0), (TWO, 0, 0.0), (TWO, 3, 1.0)):
        (figure,) = form.figures(tallied(form, np.full((size, len(form.classes)), 0.8)), std, seed=0).values()
        assert figure.value is None and figure.reason


KINDS = {
    "usual": lambda rng, n: rng.beta(8, 2, n),
    "all or nothing": lambda rng, n: rng.beta(0.2, 0.1, n),
    "some missed": lambda rng, n: np.where(rng.random(n) < 0.1, 0.0, rng.beta(12, 2, n)),
    "some absent": lambda rng, n: np.where(rng.random(n) < 0.4, 1.0, rng.beta(6, 3, n)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_the_truth(kind: str) -> None:
    """Two classes of a patient are alike, which an interval must allow for."""
    rng = np.random.default_rng(1)

    def draw(n: int) -> np.ndarray:
        return np.clip(KINDS[kind](rng, n)[:, None] + rng.normal(0, 0.05, (n, 2)), 0, 1)

    truth = draw(400_000).mean()
    for sites, std in product((1, 4), (0.0, 0.8, 2.0)):
        noise, held = std * math.sqrt(sites), []
        for _ in range(300):
            total = tallied(TWO, draw(40 * sites)) + rng.normal(size=TWO.length) * noise
            (figure,) = TWO.figures(total, noise, seed=0).values()
            assert 0 <= figure.low <= figure.value <= figure.high <= 1  # type: ignore[operator]
            held.append(figure.low <= truth <= figure.high)  # type: ignore[operator]
        assert np.mean(held) >= 0.92, (kind, sites, std, np.mean(held))


def test_it_is_the_tally_of_the_task_under_a_name_of_its_own() -> None:
    kept = [index for index, label in enumerate(TASK.labels) if label != TASK.background]
    form = TASK.tally_form
    assert isinstance(form, DiceTally) and list(form.classes) == kept
    n = len(TASK.labels)
    empty = np.zeros((0, n, n), np.int64)
    table = MaskPredictions(TASK.labels, TASK.background, {"confusion": empty}, [], {}, [])
    assert "dice_patients" not in table.measures and form.rows(table).shape == (0, form.length)
