"""A job: what its ``job.toml`` and ``protocol.toml`` say, read the same way by lead, server and site.

Words and numbers only. A name in a table finds the class in a registry of this package (:data:`TASKS`,
``rounds.strategies.STRATEGIES``, ``rounds.transports.TRANSPORTS``, :data:`MECHANISMS`), and what the class
makes of its numbers is all that a job can do.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nvflare.apis.fl_context import FLContext

from histoflare.checks import is_number
from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job_files import CONFIG_FOLDER, META_FILE, read_tables
from histoflare.flare.job_schema import (
    AGREED,
    COHORT,
    EVALUATE,
    EVALUATION,
    HELLO,
    MOST_SITES,
    RAW,
    TABLES,
    TASK_OF,
    TRAINING,
    check_tables,
    invalid,
)
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.privacy.spend import LEAST_HONEST
from histoflare.privacy.tally import Tally, like_training
from histoflare.rounds.patience import Patience
from histoflare.rounds.registry import find_class
from histoflare.rounds.round import count_sent_by_job
from histoflare.rounds.strategies import STRATEGIES
from histoflare.rounds.strategy import trained_by
from histoflare.rounds.tally import asks_model, tally_form_of
from histoflare.rounds.transport import Transport, check_readable
from histoflare.rounds.transports import TRANSPORTS
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.site.kinds import KINDS
from histoflare.slides.splits import SplitRule

TASKS = {kind.task_name: kind.task_class for kind in KINDS.values()} | {
    COHORT: "histoflare.bags.cohort_task:CohortTask"
}
"""What is learned, or asked without a model: a name in ``[task]`` → its class."""

MECHANISMS = {
    "dp-sgd": "histoflare.privacy.plan:DpSgd",
    "update-noise": "histoflare.privacy.plan:UpdateNoise",
}
"""What protects the updates: a name in ``[privacy]`` → its class. Without that table nothing does."""


EVALUATIONS = {"tally": "histoflare.privacy.tally:Tally"}
"""What protects an evaluation: a name in ``[evaluation]`` → its class; or ``none``."""

DECIDED_BY = {"seed": "seed", "trains": "task.train"}
"""Field that a table cannot say → the variable that decides it, if that is none of protocol.toml."""


@dataclass(frozen=True)
class Job:
    """What a job says, whoever runs it.

    Attributes:
        name: The job's name. folder: Where it was read.
        kind: :data:`TRAINING` or :data:`EVALUATION`.
        purpose: What the result is for; a site works for the purposes that its own policy lists.
        rounds: Number of rounds; 1 for an evaluation. start_round: The first one to run.
        least_sites: With how many updates a round may end; with fewer the run ends.
        round_seconds: How long a round waits for the sites that it asked; it ends when all have answered.
        spare_rounds: How many rounds may be done again because a site was lost in the middle of a secure sum;
            the budget is reserved for all of them.
        answer_seconds: How long after its opening a site answers a task, done or not; None: at once.
        seed: The job's seed.
        evaluate: Whether the sites are asked about the model after the last round of a training, and about
            the best one if one was kept. evaluation_only: Sites that are asked then, and in no round.
        best_metric: Metric of the sites' validation patients that says which model is kept as the best.
        patience: Rounds without a new best after which the run ends; None: it runs all rounds.
        run: Name of the run that it goes on after, or asks about; None for a new one.
        task: What is learned (has the methods of ``rounds.task.Task``).
        strategy: How the sites work together (``rounds.strategy.Strategy``).
        transport: How an update travels.
        weights: How many numbers a site sends in a round; 0 where nothing protects them.
        scope: The privacy scope it asks for; empty where FLARE alone knows (at a site).
        protocol: What the consortium agreed on.
        split: Its rule for manifests without a split column.
        plan: What protects the updates, settled for the job's rounds and spare ones. asked: The same as the
            job states it.
        tally: What protects the evaluation, settled; None: its figures are told as they are.
    """

    name: str
    folder: Path
    kind: str
    purpose: str
    rounds: int
    start_round: int
    least_sites: int
    round_seconds: int
    spare_rounds: int
    answer_seconds: int | None
    seed: int
    evaluate: bool
    evaluation_only: tuple[str, ...]
    best_metric: str | None
    patience: int | None
    run: str | None
    task: Any
    strategy: Any
    transport: Transport
    weights: int
    scope: str
    protocol: dict[str, Any]
    split: SplitRule
    plan: PrivacyPlan
    asked: PrivacyPlan
    tally: Tally | None = None

    @property
    def reserved_rounds(self) -> int:
        """For how many rounds a site reserves of its budget: all of the job and the spare ones."""
        return self.rounds + self.spare_rounds

    @property
    def longest_seconds(self) -> int:
        """How long the job runs at most, whatever its sites do.

        All its rounds and spare ones, a minute beside each for combining and sending, and half an hour for
        FLARE, which waits up to 15 minutes for the last word of a site that is gone.
        """
        asked = self.rounds - self.start_round + self.spare_rounds
        if not self.transport.readable:
            asked *= 2  # each of them has a hello before it
        if self.kind == TRAINING:
            # a hello, the sum of the counts, and those of sites that are in no sum
            parts = 3 if self.tally is not None and self.tally.is_shared else 1
            asked += self.most_evaluations * parts
        return asked * (self.round_seconds + 60) + 1800

    @property
    def tasks(self) -> tuple[str, ...]:
        """What its server may ask a site for."""
        of_rounds = (TASK_OF[self.kind],) if self.transport.readable else (HELLO, TASK_OF[self.kind])
        return (*of_rounds, EVALUATE) if self.evaluate else of_rounds

    @property
    def most_evaluations(self) -> int:
        """How many evaluations a site answers: one of its model, and one of the best if a metric chooses it.

        Under a privacy plan there is no best model: no site lets the figures out that would choose it. Where
        sites keep layers for themselves they have those of the last round only, and nobody is asked about
        the best: it would be joined with layers that were never its own.
        """
        if self.kind == EVALUATION:
            return 1
        of_best = self.best_metric is not None and not self.asked.protects and not self.strategy.keeps
        return int(self.evaluate) * (1 + of_best)

    def new_patience(self) -> Patience | None:
        """Return what follows the figure that chooses the best model; None if none does."""
        if self.best_metric is None:
            return None
        return Patience(
            self.best_metric, self.patience, lower_is_better=self.best_metric in self.task.lower_is_better
        )

    def training_sites(self, there: Iterable[str]) -> list[str]:
        """Return which of the sites that are there are asked for updates, in order."""
        return sorted(set(there) - set(self.evaluation_only))


def read_job(folder: Path) -> Job:
    """Read a job folder and make its task, strategy and plan.

    Raises:
        JobError: Something is missing, unknown or out of range; the message names it (JOB_INVALID, or what
            the part says), or the job is of another version (JOB_VERSION).

    >>> from histoflare import read_job
    >>> from histoflare.shipped import JOBS
    >>> job = read_job(JOBS / "mem_fedavg")
    >>> job.strategy.name, job.task.model_name
    ('fedavg', 'mem')
    """
    try:
        meta = json.loads((folder / META_FILE).read_text())
        name, scope, least = str(meta["name"]), str(meta["scope"]), meta["min_clients"]
    except (OSError, ValueError, KeyError, TypeError):
        raise JobError(
            f"{folder}: not a job folder: it has no readable {META_FILE} with a name, a scope and "
            "min_clients."
        ) from None
    job = make_job(*read_tables(folder / CONFIG_FOLDER), folder=folder)
    job = dataclasses.replace(job, name=name, scope=scope)
    if least != job.least_sites:
        raise JobError(
            f"{folder}: least_sites is {job.least_sites} in job.toml, and min_clients, FLARE's word for it, "
            f"is {least} in {META_FILE}; they must be the same.",
            reason="JOB_INVALID",
        )
    return job


def read_application(config: Path) -> Job:
    """Read a job's configuration where FLARE has put it, at the server or at a site.

    Raises:
        JobError: As :func:`read_job`; or FLARE's processes do not run its topology.
    """
    job = make_job(*read_tables(config), folder=config)
    topology = job.strategy.topology
    if not topology.aggregates_at_server:
        raise JobError(
            f"In the topology {topology.name} of the strategy {job.strategy.name} sites aggregate, and "
            "FLARE's processes run those alone in which the server does. Run the job in process, or choose "
            "another strategy.",
            reason="JOB_INVALID",
        )
    return job


def job_of(fl_ctx: FLContext) -> Job:
    """Return the job that this process runs: read once, whatever happens to its files afterwards.

    Raises:
        JobError: As :func:`read_job`.
    """
    workspace = fl_ctx.get_engine().get_workspace()
    return _read_once(Path(workspace.get_app_config_dir(fl_ctx.get_job_id())))


@lru_cache(maxsize=4)
def _read_once(config: Path) -> Job:
    return read_application(config)


def make_job(job: Mapping[str, Any], protocol: Mapping[str, Any], folder: Path) -> Job:
    """Return the job of two read files.

    Args:
        job, protocol: What ``job.toml`` and ``protocol.toml`` say. folder: For messages.

    Raises:
        JobError: As :func:`read_job`.
    """
    agreed = check_tables(job, protocol)
    rounds = agreed["stop"]["rounds"] if job["kind"] == TRAINING else 1
    patience = agreed["stop"].get("patience") if job["kind"] == TRAINING else None
    asked: PrivacyPlan = _make("privacy", job["privacy"], MECHANISMS) if "privacy" in job else Open()
    decided = {name: agreed[name] for name in AGREED if name in agreed} | {"seed": job["seed"]}
    task: Any = _make("task", job["task"], TASKS, decided)
    if job["kind"] == TRAINING and not asks_model(task):
        raise invalid([f"task.name: {job['task']['name']} asks no model: only in a job of kind evaluation"])
    strategy: Any = _make("strategy", job["strategy"], STRATEGIES, {"trains": trained_by(task)})
    transport: Any = _make("transport", job["transport"], TRANSPORTS) if "transport" in job else PLAIN
    asked.admits(strategy, task, transport)
    check_readable(strategy, transport)
    spare = job.get("spare_rounds", 0)
    if spare and transport.readable:
        raise invalid(["spare_rounds: only with a transport that makes a secure sum (masked_sum)"])
    _check_least_sites(job, strategy)
    if not transport.readable:
        _check_enough_for_a_sum(job["least_sites"], asked)
    if patience:
        _check_all_are_asked(strategy, job["seed"])
    # an open job is read without its network's libraries
    weights = count_sent_by_job(strategy, task) if asked.protects else 0
    made = Job(
        name=folder.name,
        folder=folder,
        rounds=rounds,
        start_round=job.get("start_round", 0),
        **{name: job[name] for name in ("kind", "purpose", "least_sites", "round_seconds", "seed")},
        spare_rounds=spare,
        answer_seconds=job.get("answer_seconds"),
        evaluate=job.get("evaluate", False),
        evaluation_only=tuple(job.get("evaluation_only", ())),
        # what ends a run is agreed on: the protocol's own metric, unless the job says which
        best_metric=job.get("best_metric", agreed["metric"] if patience else None),
        patience=patience,
        run=job.get("run"),
        task=task,
        strategy=strategy,
        transport=transport,
        weights=weights,
        scope="",
        protocol=agreed,
        split=SplitRule.of_protocol(agreed["split"]),
        plan=asked.settled(rounds + spare, weights),
        asked=asked,
    )
    return dataclasses.replace(made, tally=_make_tally(job, made))


def _make_tally(said: Mapping[str, Any], job: Job) -> Tally | None:
    """Return what protects a job's evaluation; None where nothing does, or nothing is asked.

    A protected job that says nothing of it lets an evaluation cost each test patient what the training costs
    each patient who is trained on.

    Args:
        said: What ``job.toml`` says. job: The rest of it, made.
    """
    if not job.most_evaluations:
        return None
    if "evaluation" not in said:
        if not job.asked.protects:
            return None
        length = tally_form_of(job.task).length
        tally = like_training(job.plan, job.reserved_rounds, job.most_evaluations, length)
        if tally is not None:
            tally.check_room()
        return tally
    if said["evaluation"][TABLES["evaluation"]] == RAW:
        return None
    asked: Tally = _make("evaluation", said["evaluation"], EVALUATIONS)
    if asked.is_shared and job.transport.readable:
        raise invalid(
            ["evaluation.noise: shared only in a training with a secure sum (transport masked_sum)"]
        )
    if asked.is_shared:
        _check_enough_for_a_sum(job.least_sites, asked)
    tally = asked.settled(job.most_evaluations, tally_form_of(job.task).length)
    tally.check_room()
    return tally


def _check_least_sites(job: Mapping[str, Any], strategy: Any) -> None:
    """Refuse a job whose every round would end it: the strategy asks fewer sites than must answer."""
    least = job["least_sites"]
    asked = strategy.topology.plan(0, [str(site) for site in range(least)], job["seed"]).trainers
    if job["kind"] == TRAINING and len(asked) < least:
        raise invalid([f"least_sites: at most {len(asked)}, for the strategy asks no more sites in a round"])
    if job["kind"] == TRAINING and least < strategy.least_updates:
        raise invalid(
            [f"least_sites: at least {strategy.least_updates}, which {strategy.name} needs a round"]
        )


def _check_enough_for_a_sum(least: int, plan: PrivacyPlan) -> None:
    """Refuse a job whose sums may be of so few sites that each of them would refuse, its budget reserved."""
    needed = max(LEAST_HONEST, getattr(plan, "honest", None) or 1) + 1
    if least < needed:
        raise invalid(
            [
                f"least_sites: at least {needed}, for in a secure sum one site may be curious, and "
                f"{needed - 1} must be honest beside it"
            ]
        )


def _check_all_are_asked(strategy: Any, seed: int) -> None:
    """Refuse patience where rounds have other sites: their figures do not say whether the model improves."""
    sites = [str(site) for site in range(MOST_SITES)]
    if len(strategy.topology.plan(0, sites, seed).trainers) < len(sites):
        raise invalid(
            [
                f"stop.patience in protocol.toml: not with a {strategy.name} strategy that asks some of the "
                "sites in a round; leave patience out"
            ]
        )


def _make(
    table: str,
    said: Mapping[str, Any],
    registry: Mapping[str, str],
    decided: Mapping[str, Any] | None = None,
) -> Any:
    """Make the part that a table names, with the table's numbers and what is decided elsewhere.

    A field that is left out is None where it may be (TOML has no word for that), else what the class says.
    """
    word = TABLES[table]
    name = said.get(word)
    if not isinstance(name, str) or name not in registry:
        raise invalid([f"{table}.{word}: one of {', '.join(registry)}, not {name!r}"])
    kind = find_class(registry[name])
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    given = {key: value for key, value in said.items() if key != word}
    decided = decided or {}
    problems = []
    for key, value in given.items():
        if key in decided or (table == "task" and key in AGREED):
            where = DECIDED_BY.get(key, f"{key} in protocol.toml")
            problems.append(f"{table}.{key}: {where} decides that; leave it out")
        elif key not in fields:
            known = ", ".join(one for one in fields if one not in decided)
            problems.append(f"{table}.{key}: not a field of {name}; it has: {known}")
        elif not _fits(value, fields[key]):
            problems.append(f"{table}.{key}: {_wanted(fields[key])}, not {value!r}")
    problems += [f"protocol.toml: {key} is not of {name}" for key in decided if key not in fields]
    if problems:
        raise invalid(problems)
    unsaid = {key: None for key, hint in fields.items() if _fits(None, hint)}
    try:
        return kind(**{**unsaid, **given, **decided})
    except HistoflareError:
        raise
    except Exception as error:  # a part that did not look at a number before it used it
        raise invalid([f"{table}: {name} cannot be made from these figures: {error}"]) from error


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is of an annotated type; every number is a float, but no boolean is."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(entry, arguments[1]) for entry in value.values())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)  # a part of the part, which looks at its own fields
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return is_number(value)
    return value is None if hint is type(None) else type(value) is hint


def _wanted(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(one) for one in arguments if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if dataclasses.is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "a table"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(
        hint, "a value"
    )
