"""What it costs that no sampler is ideal: the part of δ that the numbers drawn by ``privacy.noise`` take."""

from __future__ import annotations

import math

DISTANCE = 2.0**-113
"""Bound on how far a number that ``noise`` draws is from the ideal one, in total variation; derived there."""

NUMBERS_EVER = 2**64
"""More than a site ever draws: at 2**28 a second they take 2,000 years."""


def sampler_delta(epsilon: float, numbers: int) -> float:
    """Return the part of δ that goes to the sampler: (1 + e^ε) · DISTANCE · numbers, in [0, 1].

    If P and P' are the ideal outcomes with and without a patient, and the true ones within t of them, then
    true(S) <= P(S) + t <= e^ε P'(S) + δ + t <= e^ε true'(S) + δ + (1 + e^ε) t. Distances of independent draws
    add up, also where what is drawn next depends on what came out before.

    Args:
        epsilon: Of the statement (ε, δ); at least 0, may be ∞.
        numbers: All that were drawn: weights that are noised × steps × rounds.
    """
    if numbers == 0:
        return 0.0
    exponent = epsilon + math.log(DISTANCE) + math.log(numbers)  # of e^ε · DISTANCE · numbers
    return 1.0 if exponent > 0 else min(1.0, math.exp(exponent) + DISTANCE * numbers)
