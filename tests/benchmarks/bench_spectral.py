"""Whether a spectral detector finds attackers with an embedding of the round's own updates.

    python -m tests.benchmarks.bench_spectral [--draws 200] [--weights 200]

Li et al. 2020 learn the embedding beforehand, on updates of honest training on public data. Without such data
there are the updates of the round. Here they are drawn, not trained: an honest one is a common direction and
noise of the same size. All are embedded by their first principal component, and their reconstruction errors
ranked. For each case: the share of draws in which the attackers have the largest errors (they are found), and
in which they have the smallest (the honest sites are taken for them).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]

SPREAD = 0.3
"""Standard deviation of a weight's common change, and of each honest site's own."""

ATTACKS: dict[str, Callable[[Vectors, Vectors], Vectors]] = {
    "times 100": lambda own, _: 100 * own,
    "sign-flipped, times 10": lambda own, _: -10 * own,
    "1.5 standard deviations (Baruch 2019)": lambda _, honest: honest.mean(axis=0) - 1.5 * honest.std(axis=0),
    "inner product (Xie 2019)": lambda _, honest: -honest.mean(axis=0),
}
"""An attacker's honest update (weights,) and those of the honest sites (sites, weights) → what it sends."""


def errors(updates: Vectors) -> Vectors:
    """Return how far each update (sites, weights) is from its reconstruction by one principal component."""
    centred = updates - updates.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][:1]
    return np.asarray(np.linalg.norm(centred - centred @ axis.T @ axis, axis=1))


def shares(attack: str, sites: int, bad: int, draws: int, weights: int) -> tuple[float, float]:
    """Return in which share of draws the first ``bad`` sites have the largest errors, and the smallest."""
    found = missed = 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        updates = SPREAD * (rng.normal(size=(sites, weights)) + rng.normal(size=weights))
        updates[:bad] = [ATTACKS[attack](own, updates[bad:]) for own in updates[:bad]]
        error = errors(updates)
        found += error[:bad].min() > error[bad:].max()
        missed += error[:bad].max() < error[bad:].min()
    return found / draws, missed / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--weights", type=int, default=200)
    asked = parser.parse_args()
    print("| attack | attackers | found | honest sites taken for them |\n|---|---|---|---|")
    for attack in ATTACKS:
        for sites, bad in ((5, 1), (8, 2)):
            found, missed = shares(attack, sites, bad, asked.draws, asked.weights)
            print(f"| {attack} | {bad} of {sites} | {found:.1%} | {missed:.1%} |")


if __name__ == "__main__":
    main()
