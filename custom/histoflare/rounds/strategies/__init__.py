"""The strategies by the name that a job gives: each is one file, and one line here."""

from __future__ import annotations

from typing import Any

from histoflare.rounds.registry import make_registered
from histoflare.rounds.strategy import Strategy

STRATEGIES = {
    "fedavg": "histoflare.rounds.strategies.fedavg:FedAvg",
    "fedsgd": "histoflare.rounds.strategies.fedsgd:FedSgd",
    "cyclic": "histoflare.rounds.strategies.cyclic:CyclicWeightTransfer",
}
"""Name → the strategy's class, for :func:`make_strategy`.

>>> from histoflare import STRATEGIES
>>> STRATEGIES["fedavg"]
'histoflare.rounds.strategies.fedavg:FedAvg'
"""


def make_strategy(name: str, **arguments: Any) -> Strategy:
    """Return the strategy ``name`` with its arguments, as a job's configuration gives them.

    Raises:
        JobError: No such strategy, or it does not take these arguments.

    >>> from histoflare import make_strategy
    >>> make_strategy("fedavg", weighting="uniform").weighting
    'uniform'
    """
    made: Strategy = make_registered("strategy", STRATEGIES, name, arguments)
    return made
