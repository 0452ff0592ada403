"""Where a job runs: real FLARE processes, FLARE's simulator, this process. All end with the same weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from histoflare.errors import HistoflareError
from histoflare.flare.job import Job
from histoflare.flare.result import FederationResult, FederationRun
from histoflare.flare.simulator import run_simulation
from histoflare.flare.workstation import Workstation, federation_up
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.sites import KEYS_FOLDER, LEDGERS_FOLDER, with_ledgers
from histoflare.lab.watch import RunningStep, Watch
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State
from histoflare.site.kinds.kind import SiteData

FEDERATION_FOLDER = "federation"


@dataclass(frozen=True)
class Federated:
    """What came out of a job.

    Attributes:
        state: What the job hands out, its last model or an ensemble.
        site_states: Site → what the strategy keeps there.
        participation: One row per round, see ``report.consortium.RunFacts``.
        evaluated: Site → what it says of the last model; None where the sites were not asked.
        evaluation_total: What the sum of their noised counts says (``flare.result.FederationResult``).
        evaluation_round: The row of that question.
        evaluation_refused: Site → fixed reason code it answered instead.
        pseudonyms: Site → the name under which others may see it, of those that have one.
        failures: Site → why its last refused round failed, in words, where this process knows.
        bytes_up, bytes_down: Of tensors, where the rows do not say.
    """

    state: State
    site_states: Mapping[str, State]
    participation: Sequence[Mapping[str, Any]]
    evaluated: Mapping[str, Mapping[str, float | None]] | None = None
    evaluation_total: Mapping[str, Any] | None = None
    evaluation_round: Mapping[str, Any] | None = None
    evaluation_refused: Mapping[str, str] = field(default_factory=dict)
    pseudonyms: Mapping[str, str] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    bytes_up: int | None = None
    bytes_down: int | None = None


def federate(
    experiment: Experiment,
    cohorts: Mapping[str, SiteData],
    out: Path,
    watch: Watch,
    running: Workstation | None = None,
) -> Federated:
    """Run an experiment's job.

    Args:
        cohorts: The sites' data; only a job that runs in this process looks at them.
        out: Folder for what a federation makes.
        watch: Is told how far it is.
        running: A federation that is up for this job; None starts one, where the runtime has processes.

    Raises:
        HistoflareError: The job did not finish.
    """
    if running is not None:
        return _in_federation(running, experiment.job, watch)
    if experiment.runtime == Runtime.POC:
        with up_for([experiment], out, watch) as own:
            return _in_federation(own, experiment.job, watch)
    run = {Runtime.SIMULATOR: _simulator, Runtime.INPROCESS: _in_process}
    return run[experiment.runtime](_with_new_ledgers(experiment, out), cohorts, watch)


@contextmanager
def up_for(experiments: Sequence[Experiment], out: Path, watch: Watch) -> Iterator[Workstation]:
    """Start a federation for several experiments on the same sites, and end it when the block is left.

    Every site has one new ledger, in which all their jobs are booked.

    Raises:
        HistoflareError: The federation could not be started.
    """

    def phase(name: str) -> AbstractContextManager[None]:
        return watch.phase(name) if name == "federated rounds" else watch.shown_phase(name)

    first = _with_new_ledgers(experiments[0], out)
    jobs = [experiment.job for experiment in experiments]
    with federation_up(jobs, first.sites, first.external, out / FEDERATION_FOLDER, phase) as running:
        yield running


def with_refused(federated: Federated, refused: Mapping[str, HistoflareError], asked: bool) -> Federated:
    """Return what came out of a job with the sites that were left out before it began.

    Args:
        refused: Site → why. asked: Whether they were to train; else they are external cohorts.
    """
    codes = {site: error.reason for site, error in refused.items()}
    if not asked:
        return replace(federated, evaluation_refused={**federated.evaluation_refused, **codes})
    rows = [
        {
            **row,
            "asked": sorted({*row["asked"], *codes}),
            "refused": dict(sorted({**row["refused"], **codes}.items())),
        }
        for row in federated.participation
    ]
    return replace(federated, participation=rows if codes else federated.participation)


def _with_new_ledgers(experiment: Experiment, out: Path) -> Experiment:
    """Return the experiment with a ledger for each site that knows of no earlier job.

    The sites of an experiment belong to one user, who may repeat it; a hospital's ledger is for good.
    """
    for folder in (LEDGERS_FOLDER, KEYS_FOLDER):
        shutil.rmtree(out / folder, ignore_errors=True)
    return replace(
        experiment,
        sites=with_ledgers(experiment.sites, out),
        external=with_ledgers(experiment.external, out),
    )


def _in_federation(running: Workstation, job: Job, watch: Watch) -> Federated:
    return _of_processes(running.run(job, _Rounds(watch, job.rounds, "FLARE processes").show))


def _simulator(experiment: Experiment, cohorts: Mapping[str, SiteData], watch: Watch) -> Federated:
    job = experiment.job
    rounds = _Rounds(watch, job.rounds, "FLARE's simulator")
    with watch.phase("federated rounds"):
        run = run_simulation(job, experiment.sites, rounds.show)
    return _of_processes(run)


def _of_processes(run: FederationRun) -> Federated:
    """Return what came out of a job that FLARE ran."""
    result = run.training
    return Federated(
        state=_state(result),
        site_states=run.site_states,
        participation=result.rounds,
        evaluated=None if result.evaluation_round is None else result.evaluation,
        evaluation_total=result.evaluation_total,
        evaluation_round=result.evaluation_round,
        evaluation_refused=result.evaluation_refused,
        pseudonyms=result.pseudonyms,
    )


def _in_process(experiment: Experiment, cohorts: Mapping[str, SiteData], watch: Watch) -> Federated:
    job = experiment.job
    rounds = _Rounds(watch, job.rounds, "this process")
    with watch.phase("federated rounds"):
        run = run_in_process(
            job.task,
            {site: cohorts[site] for site in sorted(experiment.sites)},
            job.strategy,
            job.rounds,
            job.seed,
            job.plan,
            transport=job.transport,
            on_round=rounds.advance,
            device=experiment.device,
            patience=job.new_patience() if job.patience else None,
            least=min(job.least_sites, len(experiment.sites)),
        )
    rows: list[dict[str, Any]] = [
        {
            "round": index,
            "asked": [*took, *failed],
            "taking_part": list(took),
            "refused": {site: error.reason for site, error in failed.items()},
            **notes,
        }
        for index, (took, failed, notes) in enumerate(
            zip(run.participation, run.refused, run.notes, strict=True)
        )
    ]
    if run.patience is not None:
        for row, mean in zip(rows, run.patience.means, strict=True):
            row["validation"] = mean
        if len(rows) < job.rounds:
            rows[-1]["stopped"] = run.patience.to_json()
    return Federated(
        state=run.handed_out,
        site_states=run.site_states,
        participation=rows,
        failures={site: str(error) for failed in run.refused for site, error in failed.items()},
        bytes_up=run.bytes_up,
        bytes_down=run.bytes_down,
    )


class _Rounds:
    """The progress of rounds, from the first on: time of the start-up does not count in the time left."""

    def __init__(self, watch: Watch, total: int, where: str) -> None:
        self._watch = watch
        self._total = total
        self._text = f"federated rounds ({where})"
        self._step: RunningStep | None = None

    def show(self, done: int, loss: float | None) -> None:
        """Show that ``done`` rounds are finished, the last one with this mean training loss of the sites."""
        if not done:
            return
        if self._step is None:
            self._step = self._watch.begin(self._text, self._total)
        text = self._text if loss is None else f"federated rounds, loss {loss:.3g}"  # fits 80 columns
        self._step.show(done, text)

    def advance(self, index: int, total: int, seconds: float, losses: Mapping[str, float]) -> None:
        """Show that round ``index`` is finished, see ``rounds.runner.OnRound``."""
        known = [loss for loss in losses.values() if math.isfinite(loss)]  # DP-SGD may draw nobody in a round
        self.show(index + 1, sum(known) / len(known) if known else None)


def _state(result: FederationResult) -> State:
    """Return the model of a finished run."""
    assert result.state is not None, "a job without a model is an error before"
    return result.state
