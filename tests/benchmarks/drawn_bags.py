"""Bags of numbers that are drawn: neither tissue nor an encoder, for what takes thousands of patients.

A patient has one slide and so one bag. Along one direction of feature space, the same for all hospitals of
a seed, a patient lies at a place of its own, drawn about ``+separation`` or ``-separation`` by its class,
with a standard deviation of 1. Patches lie about their patient's place, with a standard deviation of 1 in
every feature, and each hospital has an offset of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tests.benchmarks.bags_in_memory import Bags, Slide

OFFSET = 0.05
"""Standard deviation of a hospital's offset, in each feature; that of a patch is 1."""


@dataclass(frozen=True)
class Drawn:
    """What bags are like.

    Attributes:
        features: f, length of a patch's vector.
        patches: n, patches of a bag.
        separation: Half the distance of the classes' centres, in standard deviations of patients.
        shown: What a patient's place is worth in each of its patches, in standard deviations of patches.
        seed: Of the direction, and of everything else.
    """

    features: int
    patches: int
    separation: float
    shown: float
    seed: int

    def site(self, number: int, train: int, test: int) -> Bags:
        """Return a hospital's patients, of both classes in turn.

        Args:
            number: Which hospital; others have other patients and another offset.
            train: How many patients to train on.
            test: How many to test on.
        """
        direction = np.random.default_rng(self.seed).normal(size=self.features)
        direction *= self.shown / np.linalg.norm(direction)
        rng = np.random.default_rng([self.seed, number])
        offset = OFFSET * rng.normal(size=self.features)
        slides, bags = [], {}
        for index in range(train + test):
            label = index % 2
            place = rng.normal() + (self.separation if label else -self.separation)
            patches = rng.normal(size=(self.patches, self.features)) + offset + place * direction
            name = f"{number}-{index}"
            bags[name] = torch.tensor(patches, dtype=torch.float32)
            slides.append(Slide(name, name, label, "train" if index < train else "test", self.patches))
        return Bags(slides, bags)

    def sites(self, train: Sequence[int], test: int) -> dict[str, Bags]:
        """Return a hospital for each number of patients in ``train``, each with ``test`` more to test on."""
        return {f"site-{number:02}": self.site(number, count, test) for number, count in enumerate(train)}
