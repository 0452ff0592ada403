"""Bags by patient: what a patient is when each patient's influence on training is to be limited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatientBatch:
    """Bags of P patients, padded to S slides of n patches.

    Attributes:
        features: (P, S, n, f) float32.
        mask: (P, S, n) bool, True where there is a patch.
        slides: (P, S) bool, True where there is a slide.
        labels: (P, S, ...), the target's values, 0 where there is no slide.
    """

    features: Tensor
    mask: Tensor
    slides: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PatientBatch:
        """Return the batch on ``device``."""
        parts = (self.features, self.mask, self.slides, self.labels)
        return PatientBatch(*(part.to(device) for part in parts))


def collate_patients(bags: Sequence[Sequence[Tensor]], labels: Sequence[Sequence[Any]]) -> PatientBatch:
    """Return bags (n_ps, f) of the slides s of patients p, padded with zeros, with their values."""
    most = max(len(of_one) for of_one in bags)
    longest = max(len(bag) for of_one in bags for bag in of_one)
    width = bags[0][0].shape[1]
    features = torch.zeros((len(bags), most, longest, width))  # (P, S, n, f)
    mask = torch.zeros((len(bags), most, longest), dtype=torch.bool)  # (P, S, n)
    slides = torch.zeros((len(bags), most), dtype=torch.bool)  # (P, S)
    like = torch.tensor(labels[0][0])
    padded = torch.zeros((len(bags), most, *like.shape), dtype=like.dtype)  # (P, S, ...)
    for p, of_one in enumerate(bags):
        for s, bag in enumerate(of_one):
            features[p, s, : len(bag)] = bag
            mask[p, s, : len(bag)] = True
            slides[p, s] = True
            padded[p, s] = torch.tensor(labels[p][s])
    return PatientBatch(features, mask, slides, padded)


def mean_over_slides(losses: Tensor, slides: Tensor) -> Tensor:
    """Return each patient's mean (P,) of ``losses`` (P, S) over the slides there are; 0 without a slide."""
    weight = slides.to(losses.dtype)  # (P, S)
    return (losses * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
