"""Early stopping: a run ends when a figure of the sites' validation patients has not risen for some rounds.

Only figures that every site taking part has let out count, and the server decides by them alone, the same way
in every runtime. The figure heard in a round is of the model that the round began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from histoflare.rounds.evaluation import figure_of
from histoflare.rounds.local import predict
from histoflare.rounds.state import State
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.task import Task

VALIDATION = "validation"
"""The split that it is about: a run must not be ended by test patients."""


@dataclass
class Patience:
    """Follows one figure over a run's rounds.

    Attributes:
        metric: Its name, as in a protocol's ``metric``.
        rounds: How many rounds it may go without a new best before the run ends; None: it never ends early.
        lower_is_better: Whether the best is the least; else it is the largest.
        best, best_round: Its best mean over the sites, and the round that began with that model; None
            before the first.
        means: Of each round heard, the mean over its sites; None where not every site had said it.
        waited: Rounds since ``best_round`` in which the figure was known.
    """

    metric: str
    rounds: int | None = None
    lower_is_better: bool = False
    best: float | None = None
    best_round: int | None = None
    means: list[float | None] = field(default_factory=list)
    waited: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the run ends with this round."""
        return self.rounds is not None and self.waited >= self.rounds

    def hear(self, round_index: int, values: Sequence[float | None]) -> bool:
        """Take the sites' figures of a round's first model; return whether their mean is the best so far.

        A round in which a site's figure is missing changes nothing.

        Args:
            values: One for each site that took part, in any order; None where it has none or may not say it.
        """
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            self.means.append(None)
            return False
        mean = math.fsum(known) / len(known)  # exact: the order of arrival must not matter
        self.means.append(mean)
        if self.best is None or (mean < self.best if self.lower_is_better else mean > self.best):
            self.best, self.best_round, self.waited = mean, round_index, 0
            return True
        self.waited += 1
        return False

    def to_json(self) -> dict[str, Any]:
        """Return why the run ended, for its record."""
        return {
            "metric": f"{VALIDATION}/{self.metric}",
            "patience": self.rounds,
            "best": self.best,
            "best_round": self.best_round,
        }


def validate(
    task: Task,
    strategy: Strategy,
    state: State,
    site_state: Mapping[str, Any],
    data: Any,
    metric: str,
    device: str = "cpu",
) -> float | None:
    """Return a site's figure over its validation patients with the model as it came; None if it has none.

    Raises:
        JobError: The task has no such figure.
    """
    return figure_of(predict(task, strategy.personalize(state, site_state), data, VALIDATION, device), metric)
