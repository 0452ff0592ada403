"""What is counted of predicted masks: each patient's Dice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from histoflare.figure import Figure
from histoflare.noised_ratio import Z, estimate, is_drowned, mean_estimate
from histoflare.tally_form import Floats, Predicted, TallyForm, first_rows


@dataclass(frozen=True)
class DiceTally(TallyForm):
    """The tally of predicted masks: ``dice_patients``, the mean Dice of patients.

    A patient's Dice of a class is the mean over its images, d = 2B / (T + P) in [0, 1], and 1 where a class
    is neither in an image's truth nor in its prediction. This is not the ``dice`` of
    :class:`histoflare.masks.metrics.MaskPredictions`, which leaves such an image out: whether one has it
    would have to be counted as well.

    A row is, over Δ = √(1 + K/4) for K foreground classes: 1, then d - ½ of each, then 2d(1 - d) of each. The
    last costs nothing, for (d - ½)² + 4d²(1 - d)² <= ¼ with it as without; it says how patients differ, since
    the variance of d is μ(1 - μ) less the mean of d(1 - d).

    Attributes:
        classes: Indices of the foreground classes, one at least.
    """

    classes: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is of."""
        return "dice"

    @property
    def length(self) -> int:
        """One, and two for each class."""
        return 1 + 2 * len(self.classes)

    @property
    def norm(self) -> float:
        """Δ."""
        return math.sqrt(1 + len(self.classes) / 4)

    def rows(self, table: Predicted) -> Floats:
        """As :meth:`TallyForm.rows`."""
        names, owner = first_rows(table.patients)
        of_images = _dice(table.columns["confusion"].astype(np.float64), list(self.classes))  # (n, c)
        sums = np.zeros((len(names), len(self.classes)))
        np.add.at(sums, owner, of_images)
        dice = np.clip(sums / np.bincount(owner, minlength=len(names))[:, None], 0.0, 1.0)
        ones = np.ones((len(names), 1))
        return np.concatenate([ones, dice - 0.5, 2 * dice * (1 - dice)], axis=1) / self.norm

    def figures(self, total: Floats, std: float, *, seed: int = 0) -> dict[str, Figure]:
        """As :meth:`TallyForm.figures`; nothing is drawn."""
        std, k = std * self.norm, len(self.classes)
        counts = total * self.norm
        size = float(counts[0])
        if is_drowned(size, std):
            return {"dice_patients": Figure(None, reason="too few patients next to the noise")}
        above = float(counts[1 : 1 + k].mean()) + size / 2
        mean = min(max(above / size, 0.0), 1.0)
        alike = float(counts[1 + k :].mean()) / 2  # Σ d(1 - d)
        alike_std = std / (2 * math.sqrt(k))

        def sampling(dice: Floats) -> Floats:
            spread = np.maximum(dice * (1 - dice), mean * (1 - mean))
            return np.maximum(size * spread - max(0.0, alike - Z * alike_std), spread)

        def noise(dice: Floats) -> Floats:
            variance: Floats = std**2 * (1 / k + (0.5 - dice) ** 2)
            return variance

        found = estimate(above, size, sampling, noise)
        return {"dice_patients": Figure(*mean_estimate([found], same_patients=True))}


def _dice(matrices: Floats, classes: list[int]) -> Floats:
    """Return each image's Dice (n, c) of confusions (n, k, k); 1 for a class in neither, NaN counts as 0."""
    truth, predicted = matrices.sum(axis=2)[:, classes], matrices.sum(axis=1)[:, classes]
    both = np.einsum("nkk->nk", matrices)[:, classes]
    size = truth + predicted
    dice: Floats = np.divide(2 * both, size, out=np.ones_like(size), where=size != 0)
    return np.nan_to_num(dice, nan=0.0).clip(0.0, 1.0)
