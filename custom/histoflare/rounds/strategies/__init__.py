"""The strategies, by the word that a job uses for each: one file and one line here."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from histoflare.errors import JobError
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
    if name not in STRATEGIES:
        raise JobError(f"There is no strategy {name!r}; there are: {', '.join(sorted(STRATEGIES))}.")
    module, _, attribute = STRATEGIES[name].partition(":")
    kind: type[Strategy] = getattr(importlib.import_module(module), attribute)
    known = set(inspect.signature(kind).parameters)
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise JobError(
            f"The strategy {name} takes no {', '.join(unknown)}; it takes: {', '.join(sorted(known))}."
        )
    return kind(**arguments)
