"""What each site contributes to a federation: Shapley values, and what is lost without it.

The worth v(S) of a coalition S of sites is a figure of the model that these sites train together. A site's
Shapley value (Shapley 1953) is what it adds to the worth, on average over all orders in which the sites could
have joined; the values of all sites add up to v(all) - v(nobody). Leaving one out asks less: v(all) less the
worth of all others. A site whose patients are much like another's may look dispensable there, and both do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

MOST_EXACT = 6
"""Sites for which all coalitions are tried (63); of more, orders are drawn."""

Z95 = 1.959964

Coalition = frozenset[str]
Worth = Callable[[Coalition], float]


@dataclass(frozen=True)
class Contribution:
    """A site's part.

    Attributes:
        shapley: Its Shapley value, in the units of the figure.
        low, high: The 95 % interval of an estimate by drawn orders; None where the value is exact.
        left_out: By how much the figure is lower without this site.
    """

    shapley: float
    left_out: float
    low: float | None = None
    high: float | None = None


def coalitions(sites: Sequence[str]) -> Iterator[Coalition]:
    """Yield every coalition of ``sites``, the smaller ones first; nobody first of all."""
    for size in range(len(sites) + 1):
        for members in combinations(sites, size):
            yield frozenset(members)


def exact_contributions(sites: Sequence[str], worth: Worth) -> dict[str, Contribution]:
    """Return each site's contribution from the worth of all 2^n coalitions.

    The Shapley value of i is Σ_S |S|! (n - |S| - 1)! / n! · (v(S ∪ i) - v(S)), over all S without i.
    """
    known = {members: worth(members) for members in coalitions(sites)}
    n, everyone = len(sites), frozenset(sites)
    found = {}
    for site in sites:
        terms = [
            math.factorial(len(members))
            * math.factorial(n - len(members) - 1)
            / math.factorial(n)
            * (known[members | {site}] - value)
            for members, value in known.items()
            if site not in members
        ]
        found[site] = Contribution(math.fsum(terms), known[everyone] - known[everyone - {site}])
    return found


def drawn_contributions(
    sites: Sequence[str], worth: Worth, orders: int, seed: int
) -> dict[str, Contribution]:
    """Return each site's contribution, estimated from orders of joining that are drawn (Castro et al. 2009).

    Orders are drawn in pairs, each with its reverse, which lowers the variance (Mitchell et al. 2022). The
    interval is that of the mean over pairs, by the normal distribution. A coalition may be asked again.

    Args:
        orders: How many; an odd number is rounded up. At least 4.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[float]] = {site: [] for site in sites}
    for _ in range(max(2, -(-orders // 2))):
        order = [sites[index] for index in rng.permutation(len(sites))]
        added = [_added(way, worth) for way in (order, order[::-1])]
        for site in sites:
            pairs[site].append((added[0][site] + added[1][site]) / 2)
    everyone = frozenset(sites)
    found = {}
    for site, values in pairs.items():
        mean, half = statistics.fmean(values), Z95 * statistics.stdev(values) / math.sqrt(len(values))
        found[site] = Contribution(mean, worth(everyone) - worth(everyone - {site}), mean - half, mean + half)
    return found


def _added(order: Sequence[str], worth: Worth) -> Mapping[str, float]:
    """Return what each site adds when the sites join in this order."""
    added = {}
    members: Coalition = frozenset()
    for site in order:
        added[site] = worth(members | {site}) - worth(members)
        members |= {site}
    return added
