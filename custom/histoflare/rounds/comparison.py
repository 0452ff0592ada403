"""A federated model beside its bounds: every site alone (lower) and all data in one place (upper).

Every model is asked about the same patients: each site's test patients, all of them together, and an external
cohort that no model has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from histoflare.rounds.bounds import Bounds
from histoflare.rounds.evaluation import Metrics, evaluate, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.state import State
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.task import PredictionTable, Task
from histoflare.seeds import derive_seed


@dataclass(frozen=True)
class SiteComparison:
    """One site's test patients as seen by three models, or more; ``local`` is the site's own.

    ``shared`` is the global model where the site uses another: ``federated`` is then made of it and of what
    the site keeps. None: there is no such model, or the site has no test patients.
    """

    n_train: int
    n_test: int
    local: Metrics | None
    federated: Metrics | None
    pooled: Metrics | None
    local_unprotected: Metrics | None = None
    pooled_unprotected: Metrics | None = None
    shared: Metrics | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        sites: Each site's own test patients.
        federated, pooled: Over the test patients of all sites.
        local: Site → its own model over the test patients of all sites: what a hospital's model is worth
            elsewhere.
        external: Model (``"federated"``, ``"pooled"``, ``"local/<site>"``; ``"pooled_unprotected"``,
            ``"local_unprotected/<site>"``) → metrics on the external cohort.
        pooled_unprotected, local_unprotected: The same of the bounds without noise, beside a protected run.
    """

    sites: dict[str, SiteComparison]
    federated: Metrics | None
    pooled: Metrics | None
    local: dict[str, Metrics | None]
    external: dict[str, Metrics | None]
    pooled_unprotected: Metrics | None = None
    local_unprotected: dict[str, Metrics | None] = field(default_factory=dict)


def compare(
    task: Task,
    strategy: Strategy,
    federated: State,
    sites: Mapping[str, Any],
    *,
    site_states: Mapping[str, State] | None = None,
    local: Mapping[str, State] | None = None,
    pooled: State | None = None,
    unprotected: Bounds | None = None,
    external: Any = None,
    seed: int = 0,
    device: str = "cpu",
) -> Comparison:
    """Ask every model about every site's test patients and about the external cohort.

    Args:
        federated: What the run hands out, a model or an ensemble; a site's own is made of it by
            ``strategy.personalize``.
        sites: Site → its data.
        site_states: What the strategy keeps at each site (personal layers).
        local, pooled: The bounds' models, where they were trained. A site may be without one.
        unprotected: The bounds without noise, beside those of a protected run.
        external: The external cohort's data; every split of it is asked.
        seed: Of the bootstrap.
        device: Where the models run.
    """

    def score(table: PredictionTable) -> Metrics | None:
        return evaluate(table, seed=derive_seed(seed, "evaluate")) if len(table.patients) else None

    def ask(state: State, data: Any, split: str = "test") -> PredictionTable:
        return predict(task, state, data, split, device)

    def of_site(state: State | None, data: Any) -> Metrics | None:
        return None if state is None else score(ask(state, data))

    def everywhere(state: State) -> Metrics | None:
        return score(merge_predictions({site: ask(state, data) for site, data in sites.items()}))

    shared = strategy.personalize(federated, {})
    used = {site: strategy.personalize(federated, (site_states or {}).get(site, {})) for site in sites}
    own = {site: ask(used[site], data) for site, data in sites.items()}
    personal = {
        site for site, model in used.items() if any(model[name] is not shared[name] for name in shared)
    }
    local = local or {}
    noiseless = unprotected or Bounds({}, None)
    rows = {
        site: SiteComparison(
            n_train=task.n_train(data),
            n_test=len(own[site].patients),
            local=of_site(local.get(site), data),
            federated=score(own[site]),
            pooled=of_site(pooled, data),
            local_unprotected=of_site(noiseless.local.get(site), data),
            pooled_unprotected=of_site(noiseless.pooled, data),
            shared=of_site(shared, data) if site in personal else None,
        )
        for site, data in sites.items()
    }
    pools = {"pooled": pooled, "pooled_unprotected": noiseless.pooled}
    models = {"federated": shared, **{name: state for name, state in pools.items() if state is not None}}
    models |= {f"local/{site}": state for site, state in local.items()}
    models |= {f"local_unprotected/{site}": state for site, state in noiseless.local.items()}
    return Comparison(
        sites=rows,
        federated=score(merge_predictions(own)),
        pooled=None if pooled is None else everywhere(pooled),
        local={site: everywhere(state) for site, state in local.items()},
        external={}
        if external is None
        else {name: score(ask(state, external, "all")) for name, state in models.items()},
        pooled_unprotected=None if noiseless.pooled is None else everywhere(noiseless.pooled),
        local_unprotected={site: everywhere(state) for site, state in noiseless.local.items()},
    )
