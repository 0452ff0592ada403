"""FedAvg that names the site whose updates lie apart from the others', and leaves it out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from histoflare import ranges
from histoflare.errors import JobError
from histoflare.rounds.distances import cosine, length
from histoflare.rounds.state import State, add, weighted_mean
from histoflare.rounds.strategies.hub import NamedHub
from histoflare.rounds.strategies.median import Median
from histoflare.rounds.strategy import ServerOutcome, ServerRound

OUTLYING = "OUTLYING"
"""Why an update is not used."""

SCORES = "scores"
"""Kept at the server for each site: mean cosine and mean log-length of its updates, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Screened(NamedHub):
    """The plain mean of the updates of all sites but those that lie apart.

    Two figures of each update are followed from round to round, as means over all of them: its cosine with
    the round's coordinate-wise median, and the logarithm of its length over the round's median length. A site
    is left out, and named in the run's record, while its mean cosine is below ``least_cosine`` or it is on
    average ``most_ratio`` times longer (or shorter) than the others. The rule is our own, a plain form of
    what detectors of malicious sites look at.

    A small and steady push in a common direction is not seen. It needs each update: no secure sum.

    Attributes:
        sites: The names of all sites that train, each once.
        least_cosine: From -1 to 1.
        most_ratio: Above 1.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "screened"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    least_cosine: float = 0.0
    most_ratio: float = 5.0

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [
            *super().problems(),
            *ranges.between("least_cosine", self.least_cosine, -1, 1),
            *ranges.between("most_ratio", self.most_ratio, 1, 1e6, without_least=True),
        ]

    def begin(self, model: State) -> State:
        """Return the scores before the first round: (sites, 3)."""
        return {SCORES: torch.zeros(len(self.sites), 3, dtype=torch.float64)}

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the mean of those who do not lie apart."""
        scores = self._followed(ctx)
        place = {site: index for index, site in enumerate(self.sites)}
        apart = {u.site: OUTLYING for u in ctx.updates if self._lies_apart(scores[place[u.site]].tolist())}
        used = [update for update in ctx.updates if update.site not in apart]
        if not used:
            raise JobError(
                "All sites lie apart from each other: least_cosine or most_ratio is too strict.",
                reason="UPDATES_INVALID",
            )
        mean = weighted_mean([update.tensors for update in used], [1.0] * len(used))
        return ServerOutcome(add(ctx.model, mean), {SCORES: scores}, rejected=apart)

    def _followed(self, ctx: ServerRound) -> torch.Tensor:
        """Return the scores with this round's figures in them."""
        zeros = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in ctx.updates[0].tensors.items()}
        middle = Median().combine(replace(ctx, model=zeros)).model
        lengths = {update.site: length(update.tensors) for update in ctx.updates}
        usual = statistics.median(lengths.values())
        scores = ctx.own[SCORES].clone()
        for update in ctx.updates:
            row = scores[self.sites.index(update.site)]
            ratio = lengths[update.site] / usual if usual else 1.0
            seen = [cosine(update.tensors, middle), math.log(max(ratio, 1e-30))]
            row[2] += 1
            row[:2] += (torch.tensor(seen, dtype=torch.float64) - row[:2]) / row[2]
        return scores

    def _lies_apart(self, score: list[float]) -> bool:
        angle, size, _ = score
        return angle < self.least_cosine or abs(size) > math.log(self.most_ratio)
