"""Strategies beside one another on the same sites: Table 1 of Darzidehkalani et al. 2022, measured.

For each strategy: how well the model serves the sites on average, and the worst of them; how soon; and how
much is sent for it. Beside them each site alone, and all data in one place. Everything runs in this process,
without FLARE.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job import Job
from histoflare.flare.job_variant import read_value
from histoflare.lab.watch import RunningStep, Watch
from histoflare.report.figures import KINDS
from histoflare.rounds.bounds import Bounds, plan_bounds, train_bounds
from histoflare.rounds.evaluation import figure_of
from histoflare.rounds.local import predict
from histoflare.rounds.registry import find_class
from histoflare.rounds.strategies import STRATEGIES, make_strategy
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import Strategy
from histoflare.rounds.trial import Served, Trial, try_strategy

NEAR = 0.95
"""A strategy is there once it is as good as this part of what the best ends with."""

OF_TASK = "task."

ALONE, TOGETHER = "each site alone", "all data in one place"


@dataclass(frozen=True)
class Setup:
    """What strategies are tried on, with one seed.

    Attributes:
        job: Its task, rounds, seed, privacy plan and transport; not its strategy.
        sites: Site → its data.
        pooled: The same in one place.
        external: The external cohort's data, or None.
    """

    job: Job
    sites: Mapping[str, Any]
    pooled: Any
    external: Any = None


@dataclass
class _Row:
    """What is known of one strategy on one split: a value for each seed.

    Attributes:
        served, external: How the last model serves the sites, and the external cohort.
        trials: What came of a strategy; empty for the models beside them.
    """

    served: list[Served] = field(default_factory=list)
    external: list[float] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    refused: HistoflareError | None = None

    def add(self, trial: Trial) -> None:
        """Take what came of a seed."""
        self.trials.append(trial)
        self.served.append(trial.last)
        self.external += [] if trial.external is None else [trial.external]

    def figures(self, lower_is_better: bool) -> dict[str, Any]:
        """Return how the sites are served, over the seeds."""
        choose, choose_worst = (min, max) if lower_is_better else (max, min)
        values = [list(served.values()) for served in self.served]
        return {
            **_over_seeds("mean", [statistics.fmean(each) for each in values]),
            **_over_seeds("worst", [choose_worst(each) for each in values]),
            **_over_seeds("best", [choose(each) for each in values]),
            **_over_seeds("spread", [max(each) - min(each) for each in values]),
            **_over_seeds("external", self.external),
            "sites": {
                site: statistics.fmean(served[site] for served in self.served)
                for site in self.served[0]
                if all(site in served for served in self.served)
            },
        }

    def costs(self, near: Sequence[float], lower_is_better: bool) -> dict[str, Any]:
        """Return how soon the mean was as good as ``near``, seed by seed, and what was sent."""
        reached = [
            trial.reached(value, lower_is_better=lower_is_better)
            for trial, value in zip(self.trials, near, strict=True)
        ]
        times = [
            trial.seconds_until(rounds)
            for trial, rounds in zip(self.trials, reached, strict=True)
            if rounds is not None
        ]
        known = [rounds for rounds in reached if rounds is not None]
        return {
            "near_seeds": len(known),
            "near_rounds": statistics.fmean(known) if known else None,
            "near_seconds": statistics.fmean(times) if known else None,
            "bytes_up": statistics.fmean(trial.bytes_up for trial in self.trials),
            "bytes_down": statistics.fmean(trial.bytes_down for trial in self.trials),
            "seconds": statistics.fmean(sum(trial.seconds) for trial in self.trials),
            "course": [
                statistics.fmean(statistics.fmean(served.values()) for served in of_round)
                for of_round in zip(*(trial.rounds for trial in self.trials), strict=True)
            ],
        }


@dataclass(frozen=True)
class Choice:
    """A strategy, and the fields of the job's task that it is tried with in place of the job's."""

    strategy: Strategy
    of_task: Mapping[str, Any]

    def task(self, task: Any) -> Any:
        """Return the task with these fields.

        Raises:
            JobError: It has no such field, or does not take the value.
        """
        known = {each.name for each in fields(task)}
        for name in self.of_task:
            if name not in known:
                raise JobError(f"The task has no '{name}'; it has {', '.join(sorted(known))}.")
        return replace(task, **self.of_task) if self.of_task else task


def parse_strategy(text: str, sites: Sequence[str]) -> Choice:
    """Return the strategy of ``"NAME"`` or ``"NAME FIELD=VALUE …"``, as the fields of a job's ``[strategy]``.

    Args:
        text: A value is JSON, or else a text. ``task.FIELD=VALUE`` is of the job's ``[task]``, such as
            ``task.learning_rate``: what serves one strategy may be too large for another.
        sites: For a strategy that is told who trains.

    Raises:
        JobError: There is no such strategy, or it does not take such fields.
    """
    name, *pairs = text.split()
    settings: dict[str, Any] = {}
    for pair in pairs:
        known, equals, value = pair.partition("=")
        if not equals or not known:
            raise JobError(f"--strategy takes 'NAME FIELD=VALUE', not '{text}'.")
        settings[known] = read_value(value)
    of_task = {key.removeprefix(OF_TASK): settings.pop(key) for key in [*settings] if key.startswith(OF_TASK)}
    if name in STRATEGIES and "sites" in {each.name for each in fields(find_class(STRATEGIES[name]))}:
        settings.setdefault("sites", list(sites))
    return Choice(make_strategy(name, **settings), of_task)


def compare_strategies(
    splits: Mapping[str, Sequence[Setup]],
    strategies: Sequence[str],
    figure: str,
    *,
    device: str = "cpu",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Try every strategy on every split with every seed.

    Args:
        splits: Name → for each seed, the sites and the job with that seed. The job is the same for all but
            for its seed.
        strategies: As for :func:`parse_strategy`. One that lacks a field, or that the job's plan or
            transport refuses, has a row that says so.
        figure: The figure of the task's that is asked for.
        device: Where models run.
        watch: Is told how far it is.

    Returns:
        What ``report.strategies_page.write_strategies`` shows; plain JSON:

        ``splits`` → ``rows``, in each: ``mean`` over the sites of their own test patients, ``worst`` of the
        sites, ``spread`` from the worst to the best, ``external``; each the mean over seeds, with ``_sd``.
        ``near_rounds`` and ``near_seconds`` until the mean over the sites is 0.95 of the best strategy's
        last: the mean over the ``near_seeds`` seeds in which it ever is. ``bytes_up`` and ``bytes_down`` of
        all sites in a round.

    Raises:
        JobError: No strategy could be tried (the figure of no site exists, for instance), or one is there
            twice.
    """
    watch = watch or Watch()
    if len(set(strategies)) < len(strategies):
        raise JobError("A strategy is there twice; that is no second run.")
    job = next(iter(splits.values()))[0].job
    return {
        "job": job.name,
        "data": job.task.data,
        "task": job.task.to_json(),
        "figure": figure,
        "rounds": job.rounds,
        "seeds": [setup.job.seed for setup in next(iter(splits.values()))],
        "privacy": job.plan.mechanism,
        "transport": job.transport.name,
        "near": NEAR,
        "splits": [
            _try_split(name, setups, strategies, figure, device, watch) for name, setups in splits.items()
        ],
    }


