"""What each site contributes to a job: the job trained by every coalition of its sites, in this process."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

from histoflare.errors import JobError
from histoflare.lab.strategy_comparison import Setup
from histoflare.lab.watch import Watch
from histoflare.rounds.contribution import MOST_EXACT, Coalition, drawn_contributions, exact_contributions
from histoflare.rounds.evaluation import figure_of, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import model_state

ORDERS = 24


def find_contributions(
    setup: Setup, figure: str, *, orders: int = ORDERS, device: str = "cpu", watch: Watch | None = None
) -> dict[str, Any]:
    """Train the job with every coalition of the sites, and say what each adds.

    Of up to 6 sites all coalitions are trained (63), of more those of ``orders`` drawn orders of joining.
    Models are asked about the external cohort, or where there is none about the test patients of all sites
    together. Nobody's model is the one that training begins with.

    Args:
        setup: Sites and job; the job's own strategy trains.
        figure: The figure of the task's that is the worth of a model.
        orders: Orders that are drawn of more than 6 sites.
        device: Where models run.
        watch: Is told how far it is.

    Returns:
        ``all`` and ``nobody``, the figures of the model of all sites and of the first one; ``sites`` → the
        fields of :class:`histoflare.rounds.contribution.Contribution`; ``asked`` (``external`` or ``test``),
        ``exact`` and ``coalitions``, how many were trained.

    Raises:
        JobError: The job is protected, or the figure does not exist for these patients.
        HistoflareError: A coalition could not train.
    """
    job, sites = setup.job, list(setup.sites)
    if job.plan.protects:
        raise JobError(
            "Every coalition is a training of its own, and would be booked as one: on patients under a "
            "privacy plan the contributions would cost up to 2^n times the job. Ask a job without "
            "protection, on data that need none.",
            reason="PRIVACY_INVALID",
        )
    is_exact = len(sites) <= MOST_EXACT
    step = (watch or Watch()).begin("coalitions", 2 ** len(sites) - 1 if is_exact else None)
    trained = 0

    @cache
    def worth(members: Coalition) -> float:
        nonlocal trained
        chosen = {site: data for site, data in setup.sites.items() if site in members}
        if chosen:
            run = run_in_process(job.task, chosen, job.strategy, job.rounds, job.seed, device=device)
            state = job.strategy.of_task(job.task).personalize(run.handed_out, {})
            trained += 1
            step.show(trained)
        else:
            state = model_state(job.task.build_model())
        if setup.external is not None:
            table = predict(job.task, state, setup.external, "all", device)
        else:
            table = merge_predictions(
                {site: predict(job.task, state, data, "test", device) for site, data in setup.sites.items()}
            )
        value = figure_of(table, figure)
        if value is None:
            raise JobError(
                f"These patients have no {figure}: it takes some of every class.",
                reason="NOTHING_TO_EVALUATE",
            )
        return value

    if is_exact:
        found = exact_contributions(sites, worth)
    else:
        found = drawn_contributions(sites, worth, orders, job.seed)
        step.end()
    return {
        "job": job.name,
        "figure": figure,
        "seed": job.seed,
        "rounds": job.rounds,
        "asked": "test" if setup.external is None else "external",
        "exact": is_exact,
        "coalitions": trained,
        "all": worth(frozenset(sites)),
        "nobody": worth(frozenset()),
        "sites": {site: asdict(each) for site, each in found.items()},
    }
