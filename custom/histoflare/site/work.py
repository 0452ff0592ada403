"""What a site's trainer does with a task: prepare its bags, train, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from histoflare.count_form import CountForm
from histoflare.errors import JobError
from histoflare.rounds.evaluation import Metrics, evaluate, named
from histoflare.rounds.local import one_thread, predict
from histoflare.rounds.round import site_round
from histoflare.rounds.state import State, hash_state
from histoflare.rounds.strategy import split as split_state
from histoflare.rounds.tally import count_rows, predict_each, tally_form_of
from histoflare.rounds.task import PredictionTable
from histoflare.seeds import derive_seed
from histoflare.site.data import device_of, load_site_data
from histoflare.site.kinds import kind_of
from histoflare.site.kinds.kind import Say, SiteData
from histoflare.site.messages import Arrays, EvaluateAnswer, TrainAnswer, TrainerSetup
from histoflare.site.records import RunRecords

METRIC_SPLIT = "validation"
"""The split that metrics sent with an update are of: a model must not be chosen by test patients."""


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
        self._cohort: SiteData | None = None
        self._read_ahead = False
        self._is_warm = False
        self._device = device_of(setup.configuration)

    def prepare(self, to_train: bool = True, left_out: Collection[str] = ()) -> None:
        """Load the site's data and look at its notes: what is wrong is known before anything is booked.

        The first call for a round also makes a model and an optimizer and throws them away: what they import
        (MONAI, transformers) can take seconds, which must not count as a round's own time.

        Args:
            to_train: Whether a round follows, and not an evaluation.
            left_out: Patients who take no part, as they have no budget left: of theirs nothing is read.

        Raises:
            HistoflareError: The site cannot take part; see the reason.
        """
        cohort = self._data().without(left_out)
        if not to_train:
            self._kept()
            return
        self._claim(cohort)
        if not self._is_warm:
            self._task.build_optimizer(self._task.build_model())
            self._is_warm = True
        if self._setup.roles is not None and not self._read_ahead:
            cohort.read_ahead()
            self._read_ahead = True

    def train(
        self,
        arrays: Arrays,
        round_index: int,
        total_rounds: int,
        metrics: Sequence[str],
        left_out: Collection[str] = (),
    ) -> TrainAnswer:
        """Return this site's half of a round, the same bytes as ``rounds.round.site_round`` in process.

        Args:
            arrays: The global model as received, with what the strategy sent beside it.
            round_index: From 0. total_rounds: Of the job.
            metrics: What to send of the received model, such as ``"validation/auc"``.
            left_out: Patients who take no part, as they have no budget left. They count in ``patients`` of
                the answer, by which a policy's least number is kept: who is left out must not show in it.

        Raises:
            HistoflareError: The site cannot take part; see the reason.
        """
        setup = self._setup
        if setup.configuration.evaluation_only:
            raise JobError(f"{setup.site} only evaluates (evaluation_only).", reason="EVALUATION_ONLY")
        whole = self._data()
        cohort = whole.without(left_out)
        state = _tensors(arrays)
        self._claim(cohort)
        site_state = self._records.load_state(before=round_index)
        shown = {} if self._records.is_protected() else site_state
        figures, metric_patients = self._validate(state, shown, metrics)
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
            transport=setup.transport,
            device=self._device,
        )
        self._records.save_state(round_index, outcome.site_state)
        for failure in outcome.training.failures:
            self._say(f"{setup.site}: round {round_index + 1}: counted as nothing: {failure}")
        loss = outcome.training.mean_loss
        self._note(round_index, loss, figures)
        self._say(
            f"{setup.site}: round {round_index + 1} of {total_rounds}: loss {loss:.4f}, "
            f"{outcome.training.n_steps} steps, {time.monotonic() - started:.1f} s"
        )
        return TrainAnswer(
            tensors=_arrays(outcome.update.tensors),
            weight=outcome.update.weight,
            metrics=figures,
            patients=len({record.patient for record in whole.train}),
            metric_patients=metric_patients,
            numbers=dict(outcome.update.numbers),
        )

    def evaluate(self, arrays: Arrays, split: str) -> EvaluateAnswer:
        """Return how well this site's model does on ``split`` (train, validation, test or all).

        The model is the received one, or the ensemble, with what this site keeps for itself in its place
        unless that was learned under a privacy plan. Each slide's prediction goes into the site's own notes.

        Raises:
            HistoflareError: The split has no slides (NOTHING_TO_EVALUATE), or the site cannot take part.
        """
        self._data()
        table = self._predict(_tensors(arrays), self._kept(), split)
        metrics = evaluate(table, seed=derive_seed(self._setup.seed, "evaluate"))
        path = self._records.write_predictions(split, *self._task.notes(table))
        self._say(f"{self._setup.site}: {metrics.n_slides} slides evaluated ({split}): {path}")
        behind = {
            f"{name}{end}": figure.patients
            for name, figure in metrics.figures.items()
            for end in ("", "_low", "_high")
        }
        form = self._task.tally_form
        cells = form.exact(table) if isinstance(form, CountForm) else {}
        return EvaluateAnswer(flat(metrics), metrics.n_patients, behind, cells)

    def tally(self, arrays: Arrays, split: str, left_out: Collection[str] = ()) -> TrainAnswer:
        """Return the noised counts of the predictions for ``split`` (test or all), one row for each patient.

        The model is the received one, without what this site keeps for itself. A patient whose slides cannot
        be read counts as nothing: an error would tell of the patient. Nor does one of ``left_out``, who is
        not asked about, as in :meth:`train`.

        Raises:
            HistoflareError: The site cannot take part, or nothing protects the counts (NOT_ADMITTED).
        """
        setup = self._setup
        if setup.tally is None:
            raise JobError("This job's evaluation has no noise.", reason="NOT_ADMITTED")
        plan = setup.tally.of_site(only_evaluates=setup.configuration.evaluation_only)
        whole = self._data()
        cohort = whole.without(left_out)
        self._kept()  # whether its notes are of this task: what was kept had no noise, under whatever scope
        model = setup.strategy.personalize(_tensors(arrays), {})
        form = tally_form_of(self._task)
        tables = predict_each(self._task, model, cohort, split, self._device)
        rows = count_rows(form, tables)
        with one_thread():
            released = plan.release_rows(rows, plan.noise_source(setup.site, "tally", hash_state(model)))
            if plan.is_shared:
                released = setup.transport.pack(released, 1.0, plan.sum_step)
        try:
            self._note_predictions(split, [table for table in tables.values() if table is not None])
        except Exception as error:  # notes that are missing at the site must not cost what is paid for
            self._say(f"{setup.site}: the predictions could not be written: {error}")
        for patient in (patient for patient, table in tables.items() if table is None):
            self._say(f"{setup.site}: counted as nothing: {patient} could not be asked about")
        patients = len({record.patient for record in whole.records if split in ("all", record.split)})
        return TrainAnswer(_arrays(released), weight=1.0, metrics={}, patients=patients)

    def _note_predictions(self, split: str, tables: Sequence[PredictionTable]) -> None:
        if not tables:
            return
        header, lines = self._task.notes(tables[0])
        lines = [*lines, *(line for table in tables[1:] for line in self._task.notes(table)[1])]
        path = self._records.write_predictions(split, header, lines)
        self._say(f"{self._setup.site}: {len(tables)} patients evaluated ({split}): {path}")

    def _kept(self) -> State:
        """Return what this site keeps for itself of the run.

        What is kept of a run under a plan has no noise, and an evaluation must not tell of it.
        """
        self._records.claim(self._task.to_json(), None)
        return {} if self._records.is_protected() else self._records.load_state()

    def _data(self) -> SiteData:
        if self._cohort is None:
            setup = self._setup
            kind_of(self._task.data).prepare(setup.site, self._task, setup.configuration, self._say)
            cohort = load_site_data(setup.site, self._task, setup.configuration, setup.split)
            for warning in cohort.warnings:
                self._say(f"{setup.site}: {warning}")
            self._say(f"{setup.site}: {_say_device(self._device)}")
            _check_roles(cohort, setup.roles, setup.configuration.evaluation_only)
            self._cohort = cohort
        return self._cohort

    def _claim(self, cohort: SiteData) -> None:
        setup = self._setup
        self._records.claim(
            self._task.to_json(),
            {"name": setup.strategy.name, **vars(setup.strategy)},
            None if setup.roles is None else setup.plan.to_json(),
            {record.patient for record in cohort.train},
            vars(setup.split),
        )

    def _predict(self, state: State, site_state: State, split: str) -> PredictionTable:
        model = self._setup.strategy.personalize(state, site_state)
        return predict(self._task, model, self._data(), split, self._device)

    def _validate(
        self, state: State, site_state: State, wanted: Iterable[str]
    ) -> tuple[dict[str, float | None], int]:
        """Return the wanted metrics of the received model, and over how many patients they are."""
        names = list(wanted)
        if not names:
            return {}, 0
        for name in names:
            if name.partition("/")[0] != METRIC_SPLIT:
                raise JobError(f"Metrics sent with an update are {METRIC_SPLIT}/…, and not {name!r}.")
        handed_out = self._setup.strategy.handed_out(*split_state(state))
        table = self._predict(handed_out, site_state, METRIC_SPLIT)
        unknown = [name for name in names if name.partition("/")[2] not in table.measures]
        if unknown:
            listed = ", ".join(f"{METRIC_SPLIT}/{figure}" for figure in table.measures)
            raise JobError(f"There is no metric {unknown[0]!r} to send with an update; there are {listed}.")
        if not len(table.patients):
            return dict.fromkeys(names), 0
        metrics = evaluate(table, bootstraps=0)
        found = flat(metrics)
        asked = {name: name.partition("/")[2] for name in names}
        behind = min(metrics[figure].patients for figure in asked.values())
        return {name: found[figure] for name, figure in asked.items()}, behind

    def _note(self, round_index: int, loss: float, figures: Mapping[str, float | None]) -> None:
        try:
            self._records.add_scalars(round_index, {"loss": loss, **figures})
            if math.isfinite(loss):  # DP-SGD may draw nobody in a round
                self._records.note_loss(round_index, loss)
        except Exception as error:  # a figure less at the site must not cost the federation a round
            self._say(f"{self._setup.site}: TensorBoard could not be written: {error}")


def _say_device(device: str) -> str:
    """Return where models run, and that there is a GPU if they do not run on it."""
    unused = device == "cpu" and torch.cuda.is_available()
    return f"models run on {device}" + (
        '; there is a GPU, which device = "cuda" in the site\'s file would use' if unused else ""
    )


def _check_roles(cohort: SiteData, roles: Mapping[str, str] | None, evaluation_only: bool) -> None:
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
    return named(metrics.figures) | {"n_slides": metrics.n_slides, "n_patients": metrics.n_patients}


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> State:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(state: State) -> Arrays:
    return {name: tensor.numpy() for name, tensor in state.items()}
