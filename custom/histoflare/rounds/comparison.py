"""A federated model beside its bounds: every site alone (lower) and all data in one place (upper).

Every model is asked about the same patients: each site's test patients, all of them together, and an external
cohort that no model has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from histoflare.rounds.evaluation import Metrics, evaluate, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.state import State
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.task import PredictionTable, Task
from histoflare.seeds import derive_seed


@dataclass(frozen=True)
class SiteComparison:
    """One site's test patients as seen by three models; ``local`` is the site's own.

    None: there is no such model, or the site has no test patients.
    """

    n_train: int
    n_test: int
    local: Metrics | None
    federated: Metrics | None
    pooled: Metrics | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        sites: Each site's own test patients.
        federated, pooled: Over the test patients of all sites.
        local: Site → its own model over the test patients of all sites: what a hospital's model is worth
            elsewhere.
        external: Model (``"federated"``, ``"pooled"``, ``"local/<site>"``) → metrics on the external cohort.
    """

    sites: dict[str, SiteComparison]
    federated: Metrics | None
    pooled: Metrics | None
    local: dict[str, Metrics | None]
    external: dict[str, Metrics | None]


def compare(
    task: Task,
    strategy: Strategy,
    federated: State,
    sites: Mapping[str, Any],
    *,
    site_states: Mapping[str, State] | None = None,
    local: Mapping[str, State] | None = None,
    pooled: State | None = None,
    external: Any = None,
    seed: int = 0,
) -> Comparison:
    """Ask every model about every site's test patients and about the external cohort.

    Args:
        federated: The last global state; a site's own model is made of it by ``strategy.personalize``.
        sites: Site → its data.
        site_states: What the strategy keeps at each site (personal layers).
        local, pooled: The bounds' models, where they were trained.
        external: The external cohort's data; every split of it is asked.
        seed: Of the bootstrap.
    """

    def score(table: PredictionTable) -> Metrics | None:
        return evaluate(table, seed=derive_seed(seed, "evaluate")) if len(table.patients) else None

    def everywhere(state: State) -> Metrics | None:
        return score(
            merge_predictions({site: predict(task, state, data, "test") for site, data in sites.items()})
        )

    shared = strategy.personalize(federated, {})
    own = {
        site: predict(task, strategy.personalize(federated, (site_states or {}).get(site, {})), data, "test")
        for site, data in sites.items()
    }
    rows = {
        site: SiteComparison(
            n_train=task.n_train(data),
            n_test=len(own[site].patients),
            local=score(predict(task, local[site], data, "test")) if local else None,
            federated=score(own[site]),
            pooled=score(predict(task, pooled, data, "test")) if pooled is not None else None,
        )
        for site, data in sites.items()
    }
    models = {"federated": shared, **({"pooled": pooled} if pooled is not None else {})}
    models |= {f"local/{site}": state for site, state in (local or {}).items()}
    return Comparison(
        sites=rows,
        federated=score(merge_predictions(own)),
        pooled=everywhere(pooled) if pooled is not None else None,
        local={site: everywhere(state) for site, state in (local or {}).items()},
        external={}
        if external is None
        else {name: score(predict(task, state, external, "all")) for name, state in models.items()},
    )
