"""Federated averaging (McMahan et al. 2017) as in Rieke et al. 2020, Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from histoflare.errors import JobError
from histoflare.rounds.state import add_weighted_mean
from histoflare.rounds.strategies.hub import Hub
from histoflare.rounds.strategy import SUM, ServerOutcome, ServerRound

WEIGHTINGS = ("samples", "uniform", "fixed")


@dataclass(frozen=True, kw_only=True)
class FedAvg(Hub):
    """W ← W + Σ N_k ΔW_k / Σ N_k, summed in float64 in site order.

    Attributes:
        weighting: N_k is the site's number of training samples (``"samples"``; the paper's text says local
            iterations, McMahan samples), 1 (``"uniform"``: the plain mean of the sites' models, as in Pan et
            al. 2024, eq. 15), or taken from ``weights`` (``"fixed"``). With the last two nothing about a
            site's size is sent, and the server uses its own weights whatever a site sends.
        weights: Site → weight, for ``"fixed"``: finite, >= 0, at least one above 0.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.

    >>> from histoflare import FedAvg
    >>> FedAvg(weighting="uniform").equal_weights
    True
    """

    name: ClassVar[str] = "fedavg"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    weighting: str = "samples"
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in WEIGHTINGS:
            raise JobError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {self.weighting!r}.")
        if (self.weighting == "fixed") != (self.weights is not None):
            raise JobError("weights (site → number) go with weighting = fixed, and only with it.")
        if self.weights is not None:
            bad = [s for s, w in self.weights.items() if not (math.isfinite(w) and w >= 0)]
            if bad or sum(self.weights.values()) <= 0:
                raise JobError(
                    f"weights must be numbers of at least 0 with a sum above 0; got {dict(self.weights)}."
                )

    @property
    def equal_weights(self) -> bool:
        """Whether ``weighting`` is ``"uniform"``."""
        return self.weighting == "uniform"

    def check_sites(self, sites: Sequence[str]) -> None:
        """Refuse sites that occur twice, and a site without a fixed weight."""
        super().check_sites(sites)
        missing = [site for site in sites if self.weights is not None and site not in self.weights]
        if missing:
            raise JobError(f"weights has no entry for {', '.join(missing)}; every site needs one.")

    def weight(self, site: str, n_samples: int) -> float:
        """Return N_k."""
        if self.weighting == "samples":
            return float(n_samples)
        if self.weights is None:
            return 1.0
        if site not in self.weights:
            raise JobError(f"weights has no entry for {site}; every site needs one.")
        return float(self.weights[site])

    def weights_of(self, ctx: ServerRound) -> list[float]:
        """Return N_k of each update; its own word is taken only with ``"samples"``, and of a sum of all."""
        own_word = self.weighting == "samples"
        return [
            each.weight if own_word or each.site == SUM else self.weight(each.site, 0) for each in ctx.updates
        ]

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model plus the weighted mean of the updates."""
        updates = [update.tensors for update in ctx.updates]
        return ServerOutcome(add_weighted_mean(ctx.model, updates, self.weights_of(ctx)))
