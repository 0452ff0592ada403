"""The loss of a segmentation with deep supervision: cross-entropy and Dice, annotated pixels only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from histoflare.masks.windows import IGNORE

SMOOTH = 1e-5
CROSS_ENTROPY_SHARE = 0.5
DICE_SHARE = 0.5


def segmentation_loss(outputs: Sequence[Tensor], masks: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of :func:`cross_entropy_and_dice` over a network's outputs in training.

    Args:
        outputs: Logits, each (b, k, h, w).
        masks: (b, h, w), integer: class indices, or ``IGNORE``.
        weights: One for each output, e.g. the network's ``loss_weights``.

    Raises:
        ValueError: There are not as many weights as outputs.
    """
    parts = [
        weight * cross_entropy_and_dice(logits, masks)
        for logits, weight in zip(outputs, weights, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def cross_entropy_and_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Return L = 0.5 CE + 0.5 Dice of one output.

    CE is the mean of -log p(class) over the annotated pixels of the batch. Dice is the mean over all classes,
    background included, of 1 - (2 Σ p y + s) / (Σ p² + Σ y² + s), the sums over the annotated pixels of the
    whole batch, p the softmax, y the one-hot mask and s = 1e-5; a class that is nowhere in the batch costs
    s / (Σ p² + s) less than 1.

    Without an annotated pixel the loss and its gradient are 0.

    Args:
        logits: (b, k, h, w), k >= 2.
        masks: (b, h, w), integer: class indices below k, or ``IGNORE``.
    """
    logits = logits.float()
    target = masks.long()  # (b, h, w)
    annotated = (target != IGNORE).sum().clamp(min=1)
    cross_entropy = nn.functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    dice: Tensor = _dice_loss()(logits, target[:, None])
    return CROSS_ENTROPY_SHARE * cross_entropy / annotated + DICE_SHARE * dice


@lru_cache(maxsize=1)
def _dice_loss() -> Any:
    """Return MONAI's loss as set for DHUnet; it has no state."""
    from monai.losses import DiceLoss

    return DiceLoss(
        include_background=True,
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
        ignore_index=IGNORE,
    )
