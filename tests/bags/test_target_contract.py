"""What every target on bags must do. A new one is covered by being registered, and by its labels here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoflare.bags.cohort import load_cohort
from histoflare.bags.models.mem import MemSettings
from histoflare.bags.targets import TARGETS
from histoflare.bags.targets.classes import Classes
from histoflare.bags.targets.target import Target
from histoflare.bags.task import BagTask
from histoflare.errors import BagError, JobError
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.privacy.plan import DpSgd
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.evaluation import evaluate, merge_predictions
from histoflare.rounds.local import predict
from histoflare.rounds.patience import Patience
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.task import PredictionTable
from histoflare.slides.manifest import read_manifest
from tests.refusals import raises_reason

from .asked import ask
from .stand_in import MemoryBags, memory_bags
from .throwaway_targets import LABELS, THROWAWAY, WRITTEN

MEM = MemSettings(memories=3, dim=4, hidden=8)
PLAN = DpSgd(noise_multiplier=0.5, sample_rate=0.5, batch_size=8, steps=4, delta=1e-5, noise_seed=3)


@pytest.fixture(params=sorted({*TARGETS, *THROWAWAY}))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A target, registered as any other."""
    for word, kind in THROWAWAY.items():
        monkeypatch.setitem(TARGETS, word, kind)
    return str(request.param)


@pytest.fixture
def task(name: str) -> BagTask:
    options: dict[str, Any] = {"features": 6, "learning_rate": 0.01, "optimizer": "sgd", "batch_size": 4}
    return BagTask(LABELS[name], "toy:1", MEM, {"name": name}, **options)  # type: ignore[arg-type]


@pytest.fixture
def target(task: BagTask) -> Target:
    return task.target


def bags_of(target: Target, seed: int = 0, n: int = 24) -> MemoryBags:
    """Bags of two kinds, with the target's two values of :data:`WRITTEN`."""
    data, values = memory_bags(seed, n), [target.value_of(label) for label in WRITTEN[target.name]]
    records = [replace(record, label=values[record.label]) for record in data.records]
    return MemoryBags(records, data.bags)


def random_outputs(target: Target, n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, target.outputs))


def table_of(target: Target, n: int = 12) -> Any:
    values = [target.value_of(WRITTEN[target.name][index % 2]) for index in range(n)]
    names = [f"p{index}" for index in range(n)]
    return target.table(random_outputs(target, n), values, names, {}, [f"s{index}" for index in range(n)])


def test_it_is_named_as_registered_and_the_task_is_json(name: str, task: BagTask) -> None:
    assert task.target.name == name and task.target.labels == task.labels
    assert BagTask.from_json(json.loads(json.dumps(task.to_json()))) == task
    with raises_reason("JOB_INVALID", "labels: "):
        replace(task, labels=[])
    with raises_reason("JOB_INVALID", "target.nonsense"):
        replace(task, target={"name": name, "nonsense": 1})  # type: ignore[arg-type]


def test_a_manifest_s_label_is_a_value_and_back(target: Target) -> None:
    for label in WRITTEN[target.name]:
        assert target.say(target.value_of(label)) == label
        assert target.manifest_labels is None or label in target.manifest_labels
    with pytest.raises(BagError):
        target.value_of("nonsense")


def test_losses_are_one_a_bag_and_by_itself(target: Target) -> None:
    values = torch.tensor([target.value_of(label) for label in WRITTEN[target.name] * 3])  # (6, ...)
    outputs = torch.tensor(random_outputs(target, 6), dtype=torch.float32, requires_grad=True)
    losses = target.losses(outputs, values)
    assert losses.shape == (6,)
    for index in range(6):
        alone = target.losses(outputs[index : index + 1], values[index : index + 1])
        torch.testing.assert_close(alone[0], losses[index])
    (gradient,) = torch.autograd.grad(losses[2], outputs)
    assert bool(gradient.isfinite().all()) and bool((gradient[2] != 0).any())
    assert bool((gradient[[0, 1, 3, 4, 5]] == 0).all())
    by_patient = target.losses(outputs.view(2, 3, -1), values.view(2, 3, *values.shape[1:]))
    torch.testing.assert_close(by_patient.flatten(), losses)


def test_a_table_has_what_evaluation_reads(target: Target) -> None:
    table = table_of(target)
    members = [member for member in PredictionTable.__dict__ if not member.startswith("_")]
    assert [member for member in (*members, "slides") if not hasattr(table, member)] == []
    assert table.measures and set(target.lower_is_better) <= set(table.measures)
    found = evaluate(table, bootstraps=50)
    assert list(found.figures) == list(table.measures)
    both = evaluate(merge_predictions({"a": table, "b": table_of(target, 8)}), bootstraps=50)
    for figures in (found, both):
        for figure in figures.figures.values():
            assert figure.value is not None and np.isfinite(figure.value)
            assert figure.low is not None and figure.low <= figure.value <= figure.high  # type: ignore[operator]
    assert len(table_of(target, 0).patients) == 0


