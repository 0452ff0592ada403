"""Two runs of one question on the same sites: without protection, and with; one report of both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from histoflare.flare.job import Job
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.federation import up_for
from histoflare.lab.loading import load_experiment
from histoflare.lab.run import Outcome, run_loaded, write_report
from histoflare.lab.watch import Watch
from histoflare.report.chapters import join_chapters
from histoflare.rounds.evaluation import evaluate_difference, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.state import State
from histoflare.rounds.task import PredictionTable
from histoflare.seeds import derive_seed

UNPROTECTED_FOLDER = "unprotected"
"""Of the first chapter's model."""


def run_chapters(
    unprotected: Experiment,
    protected: Experiment,
    out: Path,
    watch: Watch,
    epsilons: Sequence[float],
    note: str = "",
) -> Outcome:
    """Run both in one federation, and write the report of both, its page and the models to ``out``.

    ``model.safetensors`` is the protected one, the other is in the folder ``unprotected``.

    Args:
        unprotected, protected: Of the same sites, cohorts and runtime.
        epsilons: As for :func:`histoflare.lab.run.run_experiment`.
        note: What the page says of the data.

    Returns:
        The outcome of the protected run, with the report of both.

    Raises:
        HistoflareError: As for ``run_experiment``.
    """
    loaded = load_experiment(protected, watch)
    both = [replace(loaded.taking_part, job=each.job) for each in (protected, unprotected)]
    up = up_for(both, out, watch) if protected.runtime == Runtime.POC else nullcontext()
    beside = out / UNPROTECTED_FOLDER
    beside.mkdir(parents=True, exist_ok=True)
    with up as running:
        first = run_loaded(unprotected, loaded, beside, watch, (), running)
        second = run_loaded(protected, loaded, out, watch, epsilons, running)
    cohorts = {
        site: second.cohorts[site]
        for site in sorted(protected.sites)
        if site in first.cohorts and site in second.cohorts
    }

    def ask(job: Job, state: State) -> Any:
        return merge_predictions(
            {site: predict(job.task, state, data, "test", protected.device) for site, data in cohorts.items()}
        )

    with watch.shown_phase("evaluation"):
        free, private = (
            ask(each.job, each.job.strategy.personalize(outcome.federated.state, {}))
            for each, outcome in ((unprotected, first), (protected, second))
        )
        own = {site: ask(unprotected.job, state) for site, state in first.local.items()}
        seed = derive_seed(protected.job.seed, "chapters")
        gains = {
            first.federated.pseudonyms.get(site, site): _less(free, [table], seed)
            for site, table in own.items()
        }
        on_average = _less(free, list(own.values()), seed)
        cost = _less(free, [private], seed)
        of_noise: dict[str, Any] = {}
        if second.noiseless is not None:
            noiseless = protected.job.strategy.personalize(second.noiseless, {})
            of_noise = _less(ask(protected.job, noiseless), [private], seed)
    report = join_chapters(first.report, second.report, gains, on_average, cost, of_noise, note)
    write_report(report, out)
    return replace(second, report=report)


def _less(one: PredictionTable, others: Sequence[PredictionTable], seed: int) -> dict[str, Any]:
    """Return a model's figures less the mean of others', with their intervals, as a report has them."""
    found: dict[str, Any] = {}
    for name in one.measures if others and len(one.patients) else ():
        figure = evaluate_difference(one, others, name, seed=seed)
        found[name] = figure.value
        if figure.value is not None and figure.low is not None:
            found[f"{name}_ci95"] = [figure.low, figure.high]
    return found
