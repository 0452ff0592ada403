"""The strategies by the name that a job gives: each is one file, and one line here."""

from __future__ import annotations

from typing import Any

from histoflare.rounds.registry import make_registered
from histoflare.rounds.strategy import Strategy

STRATEGIES = {
    "fedavg": "histoflare.rounds.strategies.fedavg:FedAvg",
    "fedsgd": "histoflare.rounds.strategies.fedsgd:FedSgd",
    "fedprox": "histoflare.rounds.strategies.fedprox:FedProx",
    "fednova": "histoflare.rounds.strategies.fednova:FedNova",
    "scaffold": "histoflare.rounds.strategies.scaffold:Scaffold",
    "feddyn": "histoflare.rounds.strategies.feddyn:FedDyn",
    "moon": "histoflare.rounds.strategies.moon:Moon",
    "fedavgm": "histoflare.rounds.strategies.fedavgm:FedAvgM",
    "fedadagrad": "histoflare.rounds.strategies.fedopt:FedAdagrad",
    "fedadam": "histoflare.rounds.strategies.fedopt:FedAdam",
    "fedyogi": "histoflare.rounds.strategies.fedopt:FedYogi",
    "fedrep": "histoflare.rounds.strategies.fedrep:FedRep",
    "ditto": "histoflare.rounds.strategies.ditto:Ditto",
    "apfl": "histoflare.rounds.strategies.apfl:Apfl",
    "finetune": "histoflare.rounds.strategies.finetune:FineTune",
    "median": "histoflare.rounds.strategies.median:Median",
    "trimmed_mean": "histoflare.rounds.strategies.trimmed_mean:TrimmedMean",
    "geometric_median": "histoflare.rounds.strategies.geometric_median:GeometricMedian",
    "krum": "histoflare.rounds.strategies.krum:Krum",
    "norm_bound": "histoflare.rounds.strategies.norm_bound:NormBound",
    "screened": "histoflare.rounds.strategies.screened:Screened",
    "qfedavg": "histoflare.rounds.strategies.qfedavg:QFedAvg",
    "afl": "histoflare.rounds.strategies.afl:Afl",
    "feddg_ga": "histoflare.rounds.strategies.feddg_ga:FedDgGa",
    "ensemble": "histoflare.rounds.strategies.ensemble:Ensemble",
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
