"""What is counted of predicted classes: who was taken for what, and how scores lie.

A row has two blocks, and half of its squared norm is for each:

- the confusion (true class × most probable class). A patient adds 1 in all, shared among its slides, so that
  the block's norm is at most 1;
- histograms (true class or not × bin of the class's probability): for two classes one, of the second class;
  for K > 2 one for each class against the rest, together of norm √K.

With two classes one histogram of B bins, an edge at 0.5, would do for everything, at norm 1. But then a cell
of the confusion is the sum of B/2 bins, with a variance of σ² B/2, where the block above gives it 2σ²: with
more than 4 bins, two blocks tell the accuracy better (10 bins: 2σ² and not 5σ²). Both blocks count the same
patients: what the confusion says of sums of bins makes the histograms better.

The edges of bins are steps in log-odds on both sides of 1/K, smaller near it. The scores of a model that
knows little lie there, those of one that is sure of itself near 0 and 1; bins of equal width would lump
together either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from histoflare.errors import JobError
from histoflare.figure import Figure
from histoflare.noised_ratio import Estimate, estimate, is_drowned, mean_estimate
from histoflare.tally_form import Floats, Predicted, TallyForm, first_rows

LOG_ODDS = (0.2, 0.7, 2.0, 5.0)
"""Edges of bins beyond 1/K. Where two classes' log-odds are normal and their AUC is 0.855, that of these 10
bins is at most 0.022 less for means 0.3 to 12 apart; that of 10 bins of equal width up to 0.061."""


@dataclass(frozen=True)
class ClassTally(TallyForm):
    """The tally of predicted classes.

    Figures are of patients: each counts 1, however many slides it has. ``accuracy`` and
    ``balanced_accuracy`` (the mean recall of all classes) follow from the confusion; ``auc`` from the
    histograms, so it is that of probabilities rounded to bins, of class 1 for two classes and for more the
    mean of one against the rest.

    Attributes:
        labels: The K classes, at least 2.
        log_odds: Edges of bins beyond 1/K, > 0 and ascending; the same on the other side.

    Raises:
        JobError: The two are not as said.
    """

    labels: tuple[str, ...]
    log_odds: tuple[float, ...] = LOG_ODDS

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or list(self.log_odds) != sorted(
            {each for each in self.log_odds if each > 0}
        ):
            raise JobError(
                f"A tally of classes has two classes or more and ascending edges above 0, not "
                f"{list(self.labels)} and {list(self.log_odds)}."
            )

    @property
    def name(self) -> str:
        """As the target's."""
        return "classes"

    @property
    def edges(self) -> Floats:
        """The inner edges of the bins, of probabilities: 1/K in the middle."""
        log_odds = np.array([-each for each in reversed(self.log_odds)] + [0.0, *self.log_odds])
        odds = np.exp(log_odds) / (len(self.labels) - 1)
        edges: Floats = odds / (1 + odds)
        return edges

    @property
    def bins(self) -> int:
        """How many bins there are."""
        return 2 * (len(self.log_odds) + 1)

    @property
    def curves(self) -> int:
        """How many histograms there are."""
        return 1 if len(self.labels) == 2 else len(self.labels)

    @property
    def length(self) -> int:
        """K² cells and twice the bins of each histogram."""
        return len(self.labels) ** 2 + 2 * self.bins * self.curves

    @property
    def weights(self) -> tuple[float, float]:
        """What a count of the confusion and one of a histogram is multiplied by."""
        return math.sqrt(1 / 2), math.sqrt(1 / (2 * self.curves))

    def rows(self, table: Predicted) -> Floats:
        """As :meth:`TallyForm.rows`; a slide without a class or finite probabilities counts as nothing."""
        names, owner = first_rows(table.patients)
        k, probabilities, labels = len(self.labels), table.columns["probabilities"], table.columns["labels"]
        known = np.isfinite(probabilities).all(axis=1) & (labels >= 0) & (labels < k)  # (n,)
        share = (1 / np.bincount(owner, minlength=len(names)))[owner][known]
        owner, probabilities, labels = owner[known], probabilities[known], labels[known]
        predicted = probabilities.argmax(axis=1)
        confusion = np.zeros((len(names), k, k))
        np.add.at(confusion, (owner, labels, predicted), share)
        histograms = np.zeros((len(names), self.curves, 2, self.bins))
        for curve, of_class in enumerate([1] if k == 2 else range(k)):
            place = np.searchsorted(self.edges, probabilities[:, of_class])
            if k == 2:  # a probability of 0.5 and its rounding are on the side that the class is
                half = self.bins // 2
                place = np.where(predicted == 1, np.maximum(place, half), np.minimum(place, half - 1))
            is_class = (labels == of_class).astype(np.intp)
            np.add.at(histograms, (owner, curve, is_class, place), share)
        cells, bins = self.weights
        rows = np.zeros((len(names), self.length))
        rows[:, : k * k] = cells * confusion.reshape(len(names), k * k)
        rows[:, k * k :] = bins * histograms.reshape(len(names), self.length - k * k)
        return rows

    def figures(self, total: Floats, std: float, *, seed: int = 0) -> dict[str, Figure]:
        """As :meth:`TallyForm.figures`; nothing is drawn."""
        confusion, histograms = self.counts(total)
        cell_std, bin_std = (std / weight for weight in self.weights)
        return {
            "accuracy": _accuracy(confusion, cell_std),
            "balanced_accuracy": self._balanced_accuracy(confusion, cell_std),
            "auc": self._auc(confusion, histograms, cell_std, bin_std),
        }

    def counts(self, total: Floats) -> tuple[Floats, Floats]:
        """Return the confusion (K, K) and the histograms (curves, 2, bins) of a sum, in patients."""
        k = len(self.labels)
        cells, bins = self.weights
        return (
            total[: k * k].reshape(k, k) / cells,
            total[k * k :].reshape(self.curves, 2, self.bins) / bins,
        )

    def _balanced_accuracy(self, confusion: Floats, std: float) -> Figure:
        k = len(confusion)
        sizes = confusion.sum(axis=1)
        drowned = [is_drowned(size, std * math.sqrt(k)) for size in sizes]
        if any(drowned):
            return self._too_few(drowned.index(True))
        recalls = [
            estimate(
                right,
                size,
                lambda recall, size=size: size * recall * (1 - recall),  # type: ignore[misc]
                lambda recall: std**2 * ((1 - recall) ** 2 + (k - 1) * recall**2),
                step=0.5,
            )
            for right, size in zip(np.diag(confusion), sizes, strict=True)
        ]
        return Figure(*mean_estimate(recalls, same_patients=False))

    def _auc(self, confusion: Floats, histograms: Floats, cell_std: float, bin_std: float) -> Figure:
        k = len(self.labels)
        areas = []
        for curve, of_class in enumerate([1] if k == 2 else range(k)):
            sides = []
            for is_class in (0, 1):
                cells = confusion[[label for label in range(k) if (label == of_class) == bool(is_class)]]
                # of two classes each half of the bins is one cell; else all bins are the cells together
                known = cells[0] if k == 2 else np.array([cells.sum()])
                behind = 1 if k == 2 else cells.size
                sides.append(_Side.fitted(histograms[curve, is_class], bin_std, known, cell_std**2 * behind))
            for is_class, side in enumerate(sides):
                if is_drowned(side.size, side.size_std):
                    return self._too_few(of_class, rest=not is_class)
            areas.append(_area(*sides))
        return Figure(*mean_estimate(areas, same_patients=True))

    def _too_few(self, label: int, *, rest: bool = False) -> Figure:
        who = "other than" if rest else "of"
        return Figure(None, reason=f"too few patients {who} {self.labels[label]} next to the noise")


