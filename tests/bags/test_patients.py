"""Slides by patient, and their padded batches."""

from __future__ import annotations

import math

import torch

from histoflare.bags.patients import collate_patients, mean_over_slides


def test_a_batch_is_padded_in_slides_and_in_patches() -> None:
    batch = collate_patients([[torch.ones(2, 3), torch.ones(4, 3)], [torch.ones(1, 3)]], [[1, 2], [1]])
    assert batch.features.shape == (2, 2, 4, 3) and batch.features.dtype == torch.float32
    assert batch.mask.sum(dim=2).tolist() == [[2, 4], [1, 0]]
    assert batch.slides.tolist() == [[True, True], [True, False]]
    assert batch.labels.tolist() == [[1, 2], [1, 0]]
    assert batch.features.sum() == 7 * 3 and bool((batch.features[~batch.mask] == 0).all())


def test_a_mean_is_over_the_slides_there_are() -> None:
    losses = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    slides = torch.tensor([[True, True], [True, False], [False, False]])
    assert mean_over_slides(losses, slides).tolist() == [2.0, 5.0, 0.0]
    assert math.isfinite(float(mean_over_slides(torch.zeros(1, 0), torch.zeros((1, 0), dtype=torch.bool))))
