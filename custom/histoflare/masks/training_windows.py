"""Which windows of a cohort a network is trained on."""

from __future__ import annotations

import numpy as np

from histoflare.masks.images import ImageCohort, ImageRecord
from histoflare.masks.windows import IGNORE, resize_mask, window_grid


def training_windows(
    cohort: ImageCohort,
    window_px: int,
    stride_px: int,
    *,
    patch_px: int | None = None,
    split: str = "train",
) -> list[tuple[ImageRecord, tuple[int, int]]]:
    """Return the windows (record, corner) of ``split`` that have something to learn from.

    Those whose mask, as the network sees it at ``patch_px``, is :data:`~histoflare.masks.windows.IGNORE`
    throughout are left out. The list is made once a cohort; do not write to it.

    Raises:
        MaskError: An image is smaller than a window, or its mask cannot be read any more.
        JobError: As :func:`~histoflare.masks.windows.window_grid`.
    """
    key = (split, window_px, stride_px, patch_px)
    if key not in cohort.cache.grids:
        cohort.cache.grids[key] = [
            window
            for record in cohort.of_split(split)
            for window in image_windows(cohort, record, window_px, stride_px, patch_px=patch_px)
        ]
    return cohort.cache.grids[key]


def image_windows(
    cohort: ImageCohort,
    record: ImageRecord,
    window_px: int,
    stride_px: int,
    *,
    patch_px: int | None = None,
) -> list[tuple[ImageRecord, tuple[int, int]]]:
    """Return the same of one image; no other file is read."""
    key = (str(record.image), str(record.mask), window_px, stride_px, patch_px)
    if key not in cohort.cache.grids:
        mask = cohort.read_mask(record)
        windows = []
        for x, y in window_grid((mask.shape[1], mask.shape[0]), window_px, stride_px):
            inside = mask[y : y + window_px, x : x + window_px]
            if np.any(resize_mask(inside, patch_px or window_px) != IGNORE):
                windows.append((record, (x, y)))
        cohort.cache.grids[key] = windows
    return [(record, corner) for _, corner in cohort.cache.grids[key]]