def test_a_tally_s_rows_are_of_patients_and_bounded(target: Target) -> None:
    form = target.tally_form
    if form is None:
        assert target.name not in {"classes"}
        return
    table = table_of(target)
    rows = form.rows(table)
    assert rows.shape == (12, form.length) and np.linalg.norm(rows, axis=1).max() <= 1 + 1e-12
    figures = form.figures(rows.sum(axis=0), 0.0, seed=0)
    assert set(figures) <= set(table.measures)
    for figure in form.figures(rows.sum(axis=0), 1e6, seed=0).values():
        assert figure.value is None and figure.reason


def test_notes_are_a_row_a_slide(target: Target) -> None:
    table = table_of(target)
    header, rows = target.notes(table)
    assert header[:4] == ["slide", "patient", "label", "predicted"]
    assert header[4:] == [f"p_{label}" for label in target.classes]
    assert [row[0] for row in rows] == list(table.slides)
    assert [row[2] for row in rows] == list(WRITTEN[target.name]) * 6
    for row, outputs in zip(rows, random_outputs(target, 12), strict=True):
        said = target.answer(outputs)
        assert len(row) == len(header) and row[3] == said.predicted
        assert list(said.probabilities) == list(target.classes)
        assert [float(cell) for cell in row[4:]] == pytest.approx(list(said.probabilities.values()), abs=1e-6)


def test_outputs_that_are_no_answers_are_refused(target: Target) -> None:
    with pytest.raises(JobError):
        wrong = np.full((1, target.outputs), np.nan)
        target.table(wrong, [target.example], ["p"], {}, ["s"])


@pytest.mark.parametrize("plan", [None, PLAN], ids=["FedAvg", "DP-SGD"])
def test_it_is_learned_in_a_federation(task: BagTask, plan: DpSgd | None) -> None:
    sites = {f"site_{i}": bags_of(task.target, i) for i in range(2)}
    first, again = (
        run_in_process(task, sites, FedAvg(weighting="uniform"), 8, 1, plan=plan) for _ in range(2)
    )
    assert hash_state(first.state) == hash_state(again.state) != hash_state(first.initial)
    losses = [np.mean(list(of_round.values())) for of_round in first.losses]
    assert np.isfinite(losses).all()
    if plan is None:
        assert losses[-1] < losses[0]
    made_up = task.longest(2, 3)
    assert made_up is not None
    records = task.records(made_up, "patient", None)
    assert task.record_losses(task.build_model(), task.record_batch(made_up, records, 0)).shape == (2,)


def test_predictions_are_of_each_slide_and_its_value(task: BagTask) -> None:
    data = bags_of(task.target)
    table = predict(task, model_state(task.build_model()), data, "test")
    _, rows = task.notes(table)
    assert [row[0] for row in rows] == [record.slide_id for record in data.test]
    assert [row[2] for row in rows] == [task.target.say(record.label) for record in data.test]


def test_a_cohort_has_the_values_of_its_manifest(target: Target, tmp_path: Path) -> None:
    from .test_cohort import put_bag

    path = tmp_path / "m.csv"
    for second in (WRITTEN[target.name][1], "nonsense"):
        rows = [f"{label}.svs,{label},p{i}\n" for i, label in enumerate((WRITTEN[target.name][0], second))]
        path.write_text("slide,label,patient\n" + "".join(rows))
        manifest = read_manifest(path, check_files=False)
        for index in range(2):
            put_bag(manifest, tmp_path / "bags", index)
        if second == "nonsense":
            with raises_reason("COHORT_INVALID", "line 3", "'nonsense'"):
                load_cohort("site", manifest, tmp_path / "bags", target, None)
            continue
        cohort = load_cohort("site", manifest, tmp_path / "bags", target, None)
        assert sorted(target.say(record.label) for record in cohort.records) == sorted(WRITTEN[target.name])


def test_its_model_s_file_answers(task: BagTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(task, encoder="mean-colour:v1", features=3, patch_px=64)
    answer, table = ask(task, tmp_path, monkeypatch)
    assert list(answer["probabilities"]) == list(task.target.classes)
    assert answer["predicted"] in table
    assert [f"p_{label}" in table for label in task.labels] == [bool(task.target.classes)] * len(task.labels)


def test_a_protocol_names_it(name: str, tmp_path: Path, repository: Path) -> None:
    base = repository / "jobs" / "mem_fedavg"
    changes = {"task.target": {"name": name}, "protocol.labels": list(LABELS[name])}
    read = read_job(write_variant(base, tmp_path / "job", changes))
    assert (read.task.target.name, read.task.labels) == (name, LABELS[name])
    assert hash_protocol(read.protocol) != hash_protocol(read_job(base).protocol)  # it is agreed on
    assert "target" not in read_job(base).protocol and read_job(base).task.target.name == Classes.name


def test_the_best_is_the_least_where_the_target_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    monkeypatch.setitem(TARGETS, "number", THROWAWAY["number"])
    base = repository / "jobs" / "mem_fedavg"
    changes = {"task.target": {"name": "number"}, "protocol.labels": ["share"]}
    changes |= {"best_metric": "mean_absolute_error"}
    patience = read_job(write_variant(base, tmp_path / "job", changes)).new_patience()
    assert patience == Patience("mean_absolute_error", None, lower_is_better=True)
    heard = [patience.hear(index, [value]) for index, value in enumerate((3.0, 4.0, 2.0))]
    assert heard == [True, False, True]
