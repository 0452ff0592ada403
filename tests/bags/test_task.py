from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from histoflare.bags.task import BagBatch, BagTask, collate
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state, model_state
from histoflare.rounds.strategies.fedavg import FedAvg
from tests.refusals import raises_reason

from ..mem import make_mem_task
from .stand_in import MemoryBags, Record, memory_bags


def small_task(**arguments: Any) -> BagTask:
    options = {"features": 6, "memories": 3, "dim": 4, "hidden": 8, "learning_rate": 5e-3, "batch_size": 4}
    return make_mem_task(["benign", "tumour"], "toy:1", **{**options, **arguments})


def batches(task: BagTask, data: MemoryBags, seed: int = 0) -> list[BagBatch]:
    return list(task.train_batches(data, seed))


def test_a_job_can_carry_it() -> None:
    task = small_task(reconstruction=0.1, max_patches=None)
    assert BagTask.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert make_mem_task(("a", "b"), "e") == make_mem_task(["a", "b"], "e")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ["one"]),
        ("labels", ["a", "a"]),
        ("labels", "ab"),
        ("encoder", ""),
        ("memories", 0),
        ("blocks", 1.0),
        ("batch_size", True),
        ("local_epochs", 0),
        ("max_patches", 0),
        ("patch_px", -1),
        ("mpp", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", "0.1"),
        ("reconstruction", -0.1),
        ("weight_decay", float("inf")),
        ("optimizer", "lion"),
        ("input_norm", "layer"),
        ("seed", 0.5),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    with raises_reason("JOB_INVALID", f"{field}: "):
        make_mem_task(**{"labels": ["a", "b"], "encoder": "e", field: value})


def test_every_fault_is_named_at_once_and_unknown_fields_are_refused() -> None:
    with raises_reason("JOB_INVALID", "model.memories: ", "optimizer: "):
        small_task(memories=0, optimizer="lion")
    with raises_reason("JOB_INVALID", "class_weights"):
        BagTask.from_json({**small_task().to_json(), "class_weights": [1, 2]})


def test_one_round_is_every_training_bag_once_an_epoch() -> None:
    data = memory_bags(0)
    seen = batches(small_task(local_epochs=2), data)
    assert [len(batch.labels) for batch in seen] == [4, 4, 4, 4] * 2  # 16 training bags
    for epoch in (seen[:4], seen[4:]):
        bags = [tuple(b.features[i][b.mask[i]].flatten().tolist()) for b in epoch for i in range(4)]
        expected = [tuple(data.features(record).flatten().tolist()) for record in data.train]
        assert sorted(bags) == sorted(expected)
        by_bag = {tuple(data.features(r).flatten().tolist()): r.label for r in data.train}
        assert [by_bag[bag] for bag in bags] == [int(label) for b in epoch for label in b.labels]
    assert not torch.equal(seen[0].mask, seen[4].mask) or not torch.equal(seen[0].features, seen[4].features)


def test_batches_follow_the_seed() -> None:
    data, task = memory_bags(0), small_task(max_patches=3)
    one, two, other = (torch.cat([b.features for b in batches(task, data, seed)]) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_long_bags_are_subsets_in_training_and_whole_in_prediction() -> None:
    data, task = memory_bags(0), small_task(max_patches=3, local_epochs=8)
    record = data.train[0]
    rows = {tuple(row.tolist()) for row in data.features(record)}
    drawn: set[tuple[float, ...]] = set()
    for batch in batches(task, data):
        assert batch.features.shape[1] <= 3
        for index in range(len(batch.labels)):
            bag = {tuple(row.tolist()) for row in batch.features[index][batch.mask[index]]}
            if bag <= rows:
                drawn |= bag
    assert len(drawn) > 3  # a new subset each epoch
    lengths: list[int] = []
    model = task.build_model()
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        task.predict(model, data, "test")
    assert lengths == [len(data.features(r)) for r in data.test]


def test_the_loss_is_cross_entropy_plus_the_weighted_error() -> None:
    batch = collate([torch.randn(3, 6), torch.randn(5, 6)], [0, 1])
    for weight in (0.0, 0.5):
        task = small_task(reconstruction=weight)
        model = task.build_model()
        out = model.attend(batch.features, batch.mask)
        expected = F.cross_entropy(out.outputs, batch.labels)
        assert (out.auxiliary is None) == (weight == 0)
        if out.auxiliary is not None:
            expected = expected + out.auxiliary.mean()
        torch.testing.assert_close(task.loss(model, batch), expected)
        assert any("decoder" in name for name in model.state_dict()) == (weight > 0)


def test_predictions_are_a_table_of_slides() -> None:
    data, task = memory_bags(0), small_task()
    table = predict(task, model_state(task.build_model()), data, "test")
    assert table.probabilities.shape == (8, 2)
    np.testing.assert_allclose(table.probabilities.sum(axis=1), 1.0)
    assert table.labels.tolist() == [record.label for record in data.test]
    assert list(table.patients) == [record.patient for record in data.test]
    assert table.subgroups == {"sex": [record.subgroups.get("sex") for record in data.test]}
    assert None in table.subgroups["sex"]
    everything = predict(task, model_state(task.build_model()), data, "all")
    assert len(everything.labels) == len(data.records)
    empty = MemoryBags(data.train, data.bags)
    assert predict(task, model_state(task.build_model()), empty, "test").probabilities.shape == (0, 2)
    assert len(predict(task, model_state(task.build_model()), data, "validation").labels) == 0
    with raises_reason("JOB_INVALID", "'holdout'"):
        predict(task, model_state(task.build_model()), data, "holdout")


def test_a_bag_of_another_width_names_its_slide() -> None:
    data = memory_bags(0, features=5)
    with raises_reason("BAG_UNUSABLE", "slide_0"):
        predict(small_task(), model_state(small_task().build_model()), data, "all")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_learns_and_federates(optimizer: str) -> None:
    rate = {"adam": 5e-3, "sgd": 0.1}[optimizer]
    task = small_task(optimizer=optimizer, learning_rate=rate, local_epochs=3, seed=1)
    sites = {f"site_{i}": memory_bags(i) for i in range(3)}
    result = run_in_process(task, sites, FedAvg(), rounds=8, seed=0)
    metrics = evaluate(predict(task, result.state, memory_bags(99, n=90), "all"), bootstraps=0)
    assert metrics["auc"].value is not None and metrics["auc"].value > 0.9


def test_training_is_the_same_bytes_for_one_seed() -> None:
    data, task = memory_bags(0), small_task(max_patches=4)
    state = model_state(task.build_model())
    assert hash_state(state) == hash_state(model_state(task.build_model()))
    assert hash_state(state) != hash_state(model_state(small_task(seed=1).build_model()))
    first, again, other = (train_locally(task, state, data, seed=seed).state for seed in (0, 0, 1))
    assert hash_state(first) == hash_state(again) != hash_state(other)


def of_patients(*patients: str) -> MemoryBags:
    """Return bags of 2, 3, ... patches whose slides belong to ``patients``."""
    names = [f"slide_{index}" for index in range(len(patients))]
    records = [
        Record(name, patient, index % 2, "train", patches=2 + index)
        for index, (name, patient) in enumerate(zip(names, patients, strict=True))
    ]
    generator = torch.Generator().manual_seed(0)
    bags = {name: torch.randn((2 + i, 6), generator=generator) for i, name in enumerate(names)}
    return MemoryBags([*records, Record("slide_0", "x", 0, "test")], bags)


def test_records_are_a_patients_training_slides() -> None:
    task, data = small_task(), of_patients("p", "q", "p", "r", "p")
    records = task.records(data, "patient", None)
    assert [[slide.slide_id[-1] for slide in record] for record in records] == [["0", "2", "4"], ["1"], ["3"]]
    assert task.records(data, "patient", None) == records


def test_a_records_loss_is_the_mean_of_its_slides_losses() -> None:
    data = of_patients("p", "q", "p", "r", "p", "q")
    for weight in (0.0, 0.5):
        task = small_task(reconstruction=weight, blocks=2)
        model = task.build_model()
        records = task.records(data, "patient", None)
        losses = task.record_losses(model, task.record_batch(data, records, 0))
        by_hand = [
            torch.stack([task.loss(model, collate([data.features(s)], [s.label])) for s in record]).mean()
            for record in records
        ]
        torch.testing.assert_close(losses, torch.stack(by_hand))


def test_a_records_loss_depends_on_no_other_record() -> None:
    task, data = small_task(reconstruction=0.5, max_patches=3), of_patients(*"pqprpqq")
    model, records = task.build_model(), task.records(data, "patient", None)
    together = task.record_losses(model, task.record_batch(data, records, 4))
    for chosen in ([2], [1, 0], [0, 2]):
        apart = task.record_losses(model, task.record_batch(data, [records[i] for i in chosen], 4))
        torch.testing.assert_close(apart, together[chosen])


def test_what_is_drawn_of_a_long_bag_follows_the_seed_and_the_slide() -> None:
    task, data = small_task(max_patches=2), of_patients(*"pppqq")
    records = task.records(data, "patient", None)
    one, again, other = (task.record_batch(data, records, seed) for seed in (1, 1, 2))
    assert one.features.shape == (2, 3, 2, 6) and one.mask.sum() == 10 and one.slides.sum() == 5
    assert torch.equal(one.features, again.features) and not torch.equal(one.features, other.features)
    same = [replace(record, patches=10) for record in data.records]
    twins = MemoryBags(same, dict.fromkeys(data.bags, torch.arange(60.0).view(10, 6)))
    drawn = task.record_batch(twins, task.records(twins, "patient", None), 1)
    assert len({tuple(bag.flatten().tolist()) for bag in drawn.features[drawn.slides]}) > 3  # each its own
    second = task.record_batch(data, records[1:], 1)
    assert torch.equal(second.features[0], one.features[1, :2])
    for p, record in enumerate(records):
        for s, slide in enumerate(record):
            assert int(one.labels[p, s]) == slide.label
            rows = {tuple(row.tolist()) for row in data.features(slide)}
            assert {tuple(row.tolist()) for row in one.features[p, s]} <= rows


def test_of_a_long_bag_no_more_is_asked_for_than_the_job_says() -> None:
    asked: list[int | None] = []

    class Watched(MemoryBags):
        def features(self, record: Record, rows: Sequence[int] | None = None, /) -> Tensor:
            asked.append(None if rows is None else len(set(rows)))
            return super().features(record, rows)

    long = Record("slide", "p", 0, "train", patches=5000)
    data = Watched([long], {"slide": torch.randn(5000, 6)})
    task = small_task(max_patches=7)
    task.record_batch(data, [(long,)], 0)
    list(task.train_batches(data, 0))
    assert asked == [7, 7]


def test_collate_pads_to_the_longest() -> None:
    bags: list[Tensor] = [torch.ones(2, 3), torch.ones(0, 3), torch.ones(4, 3)]
    batch = collate(bags, [1, 0, 1])
    assert batch.features.shape == (3, 4, 3)
    assert batch.mask.sum(dim=1).tolist() == [2, 0, 4]
    assert float(batch.features[0, 2:].abs().sum()) == 0.0
    assert batch.labels.dtype == torch.int64


def test_a_record_without_subgroups_has_no_columns() -> None:
    data = MemoryBags([Record("s", "p", 0, "test")], {"s": torch.randn(4, 6)})
    assert predict(small_task(), model_state(small_task().build_model()), data, "test").subgroups == {}