def _accuracy(confusion: Floats, std: float) -> Figure:
    """Return the share of patients whose class was found."""
    k, size = len(confusion), float(confusion.sum())
    if is_drowned(size, std * k):
        return Figure(None, reason="too few patients next to the noise")
    share_right = estimate(
        float(np.trace(confusion)),
        size,
        lambda share: size * share * (1 - share),
        lambda share: std**2 * k * ((1 - share) ** 2 + (k - 1) * share**2),
        step=0.5,
    )
    return Figure(*mean_estimate([share_right], same_patients=True))


@dataclass(frozen=True)
class _Side:
    """How the scores of those of a class, or of the others, lie.

    Attributes:
        counts: (bins,), with noise. covariance: (bins, bins), of that noise.
    """

    counts: Floats
    covariance: Floats

    @classmethod
    def fitted(cls, counts: Floats, std: float, known: Floats, variance: float) -> _Side:
        """Return a histogram made better by what else is known of sums of its bins (least squares).

        Args:
            counts: (bins,), with noise of ``std`` in each.
            known: (parts,), the sum of each of as many equal parts of the bins, with noise of ``variance``.
        """
        of_part = len(counts) // len(known)
        parts = np.repeat(np.eye(len(known)), of_part, axis=0)  # (bins, parts)
        both = of_part * std**2 + variance  # of the difference between the two sums of a part
        gain = std**2 / both if both else 0.0
        fitted = counts + parts @ (known - counts @ parts) * gain
        return cls(fitted, std**2 * (np.eye(len(counts)) - gain * parts @ parts.T))

    @property
    def size(self) -> float:
        return float(self.counts.sum())

    @property
    def size_std(self) -> float:
        return math.sqrt(max(0.0, float(self.covariance.sum())))