def _try_split(
    name: str, setups: Sequence[Setup], strategies: Sequence[str], figure: str, device: str, watch: Watch
) -> dict[str, Any]:
    """Return one split's entry."""
    rows = {text: _Row() for text in (ALONE, *strategies, TOGETHER)}
    made: dict[str, Choice] = {}
    for number, setup in enumerate(setups, start=1):
        models = len(setup.sites) + 1
        step = watch.begin(
            f"{name}, seed {number} of {len(setups)}", models + len(strategies) * setup.job.rounds
        )
        _try_bounds(setup, figure, rows, step, device)
        for count, text in enumerate(strategies, start=1):
            if not rows[text].refused:
                try:
                    made[text] = parse_strategy(text, list(setup.sites))
                    rows[text].add(_try(setup, figure, made[text], step, device))
                except HistoflareError as error:
                    rows[text].refused = error
            step.show(models + count * setup.job.rounds)
    for text, row in rows.items():
        if row.refused:
            watch.warn(f"{name}: {text} is left out ({row.refused.reason}): {row.refused}")
    first = setups[0]
    return {
        "name": name,
        "sites": {site: {"n_train": first.job.task.n_train(data)} for site, data in first.sites.items()},
        "rows": _summarise(rows, made, figure in first.job.task.lower_is_better),
    }


