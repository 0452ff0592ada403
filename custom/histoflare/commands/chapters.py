"""Two runs of one question on the same sites: without protection, and with; one report of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from histoflare.commands.clock import PhaseClock
from histoflare.commands.experiment import Outcome, load_experiment, run_loaded, write_report
from histoflare.commands.options import Runtime
from histoflare.commands.runtimes import Experiment, up_for
from histoflare.errors import JobError
from histoflare.report.chapters import join_chapters
from histoflare.rounds.evaluation import evaluate_difference, merge_predictions
from histoflare.rounds.local import predict
from histoflare.seeds import derive_seed

UNPROTECTED_FOLDER = "unprotected"
"""Of the first chapter's model."""


def run_chapters(
    unprotected: Experiment,
    protected: Experiment,
    out: Path,
    bars: Progress,
    clock: PhaseClock,
    epsilons: Sequence[float],
) -> Outcome:
    """Run both in one federation, and write the report of both, its page and the models to ``out``.

    ``model.safetensors`` is the protected one, the other is in the folder ``unprotected``.

    Args:
        unprotected, protected: Of the same sites, cohorts and runtime.
        epsilons: As for :func:`histoflare.commands.experiment.run_experiment`.

    Returns:
        The outcome of the protected run, with the report of both.

    Raises:
        HistoflareError: As for ``run_experiment``.
    """
    loaded = load_experiment(protected, clock)
    both = [replace(loaded.taking_part, job=each.job) for each in (protected, unprotected)]
    up = up_for(both, out, bars, clock) if protected.runtime == Runtime.POC else nullcontext()
    beside = out / UNPROTECTED_FOLDER
    beside.mkdir(parents=True, exist_ok=True)
    with up as running:
        first = run_loaded(unprotected, loaded, beside, bars, clock, (), running)
        second = run_loaded(protected, loaded, out, bars, clock, epsilons, running)
    report = join_chapters(first.report, second.report, _cost(unprotected, protected, first, second))
    write_report(report, out)
    return replace(second, report=report)


def _cost(unprotected: Experiment, protected: Experiment, first: Outcome, second: Outcome) -> dict[str, Any]:
    """Return what the unprotected model's figures are above the protected one's, on the same patients."""
    names = sorted(set(protected.sites) & set(first.cohorts) & set(second.cohorts))
    cohorts = {site: second.cohorts[site] for site in names}

    def ask(experiment: Experiment, outcome: Outcome) -> Any:
        job = experiment.job
        state = job.strategy.personalize(outcome.federated.state, {})
        tables: Mapping[str, Any] = {
            site: predict(job.task, state, data, "test", experiment.device) for site, data in cohorts.items()
        }
        return merge_predictions(tables)

    seed = derive_seed(protected.job.seed, "cost of privacy")
    found: dict[str, Any] = {}
    try:
        one, other = ask(unprotected, first), ask(protected, second)
        for name in one.measures:
            figure = evaluate_difference(one, other, name, seed=seed)
            found[name] = figure.value
            if figure.value is not None and figure.low is not None:
                found[f"{name}_ci95"] = [figure.low, figure.high]
    except (JobError, IndexError):  # nobody to test on
        return {}
    return found
