"""Federated SGD on the model ``linear``, all patients of a step at once: seconds become milliseconds.

The gradient of a patient's loss is (p - y) ⊗ (v, 1), with p the probabilities, y the class and v what the
model makes of the bag before its weights; its norm is ‖p - y‖ √(‖v‖² + 1). So a step is two products. Noise
of several sites is added up to one, which is a fact of arithmetic; it comes from numpy's generator and
protects nobody. A test holds this file to ``run_in_process``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histoflare.bags.task import BagTask
from tests.benchmarks.bags_in_memory import Bags

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Patients as the weights see them: ``inputs`` (N, d + 1) and ``labels`` (N,).

    The last column is 1, or 0 where the model has no bias.
    """

    inputs: Matrix
    labels: NDArray[np.int64]

    @property
    def lengths(self) -> Matrix:
        """‖(v, 1)‖ of each, (N,)."""
        found: Matrix = np.linalg.norm(self.inputs, axis=1)
        return found


@dataclass(frozen=True)
class Protection:
    """What DP-SGD does in a step.

    Attributes:
        sample_rate: q. clip_norm: C.
        noise: Standard deviation of the noise in the whole sum, all sites' together, in C.
        divisor: Of the whole sum.
    """

    sample_rate: float
    clip_norm: float
    noise: float
    divisor: float


def see(task: BagTask, bags: Bags, split: str) -> Points:
    """Return the patients of ``split``, each with one bag, as the task's model sees them."""
    model = task.build_model()
    last = 0.0 if cast(nn.Linear, model.head).bias is None else 1.0
    model.head = nn.Identity()
    records = [record for record in bags.records if record.split == split]
    with torch.no_grad():
        seen = torch.cat([model(bags.features(record)[None]) for record in records]).double().numpy()
    labels = np.array([record.label for record in records], dtype=np.int64)
    return Points(np.hstack([seen, np.full((len(seen), 1), last)]), labels)


def first_weights(task: BagTask) -> Matrix:
    """Return the weights (d + 1, k) that the task's model begins with; without bias the last are 0."""
    state = task.build_model().state_dict()
    weight = state["head.weight"]  # (k, d)
    bias = state.get("head.bias", torch.zeros(len(weight)))
    weights: Matrix = torch.cat([weight, bias[:, None]], dim=1).double().numpy().T
    return weights


def train(
    sites: Sequence[Points],
    weights: Matrix,
    protection: Protection | None,
    *,
    rounds: int,
    learning_rate: float,
    batch_size: int,
    averaged_part: float,
    seed: Sequence[int],
    class_shares: Sequence[float] | None = None,
) -> Matrix:
    """Return the mean of the weights (d + 1, k) after the last rounds.

    Args:
        sites: The patients of each.
        weights: To begin with.
        protection: None: each site's batch of ``batch_size`` by chance, and no clip.
        averaged_part: Which part of the rounds, at their end, the mean is of; above 0.
        seed: Of samples and noise.
        class_shares: See ``bags.targets.classes``.
    """
    offsets = np.zeros(weights.shape[1]) if class_shares is None else np.log(class_shares)
    rng = np.random.default_rng(seed)
    whole = Points(np.vstack([s.inputs for s in sites]), np.concatenate([s.labels for s in sites]))
    starts = np.cumsum([0, *(len(site.labels) for site in sites)])
    lengths, mean = whole.lengths, np.zeros_like(weights)
    last = max(1, round(averaged_part * rounds))
    for index in range(rounds):
        if protection is None:
            parts = [start + rng.permutation(end - start)[:batch_size] for start, end in pairwise(starts)]
            # a mean over sites of means over their batches
            share = np.concatenate([np.full(len(part), 1 / len(part) / len(sites)) for part in parts])
            chosen = np.concatenate(parts)
        else:
            chosen = np.flatnonzero(rng.random(len(whole.labels)) < protection.sample_rate)
            share = np.ones(len(chosen))
        errors = _errors(whole, weights, offsets, chosen)  # (b, k)
        if protection is not None:
            norms = np.linalg.norm(errors, axis=1) * lengths[chosen]
            share = np.minimum(1.0, protection.clip_norm / np.maximum(norms, 1e-300)) / protection.divisor
        gradient = whole.inputs[chosen].T @ (errors * share[:, None])  # (d + 1, k)
        if protection is not None:
            std = protection.noise * protection.clip_norm / protection.divisor
            gradient += rng.normal(size=weights.shape) * std
        weights = weights - learning_rate * gradient
        if index >= rounds - last:
            mean += weights / last
    return mean


def accuracy(weights: Matrix, points: Points) -> float:
    """Return the part of the patients that is told right."""
    return float(np.mean(np.argmax(points.inputs @ weights, axis=1) == points.labels))


def _errors(points: Points, weights: Matrix, offsets: Matrix, chosen: NDArray[np.int64]) -> Matrix:
    """Return p - y (b, k)."""
    scores = points.inputs[chosen] @ weights + offsets
    scores -= scores.max(axis=1, keepdims=True)
    errors: Matrix = np.exp(scores)
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(chosen)), points.labels[chosen]] -= 1
    return errors
