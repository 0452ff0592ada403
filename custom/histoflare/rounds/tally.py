"""The rows of a tally: what a model says of each patient, asked of one patient at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from histoflare.errors import JobError
from histoflare.rounds.local import load_model, reproducible
from histoflare.rounds.state import State
from histoflare.rounds.task import PredictionTable, Task
from histoflare.tally_form import Floats, TallyForm

__all__ = ["TallyForm", "asks_model", "count_rows", "predict_each", "tally_form_of", "tally_rows"]


def tally_form_of(task: Task) -> TallyForm:
    """Return what an evaluation under a budget counts of a task's predictions.

    Raises:
        JobError: Nothing of it can be counted (PRIVACY_INVALID).
    """
    form = task.tally_form
    if form is None:
        raise JobError(
            "What this job's model tells has no tally, so it cannot be evaluated under a budget: leave the "
            "evaluation out (evaluate = false), or give its target a tally_form.",
            reason="PRIVACY_INVALID",
        )
    return form


def asks_model(task: Task) -> bool:
    """Return whether a task needs a model for its answer; one that does not say so does."""
    return getattr(task, "asks_model", True) is not False


def predict_each(
    task: Task, state: State, data: Any, split: str, device: str = "cpu"
) -> dict[str, PredictionTable | None]:
    """Return what a model says of each patient of ``split``, asked of each alone.

    How a batch is rounded, and what an error stops, would let one patient move another's row: so each patient
    has a model and a call of its own, and whoever's slides cannot be read or asked about has None.

    Args:
        task, state, device: As for :func:`histoflare.rounds.local.predict`.
        data: The task's, which knows its patients (``by_patient``).
        split: train, validation, test or all.

    Raises:
        JobError: The state is not one of the task's model, or there is no such split.
    """
    model = load_model(task, state, device)  # what is wrong with it is no patient's, and an error
    tables: dict[str, PredictionTable | None] = {}
    for patient, part in data.by_patient(split).items():
        try:
            with reproducible(0, device), torch.no_grad():
                tables[patient] = task.predict(copy.deepcopy(model), part, split)
        except Exception:  # of whatever kind: an error would tell of the patient
            tables[patient] = None
    return tables


def count_rows(form: TallyForm, tables: Mapping[str, PredictionTable | None]) -> Floats:
    """Return a row for each patient of :func:`predict_each`: (patients, length), zeros where there is None.

    A table that is not of exactly one patient counts as None.
    """
    rows = np.zeros((len(tables), form.length))
    for row, table in zip(rows, tables.values(), strict=True):
        if table is not None and len(set(table.patients)) == 1:
            row[:] = form.rows(table)[0]
    return rows


def tally_rows(task: Task, state: State, data: Any, split: str, device: str = "cpu") -> Floats:
    """Return the rows of a tally of ``split``: (patients, length); arguments and errors as its two parts."""
    form = tally_form_of(task)
    return count_rows(form, predict_each(task, state, data, split, device))
