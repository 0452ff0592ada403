"""The strategies, by the word that a job uses for each: one file and one line here."""

from __future__ import annotations

from typing import Any

from histoflare.rounds.registry import make_registered
from histoflare.rounds.strategy import Strategy

STRATEGIES = {
    "fedavg": "histoflare.rounds.strategies.fedavg:FedAvg",
    "cyclic": "histoflare.rounds.strategies.cyclic:CyclicWeightTransfer",
}


def make_strategy(name: str, **arguments: Any) -> Strategy:
    """Return the strategy ``name`` with its arguments, as a job's configuration gives them.

    Raises:
        JobError: No such strategy, or it does not take these arguments.
    """
    made: Strategy = make_registered("strategy", STRATEGIES, name, arguments)
    return made