def _area(negative: _Side, positive: _Side) -> Estimate:
    """Return the AUC of two histograms, ties counted half.

    Above is Σ_gh P_g N_h k_gh with k = 1, ½ or 0, below is P N. The noise's part of the variance has no bias,
    though it is computed of noised counts. That of sampling is Newcombe's (2006, Statistics in Medicine
    25:559-573, method 5), a function of the AUC and the sizes that holds for few patients. Where scores lie
    in an unusual way and the histograms say more, it is what they say (DeLong 1988, Biometrics 44:837-845,
    less what their noise adds), but no more than an AUC can have.
    """
    bins = len(positive.counts)
    kernel = np.tril(np.ones((bins, bins)), -1) + np.eye(bins) / 2  # k_gh: g of a positive, h of a negative
    p, n = positive.size, negative.size
    of_p, of_n = kernel @ negative.counts, kernel.T @ positive.counts  # what each bin's patient adds
    left, right = positive.covariance, negative.covariance

    def noise(area: Floats) -> Floats:
        by_p, by_n = of_p - area[:, None] * n, of_n - area[:, None] * p  # (t, bins)
        seen = ((by_p @ left) * by_p).sum(axis=1) + ((by_n @ right) * by_n).sum(axis=1)
        both = np.trace(kernel.T @ left @ kernel @ right) + area**2 * left.sum() * right.sum()
        both = both - 2 * area * (left @ kernel @ right).sum()  # of noise times noise, which seen has twice
        variance: Floats = np.maximum(seen - both, both)
        return variance

    def sampling(area: Floats) -> Floats:
        others = max(0.0, (p + n) / 2 - 1)
        usual = p * n * area * (1 - area) * (1 + others * ((1 - area) / (2 - area) + area / (1 + area)))
        seen = _spread(positive.counts, of_p, n, kernel, right, area)
        seen += _spread(negative.counts, of_n, p, kernel.T, left, area)
        most = p * n * max(p, n) * np.maximum(area * (1 - area), found * (1 - found))
        variance: Floats = np.maximum(usual, np.minimum(seen, most))
        return variance

    won = float(positive.counts @ of_p)
    found = min(max(won / (p * n), 0.0), 1.0)
    return estimate(won, p * n, sampling, noise)


def _spread(
    counts: Floats, added: Floats, others: float, kernel: Floats, covariance: Floats, area: Floats
) -> Floats:
    """Return what those of one side give to the variance of D by how they differ: (t,).

    Args:
        counts: (bins,), of that side. added: (bins,), what one in each bin adds to the pairs won.
        others: How many are on the other side. covariance: (bins, bins), of the noise of their histogram.
        kernel: (bins, bins), that side first. area: (t,).
    """
    moved = added - area[:, None] * others  # (t, bins)
    noise = np.einsum("gh,hj,gj->g", kernel, covariance, kernel) + area[:, None] ** 2 * covariance.sum()
    noise = noise - 2 * area[:, None] * (kernel @ covariance.sum(axis=1))
    spread: Floats = (moved**2 - noise) @ counts
    return spread
