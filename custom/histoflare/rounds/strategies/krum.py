"""Krum and multi-Krum (Blanchard et al. 2017): the updates that lie nearest to their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from histoflare import ranges
from histoflare.checks import is_whole
from histoflare.rounds.distances import distance
from histoflare.rounds.state import add_weighted_mean
from histoflare.rounds.strategies.hub import EqualHub
from histoflare.rounds.strategy import ServerOutcome, ServerRound

NOT_CHOSEN = "NOT_CHOSEN"
"""Why an update is not used."""


@dataclass(frozen=True, kw_only=True)
class Krum(EqualHub):
    """W ← W + mean of the ``chosen`` updates with the least score.

    The score of an update is the sum of its squared distances to its n - f - 2 nearest ones, with n the
    updates of the round and f how many sites may be faulty (Blanchard et al. 2017, section 4; one chosen is
    Krum, more are multi-Krum). Where two have the same score the first in site order goes before. It needs
    each update: no secure sum.

    Attributes:
        faulty: f, at least 0; a round needs 2 f + 3 updates.
        chosen: How many updates are averaged, at least 1; at most n - f are.
        clients_per_round: See :class:`histoflare.rounds.topologies.federated.Federated`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "krum"
    linear: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False
    faulty: int = 1
    chosen: int = 1

    def problems(self) -> list[str]:
        """Return what is out of range."""
        fits = is_whole(self.faulty, 0, 1000)
        return [
            *([] if fits else [f"faulty: a whole number from 0 to 1,000, not {self.faulty!r}"]),
            *ranges.whole("chosen", self.chosen, 1000),
        ]

    @property
    def least_updates(self) -> int:
        """2 f + 3."""
        return 2 * self.faulty + 3

    def combine(self, ctx: ServerRound) -> ServerOutcome:
        """Return the global model plus the mean of the chosen updates."""
        updates = ctx.updates
        near = len(updates) - self.faulty - 2
        away = [[0.0] * len(updates) for _ in updates]
        for i, one in enumerate(updates):
            for j in range(i):
                away[i][j] = away[j][i] = distance(one.tensors, updates[j].tensors) ** 2
        scores = [sum(sorted(row[:i] + row[i + 1 :])[:near]) for i, row in enumerate(away)]
        order = sorted(range(len(updates)), key=lambda index: (scores[index], index))
        taken = set(order[: min(self.chosen, len(updates) - self.faulty)])
        used = [update.tensors for index, update in enumerate(updates) if index in taken]
        left = {update.site: NOT_CHOSEN for index, update in enumerate(updates) if index not in taken}
        return ServerOutcome(add_weighted_mean(ctx.model, used, [1.0] * len(used)), rejected=left)