def _try(setup: Setup, figure: str, choice: Choice, step: RunningStep, device: str) -> Trial:
    job, task = setup.job, choice.task(setup.job.task)
    job.plan.admits(choice.strategy, task, job.transport)
    return try_strategy(
        task,
        setup.sites,
        choice.strategy,
        job.rounds,
        job.seed,
        figure,
        plan=job.plan,
        transport=job.transport,
        external=setup.external,
        device=device,
        on_round=step.advance,
    )


def _try_bounds(setup: Setup, figure: str, rows: Mapping[str, _Row], step: RunningStep, device: str) -> None:
    """Train each site alone and all in one place, as the bounds beside a job's report are trained."""
    job = setup.job
    courses = plan_bounds(job.task, setup.sites, FedAvg(), job.rounds, job.seed, job.plan, job.asked)
    bounds: Bounds = train_bounds(
        job.task,
        setup.sites,
        setup.pooled,
        courses,
        FedAvg(),
        job.seed,
        device=device,
        on_model=step.advance,
    )

    def ask(state: Any, data: Any, roles: str = "test") -> float | None:
        return None if state is None else figure_of(predict(job.task, state, data, roles, device), figure)

    for text, models in (
        (ALONE, bounds.local),
        (TOGETHER, {} if bounds.pooled is None else dict.fromkeys(setup.sites, bounds.pooled)),
    ):
        served = {site: ask(state, setup.sites[site]) for site, state in models.items()}
        known = {site: value for site, value in served.items() if value is not None}
        rows[text].served += [known] if known else []
        if setup.external is not None and known:
            asked = list(models.values()) if text == ALONE else [bounds.pooled]
            values = [ask(state, setup.external, "all") for state in asked]
            rows[text].external.append(statistics.fmean(value for value in values if value is not None))


def _summarise(
    rows: Mapping[str, _Row], made: Mapping[str, Choice], lower_is_better: bool
) -> list[dict[str, Any]]:
    tried = [row for row in rows.values() if row.trials and not row.refused]
    if not tried:
        why = "".join(f"\n  {text}: {row.refused}" for text, row in rows.items() if row.refused)
        raise JobError(f"No strategy could be tried.{why}", reason="NOTHING_TO_EVALUATE")
    choose = min if lower_is_better else max
    best = [
        choose(statistics.fmean(trial.last.values()) for trial in of_seed)
        for of_seed in zip(*(row.trials for row in tried), strict=True)
    ]
    near = [value / NEAR if lower_is_better else value * NEAR for value in best]
    listed = []
    for text, row in rows.items():
        entry: dict[str, Any] = {"strategy": text, "settings": None}
        if text in made:
            of_task = {OF_TASK + name: value for name, value in made[text].of_task.items()}
            entry["settings"] = asdict(made[text].strategy) | of_task
        if row.refused:
            entry["refused"] = {"reason": row.refused.reason, "why": str(row.refused)}
        elif row.served:
            entry |= row.figures(lower_is_better)
            entry |= row.costs(near, lower_is_better) if row.trials else {}
        else:
            entry["refused"] = {"reason": "", "why": "it could not be trained"}
        listed.append(entry)
    return listed


def _over_seeds(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation over the seeds; None where there are too few."""
    return {
        name: statistics.fmean(values) if values else None,
        f"{name}_sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def main_figure(data: str) -> str:
    """Return the figure that speaks for the others of a kind of data."""
    return KINDS[data].main
