"""A site's notes of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from histoflare.bags.targets.classes import Predictions
from histoflare.errors import JobError
from histoflare.rounds.state import State, hash_state
from histoflare.site.records import RunRecords
from tests.refusals import raises_reason

from ..mem import make_mem_task


def state(value: float) -> State:
    return {"personal/head.weight": torch.full((2, 3), value), "personal/scale": torch.tensor(value).double()}


@pytest.fixture
def records(tmp_path: Path) -> RunRecords:
    return RunRecords(tmp_path, "run-1", "a")


def test_a_round_starts_from_the_newest_state_before_it(records: RunRecords) -> None:
    assert records.load_state() == records.load_state(before=0) == {}
    records.save_state(0, state(0.5))
    records.save_state(3, state(3.5))  # rounds 1 and 2 were others'
    assert records.load_state(before=0) == {}
    for before, value in ((1, 0.5), (3, 0.5), (4, 3.5), (9, 3.5), (None, 3.5)):
        assert hash_state(records.load_state(before)) == hash_state(state(value))


def test_a_round_run_again_starts_where_it_did_the_first_time(records: RunRecords) -> None:
    for index in range(5):
        records.save_state(index, state(index))
        assert hash_state(records.load_state(before=index)) == hash_state(state(index - 1) if index else {})


def test_two_states_are_kept_and_none_of_a_history_that_is_no_more(records: RunRecords) -> None:
    for index in range(12):
        records.save_state(index, state(index))
    assert sorted(path.name for path in records.folder.iterdir()) == [
        "state_00010.safetensors",
        "state_00011.safetensors",
    ]
    records.save_state(4, state(-4.0))  # the job was resumed at round 4
    assert hash_state(records.load_state()) == hash_state(state(-4.0))
    assert hash_state(records.load_state(before=12)) == hash_state(state(-4.0))


def test_an_empty_state_replaces_another(records: RunRecords) -> None:
    records.save_state(0, state(1.0))
    records.save_state(1, {})
    assert records.load_state() == {}


def test_what_was_loaded_outlives_its_file(records: RunRecords) -> None:
    records.save_state(0, state(1.0))
    loaded = records.load_state()
    path = records.folder / "state_00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert hash_state(loaded) == hash_state(state(1.0))


@pytest.mark.parametrize("fault", ["damaged", "cut", "another site", "renamed"])
def test_a_state_that_is_not_this_ones_is_refused(tmp_path: Path, records: RunRecords, fault: str) -> None:
    (records if fault != "another site" else RunRecords(tmp_path, "run-1", "b")).save_state(2, state(1.0))
    path = records.folder / "state_00002.safetensors"
    if fault == "damaged":
        path.write_bytes(b"not a state")
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif fault == "renamed":
        path.rename(records.folder / "state_00003.safetensors")
    with raises_reason("RECORDS_INVALID", records.folder / "state_0000"):
        records.load_state()


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_reason("RECORDS_INVALID", tmp_path / "file" / "run-1"):
        RunRecords(tmp_path / "file", "run-1", "a").save_state(0, {})


@pytest.mark.parametrize("run", ["", ".", "..", "...", "a/b", "../a", "a b", "é", "x" * 65, "run\n", "a\\b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(JobError) as caught:
        RunRecords(tmp_path, run, "a")
    assert caught.value.reason == "RUN_INVALID"


@pytest.mark.parametrize("run", ["5f0c1e9a-3d1e-4b8f", "simulate_job", "a..b", "x" * 64])
def test_other_names_are_folders(tmp_path: Path, run: str) -> None:
    assert RunRecords(tmp_path, run, "a").folder.parent == tmp_path


def test_a_run_stays_what_it_was(tmp_path: Path, records: RunRecords) -> None:
    """Else a job could name an earlier run, share what that one kept at the site, and have it sent."""
    task, strategy = {"labels": ("a", "b"), "dim": 4}, {"name": "fedavg", "share": ["blocks"]}
    records.claim(task, strategy)
    records.claim(task, strategy)
    records.claim(task, None)
    for other in ((task, {"name": "fedavg", "share": None}), ({**task, "dim": 5}, strategy), ({}, None)):
        with pytest.raises(JobError) as caught:
            RunRecords(tmp_path, "run-1", "a").claim(*other)
        assert caught.value.reason == "RECORDS_INVALID"
    (records.folder / "run.json").write_text("{")
    with raises_reason("RECORDS_INVALID", records.folder / "run.json"):
        records.claim(task, strategy)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": {"mechanism": "dp-sgd"}},
        {"plan": None},
    ],
)
def test_under_a_privacy_plan_a_run_keeps_it(
    records: RunRecords, tmp_path: Path, change: dict[str, Any]
) -> None:
    """What it has kept may tell of each of them, without noise."""
    first: dict[str, Any] = {"plan": {"mechanism": "update-noise"}, "patients": ["p2", "p1", "p2"]}
    records.claim({"a": 1}, {"name": "s"}, **first)
    again = RunRecords(tmp_path, "run-1", "a")
    again.claim({"a": 1}, {"name": "s"}, **{**first, "patients": ["p1", "p2"]})
    again.claim({"a": 1}, None)
    with pytest.raises(JobError) as caught:
        again.claim({"a": 1}, {"name": "s"}, **{**first, **change})
    assert caught.value.reason == "RECORDS_INVALID"
    assert "p1" not in (records.folder / "run.json").read_text()


@pytest.mark.parametrize("patients", [["p1"], ["p1", "p2", "p3"]])
def test_other_patients_start_anew_and_nobody_is_told(
    records: RunRecords, tmp_path: Path, patients: list[str]
) -> None:
    """A refusal would tell that a patient came or went, to whoever submits a run of the same name again."""
    plan = {"mechanism": "dp-sgd"}
    records.claim({"a": 1}, {"name": "s"}, plan, ["p1", "p2"])
    records.save_state(0, {"w": torch.ones(2)})
    RunRecords(tmp_path, "run-1", "a").claim({"a": 1}, {"name": "s"}, plan, ["p2", "p1"])
    assert records.load_state()
    for _ in range(2):
        RunRecords(tmp_path, "run-1", "a").claim({"a": 1}, {"name": "s"}, plan, patients)
        assert records.load_state() == {}


def test_an_evaluation_alone_claims_nothing(records: RunRecords) -> None:
    records.claim({}, None)
    assert not records.folder.exists()


def test_figures_are_in_tensorboard(records: RunRecords) -> None:
    records.add_scalars(0, {"loss": 0.75, "validation/auc": None})
    records.add_scalars(1, {"loss": 0.5, "validation/auc": 0.625})
    events = EventAccumulator(str(records.folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.75), (1, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/auc")] == [(1, 0.625)]


def test_a_round_run_again_is_shown_once(tmp_path: Path) -> None:
    for index, loss in ((0, 4.0), (1, 3.0)):
        RunRecords(tmp_path, "run-1", "a").add_scalars(index, {"loss": loss})
    events = EventAccumulator(str(tmp_path / "run-1" / "tensorboard"))
    RunRecords(tmp_path, "run-1", "a").add_scalars(1, {"loss": 2.0})  # as a new process would
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 4.0), (1, 2.0)]


def test_predictions_have_a_row_for_each_slide(records: RunRecords) -> None:
    task = make_mem_task(["benign", "tumour"], "encoder")
    table = Predictions(
        np.array([[0.25, 0.75], [0.125, 0.875]]), np.array([1, 0]), ["Doe, J", "p1"], {}, ["s0", "s1"]
    )
    path = records.write_predictions("test", *task.notes(table))
    assert path == records.folder / "evaluation_test.csv"
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["slide"], row["patient"], row["label"], row["predicted"]) for row in table] == [
        ("s0", "Doe, J", "tumour", "tumour"),
        ("s1", "p1", "benign", "tumour"),
    ]
    assert [float(row["p_tumour"]) for row in table] == [0.75, 0.875]
