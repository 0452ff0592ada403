"""One patient at a time: nobody moves another's row, and no error tells of anybody."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.bags.models.mem import MemSettings
from histoflare.bags.targets import TARGETS
from histoflare.bags.targets.target import SlideTable
from histoflare.bags.task import BagTask
from histoflare.errors import BagError
from histoflare.masks.images import load_image_cohort
from histoflare.rounds.local import predict
from histoflare.rounds.state import model_state
from histoflare.rounds.tally import count_rows, predict_each, tally_form_of, tally_rows
from tests.refusals import raises_reason

from ..bags.stand_in import MemoryBags, memory_bags
from ..bags.throwaway_targets import THROWAWAY
from ..masks.made import LABELS, make_site
from ..masks.made import TASK as MASKS

TASK = BagTask(("a", "b"), "toy:1", MemSettings(memories=3, dim=4, hidden=8), features=6)
STATE = model_state(TASK.build_model())


def bags() -> MemoryBags:
    """24 slides, two of each patient."""
    made = memory_bags(0)
    owners = [replace(record, patient=f"p{index // 2 % 8}") for index, record in enumerate(made.records)]
    return MemoryBags(owners, made.bags)


def test_rows_are_those_of_the_predictions_all_at_once() -> None:
    for split in ("test", "all"):
        table = predict(TASK, STATE, bags(), split)
        form = tally_form_of(TASK)
        rows = tally_rows(TASK, STATE, bags(), split)
        np.testing.assert_array_equal(rows, form.rows(table))
        assert rows.shape == (len(set(table.patients)), form.length) and rows.any(axis=1).all()


def test_images_of_a_patient_are_read_as_a_cohort_of_their_own(tmp_path: Path) -> None:
    cohort = load_image_cohort("a", make_site(tmp_path, 0), LABELS, window_px=MASKS.window_px)
    state = model_state(MASKS.build_model())
    parts = cohort.by_patient("all")
    assert sorted(each.slide_id for part in parts.values() for each in part.records) == sorted(
        each.slide_id for each in cohort.records
    )
    assert all({each.patient for each in part.records} == {patient} for patient, part in parts.items())
    assert all(part.cache is cohort.cache for part in parts.values())
    rows = tally_rows(MASKS, state, cohort, "test")
    assert len(rows) == len({each.patient for each in cohort.test}) > 0
    np.testing.assert_allclose(rows[:, 0], 1 / np.sqrt(1.25))  # each was read and asked about


@dataclass(frozen=True)
class Restless(BagTask):
    """Its model remembers whom it saw and draws lots: what it says depends on who was asked before."""

    def build_model(self) -> Any:
        model = super().build_model()
        model.register_buffer("seen", torch.zeros(1))
        return model

    def predict(self, model: Any, data: Any, split: str) -> SlideTable:
        table = super().predict(model, data, split)
        model.seen += 1
        outputs = np.array([[0.0, float(model.seen) + float(torch.rand(()))] for _ in table.patients])
        labels = table.columns["labels"]
        return self.target.table(outputs, labels, table.patients, {}, table.slides)


def test_nobody_moves_another_s_row() -> None:
    task = Restless(TASK.labels, TASK.encoder, TASK.model, features=6)
    state = model_state(task.build_model())
    whole = predict_each(task, state, bags(), "all")
    less = MemoryBags([record for record in bags().records if record.patient != "p0"], bags().bags)
    for patient, table in predict_each(task, state, less, "all").items():
        assert table is not None and whole[patient] is not None
        np.testing.assert_array_equal(
            table.columns["probabilities"],
            whole[patient].columns["probabilities"],  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("error", [BagError("gone"), OSError("disk"), RuntimeError("torch"), MemoryError()])
def test_whoever_cannot_be_asked_is_a_row_of_zeros(error: Exception) -> None:
    class Damaged(MemoryBags):
        def features(self, record: Any, rows: Any = None, /) -> Any:
            if record.slide_id == "slide_5":
                raise error
            return super().features(record, rows)

    data = Damaged(bags().records, bags().bags)
    lost = list(data.by_patient("all")).index("p2")  # of slides 4 and 5, one is lost
    rows, whole = tally_rows(TASK, STATE, data, "all"), tally_rows(TASK, STATE, bags(), "all")
    assert not rows[lost].any() and whole[lost].any()
    np.testing.assert_array_equal(np.delete(rows, lost, 0), np.delete(whole, lost, 0))


def test_a_model_that_answers_nobody_counts_nobody() -> None:
    """Its weights are finite, and too large for any answer."""
    diverged = {name: tensor.sign() * 1e38 for name, tensor in STATE.items()}
    rows = tally_rows(TASK, diverged, bags(), "test")
    assert len(rows) == len(bags().by_patient("test")) and not rows.any()


def test_what_is_no_patient_s_fault_is_an_error() -> None:
    for state in ({}, {name: tensor * float("nan") for name, tensor in STATE.items()}):
        with raises_reason("STATE_INVALID"):
            predict_each(TASK, state, bags(), "test")
    nobody = MemoryBags([], {})
    assert tally_rows(TASK, STATE, nobody, "test").shape == (0, tally_form_of(TASK).length)


def test_a_table_of_two_patients_is_no_row() -> None:
    form = tally_form_of(TASK)
    both = predict(TASK, STATE, bags(), "test")
    assert not count_rows(form, {"p": both, "q": None}).any()


def test_what_has_no_tally_cannot_be_evaluated_under_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "number", THROWAWAY["number"])
    task = replace(TASK, labels=("share",), target={"name": "number"})  # type: ignore[arg-type]
    assert task.tally_form is None
    with raises_reason("PRIVACY_INVALID", "tally_form"):
        tally_form_of(task)
