"""What a site's trainer does with a task: prepare its bags, train, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from histoflare.bags.cohort import Cohort, load_cohort
from histoflare.errors import JobError
from histoflare.rounds.evaluation import Metrics, evaluate
from histoflare.rounds.local import predict
from histoflare.rounds.state import State
from histoflare.rounds.strategy import site_round
from histoflare.rounds.task import PredictionTable, Task
from histoflare.seeds import derive_seed
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.messages import Arrays, EvaluateAnswer, TrainAnswer, TrainerSetup
from histoflare.site.records import RunRecords
from histoflare.slides.manifest import read_manifest

FIGURES = ("accuracy", "balanced_accuracy", "auc")
METRIC_SPLIT = "validation"
"""The split that metrics sent with an update are of: a model must not be chosen by test patients."""

Say = Callable[[str], None]
"""Says a line to the person at this site."""


class BagTask(Task, Protocol):
    """A task on bags."""

    @property
    def encoder(self) -> str:
        """Id of the encoder that made them."""

    @property
    def features(self) -> int:
        """Numbers a patch."""

    @property
    def mpp(self) -> float | None:
        """Resolution of their patches in µm/px; None takes any."""

    @property
    def patch_px(self) -> int | None:
        """Side of their patches in pixels; None takes any."""

    def to_json(self) -> dict[str, Any]:
        """Return its settings."""


def load_site_cohort(site: str, task: BagTask, configuration: SiteConfiguration) -> Cohort:
    """Return a site's cohort as the task wants it, with the memory its configuration gives to features.

    Raises:
        ManifestError: The manifest cannot be used.
        BagError: The bags do not fit the manifest or the task (COHORT_INVALID).
    """
    return load_cohort(
        site,
        # Training reads no slides: their files need not be there.
        read_manifest(configuration.manifest, labels=task.labels, check_files=False),
        configuration.bags,
        labels=task.labels,
        encoder=task.encoder,
        mpp=task.mpp,
        patch_px=task.patch_px,
        cache_bytes=configuration.cache_mb << 20,
    )


class SiteWork:
    """A site's data, loaded once and kept from round to round.

    Args:
        setup: What and how to train.
        say: Says a line to the person at this site.

    Raises:
        JobError: The run's name cannot be used (RUN_INVALID).
    """

    def __init__(self, setup: TrainerSetup, say: Say) -> None:
        self._setup = setup
        self._task = setup.task
        self._say = say
        self._records = RunRecords(setup.configuration.records, setup.run, setup.site)
        self._cohort: Cohort | None = None

    def prepare(self) -> None:
        """Load the site's data and look at its notes: what is wrong is known before a round is booked.

        Raises:
            HistoflareError: The site cannot take part; see the reason.
        """
        self._claim(self._data())

    def train(
        self, arrays: Arrays, round_index: int, total_rounds: int, metrics: Sequence[str]
    ) -> TrainAnswer:
        """Return this site's half of a round, the same bytes as ``rounds.strategy.site_round`` in process.

        Args:
            arrays: The global state as received.
            round_index: From 0. total_rounds: Of the job.
            metrics: What to send of the received model, such as ``"validation/auc"``.

        Raises:
            HistoflareError: The site cannot take part; see the reason.
        """
        setup = self._setup
        if setup.configuration.evaluation_only:
            raise JobError(f"{setup.site} only evaluates (evaluation_only).", reason="EVALUATION_ONLY")
        cohort = self._data()
        state = _tensors(arrays)
        self._claim(cohort)
        site_state = self._records.load_state(before=round_index)
        figures, metric_patients = self._validate(state, site_state, metrics)
        started = time.monotonic()
        outcome = site_round(
            self._task,
            setup.strategy,
            state,
            cohort,
            site=setup.site,
            site_state=site_state,
            round_index=round_index,
            total_rounds=total_rounds,
            seed=setup.seed,
            plan=setup.plan,
        )
        self._records.save_state(round_index, outcome.site_state)
        loss = outcome.training.mean_loss
        self._note(round_index, {"loss": loss, **figures})
        self._say(
            f"{setup.site}: round {round_index + 1} of {total_rounds}: loss {loss:.4f}, "
            f"{outcome.training.n_steps} steps, {time.monotonic() - started:.1f} s"
        )
        return TrainAnswer(
            tensors=_arrays(outcome.update.tensors),
            weight=outcome.update.weight,
            metrics=figures,
            patients=len({record.patient for record in cohort.train}),
            metric_patients=metric_patients,
        )

    def evaluate(self, arrays: Arrays, split: str) -> EvaluateAnswer:
        """Return how well this site's model does on ``split`` (train, validation, test or all).

        The model is the received one with what this site keeps for itself in its place. Each slide's
        prediction goes into the site's own notes.

        Raises:
            HistoflareError: The split has no slides (NOTHING_TO_EVALUATE), or the site cannot take part.
        """
        cohort = self._data()
        self._records.claim(self._task.to_json(), None)
        table = self._predict(_tensors(arrays), self._records.load_state(), split)
        metrics = evaluate(table, seed=derive_seed(self._setup.seed, "evaluate"))
        slides = [record.slide_id for record in cohort.records if split in ("all", record.split)]
        rows = zip(slides, table.patients, table.labels.tolist(), table.probabilities.tolist(), strict=True)
        path = self._records.write_predictions(split, self._task.labels, list(rows))
        self._say(f"{self._setup.site}: {metrics.n_slides} slides evaluated ({split}): {path}")
        return EvaluateAnswer(flat(metrics), metrics.n_patients)

    def _data(self) -> Cohort:
        if self._cohort is None:
            setup = self._setup
            if setup.configuration.prepare:
                # Its imports alone take a second and more: only where they are needed.
                from histoflare.site.preparation import prepare_site

                prepare_site(setup.site, self._task, setup.configuration, self._say)
            cohort = load_site_cohort(setup.site, self._task, setup.configuration)
            for warning in cohort.warnings:
                self._say(f"{setup.site}: {warning}")
            _check_roles(cohort, setup.roles, setup.configuration.evaluation_only)
            self._cohort = cohort
        return self._cohort

    def _claim(self, cohort: Cohort) -> None:
        setup = self._setup
        self._records.claim(
            self._task.to_json(),
            {"name": setup.strategy.name, **vars(setup.strategy)},
            None if setup.roles is None else setup.plan.to_json(),
            {record.patient for record in cohort.train},
        )

    def _predict(self, state: State, site_state: State, split: str) -> PredictionTable:
        model = self._setup.strategy.personalize(state, site_state)
        return predict(self._task, model, self._data(), split)

    def _validate(
        self, state: State, site_state: State, wanted: Iterable[str]
    ) -> tuple[dict[str, float | None], int]:
        """Return the wanted metrics of the received model, and over how many patients they are."""
        names = list(wanted)
        for name in names:
            split, _, figure = name.partition("/")
            if split != METRIC_SPLIT or figure not in FIGURES:
                raise JobError(
                    f"There is no metric {name!r} to send with an update; there are "
                    f"{', '.join(f'{METRIC_SPLIT}/{figure}' for figure in FIGURES)}."
                )
        if not names:
            return {}, 0
        table = self._predict(state, site_state, METRIC_SPLIT)
        if not len(table.labels):
            return dict.fromkeys(names), 0
        metrics = evaluate(table, bootstraps=0)
        found = flat(metrics)
        return {name: found[name.partition("/")[2]] for name in names}, metrics.n_patients

    def _note(self, round_index: int, values: Mapping[str, float | None]) -> None:
        try:
            self._records.add_scalars(round_index, values)
        except Exception as error:  # a figure less at the site must not cost the federation a round
            self._say(f"{self._setup.site}: TensorBoard could not be written: {error}")


def _check_roles(cohort: Cohort, roles: Mapping[str, str] | None, evaluation_only: bool) -> None:
    """Refuse patients that the ledger does not know, or has for something else.

    The manifest may have been changed between the reservation and its being read here.
    """
    if roles is None:
        return
    for record in cohort.records:
        if roles.get(record.patient) != ("test" if evaluation_only else record.split):
            raise JobError(
                "The manifest was changed since the job was admitted: its patients are not those that stand "
                "in the ledger for this job. Leave it as it was until the job is over.",
                reason="COHORT_INVALID",
            )


def flat(metrics: Metrics) -> dict[str, float | None]:
    """Return overall metrics as names and numbers: ``auc``, ``auc_low``, ``auc_high``, …, ``n_patients``."""
    named: dict[str, float | None] = {}
    for name in FIGURES:
        figure = getattr(metrics, name)
        named |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return named | {"n_slides": metrics.n_slides, "n_patients": metrics.n_patients}


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> State:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(state: State) -> Arrays:
    return {name: tensor.numpy() for name, tensor in state.items()}
