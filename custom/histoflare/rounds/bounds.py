"""The bounds beside a federation: each site on its own (lower), all data in one place (upper).

Both train exactly as a federation's sites do, for as many local rounds (``rounds`` times the task's local
epochs, a fresh optimizer each round), so that what differs is the federation and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.rounds.local import train_locally
from histoflare.rounds.state import State, model_state
from histoflare.rounds.task import Task
from histoflare.seeds import derive_seed


def train_local_only(task: Task, sites: Mapping[str, Any], rounds: int, seed: int) -> dict[str, State]:
    """Return each site's model, trained on its own data alone from the federation's initial model."""
    return {site: _train_alone(task, data, site, rounds, seed) for site, data in sites.items()}


def train_pooled(task: Task, pooled: Any, rounds: int, seed: int) -> State:
    """Return the model trained on the pooled data (centralised data sharing, CDS)."""
    return _train_alone(task, pooled, "pooled", rounds, seed)


def _train_alone(task: Task, data: Any, site: str, rounds: int, seed: int) -> State:
    state = model_state(task.build_model())
    for index in range(rounds):
        found = train_locally(
            task,
            state,
            data,
            seed=derive_seed(seed, "train", site, index),
            round_index=index,
            total_rounds=rounds,
        )
        state = found.state
    return state
