"""Local training under DP-SGD: the contract of local training, and what a site's records may do to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoflare.bags.task import BagTask
from histoflare.errors import BagError, JobError
from histoflare.privacy.noise import SecureNoise, SeededNoise
from histoflare.rounds.evaluation import evaluate
from histoflare.rounds.local import predict, train_locally
from histoflare.rounds.private import train_privately
from histoflare.rounds.state import hash_state, load_state, model_state
from histoflare.rounds.task import PerRecord
from tests.refusals import raises_reason

from ..bags.stand_in import MemoryBags, Record, memory_bags
from ..mem import make_mem_task
from .throwaway import Pushing
from .toy import RowTask, ToyTask, toy_table


@dataclass(frozen=True)
class Plan:
    clip_norm: float = 1.0
    noise_multiplier: float | None = 1.0
    sample_rate: float = 0.5
    batch_size: float = 20.0
    steps: int = 3
    record: str = "patient"
    slides_per_patient: int | None = None


EXACT = Plan(clip_norm=1e30, noise_multiplier=0.0, sample_rate=1.0, batch_size=10.0, steps=1)


def train(task: Any = None, data: Any = None, plan: Plan = Plan(), **changes: Any) -> Any:
    task = task or RowTask()
    arguments = {"plan": plan, "noise": SeededNoise(0), "seed": 0, **changes}
    state = arguments.pop("state", None) or model_state(task.build_model())
    return train_privately(task, state, toy_table(1) if data is None else data, **arguments)


def mem_task(**fields: Any) -> BagTask:
    small = {"features": 6, "memories": 3, "dim": 4, "hidden": 8, "optimizer": "sgd", "learning_rate": 0.1}
    return make_mem_task(["benign", "tumour"], "toy:1", **{**small, **fields})


def several_slides(seed: int = 0) -> MemoryBags:
    """Return 16 training slides of 5 patients: of 6, 4, 3, 2 and 1 slides."""
    data = memory_bags(seed)
    patients = iter([p for p, slides in enumerate((6, 4, 3, 2, 1)) for _ in range(slides)])
    records = [
        replace(record, patient=f"p{next(patients)}") if record.split == "train" else record
        for record in data.records
    ]
    return MemoryBags(records, data.bags)


def test_tasks_that_tell_records_apart() -> None:
    assert isinstance(mem_task(), PerRecord) and isinstance(RowTask(), PerRecord)
    assert not isinstance(ToyTask(), PerRecord)
    with raises_reason("MODEL_NOT_PRIVATE", "ToyTask"):
        train(ToyTask())


def test_one_exact_full_step_is_gradient_descent() -> None:
    # Softmax regression from zero weights: dL/dW = Σ (p - onehot) xᵀ with p = 1/2, by hand.
    data, task = toy_table(2, n=10), RowTask(learning_rate=0.3)
    state = {name: torch.zeros_like(tensor) for name, tensor in model_state(task.build_model()).items()}
    result = train(task, data, replace(EXACT, batch_size=25.0), state=state)
    residual = 0.5 - np.eye(2)[data.y.numpy()]
    gradient = residual.T @ data.x.numpy().astype(np.float64) / 25
    np.testing.assert_allclose(result.state["head.weight"].numpy(), -0.3 * gradient, rtol=1e-5, atol=1e-7)
    assert (result.n_samples, result.n_steps) == (10, 1)
    assert result.mean_loss == pytest.approx(np.log(2))


def test_an_exact_full_step_is_that_of_local_training_on_one_slide_each() -> None:
    data = memory_bags(0)
    task = mem_task(batch_size=16, max_patches=None)
    state = model_state(task.build_model())
    plain = train_locally(task, state, data, seed=0)
    exact = train(task, data, replace(EXACT, batch_size=16.0), state=state)
    torch.testing.assert_close(exact.state, plain.state, rtol=1e-5, atol=1e-7)
    assert exact.mean_loss == pytest.approx(plain.mean_loss, rel=1e-5)


def test_the_same_bytes_for_the_same_source_and_seed() -> None:
    task, data = mem_task(max_patches=3), several_slides()
    first, again, other = (train(task, data, noise=SeededNoise(noise)) for noise in (3, 3, 4))
    assert hash_state(first.state) == hash_state(again.state) != hash_state(other.state)
    assert first.mean_loss == again.mean_loss
    assert hash_state(train(task, data, noise=SeededNoise(3), seed=1).state) != hash_state(first.state)
    secret = [train(task, data, noise=SecureNoise()) for _ in range(2)]
    assert hash_state(secret[0].state) != hash_state(secret[1].state)


def test_nothing_global_is_disturbed() -> None:
    task = mem_task()
    state = model_state(task.build_model())
    before, threads = hash_state(state), torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(task, several_slides(), state=state)
    assert torch.equal(torch.rand(3), expected)
    assert (hash_state(state), torch.get_num_threads()) == (before, threads)


def test_records_come_one_at_a_time() -> None:
    task, data, seen = mem_task(), several_slides(), []

    class Watched(BagTask):
        def record_losses(self, model: nn.Module, batch: Any) -> Tensor:
            seen.append(tuple(batch.slides.shape))
            return super().record_losses(model, batch)

    train(Watched(**task.to_json()), data, EXACT)
    assert seen == [(1, slides) for slides in (6, 4, 3, 2, 1)]  # nobody is padded to another's slides


def test_a_hook_adds_after_clip_and_noise() -> None:
    # SGD with rate 0.5 and one step: the difference of two runs is -0.5·c, though c is far above the clip.
    task = RowTask(learning_rate=0.5)
    plain = train(task, plan=Plan(clip_norm=1e-3, steps=1)).state
    pushed = train(task, plan=Plan(clip_norm=1e-3, steps=1), hook=Pushing(40.0)).state
    for name in plain:
        torch.testing.assert_close(pushed[name] - plain[name], torch.full_like(plain[name], -20.0))


def test_every_step_is_taken_though_nobody_was_drawn() -> None:
    task = RowTask()
    state = model_state(task.build_model())
    result = train(task, plan=Plan(sample_rate=1e-12, steps=4), state=state)
    assert result.n_steps == 4 and math.isnan(result.mean_loss)
    assert all(not torch.equal(result.state[name], tensor) for name, tensor in state.items())


def test_what_leaves_of_a_step_has_the_noise_of_the_plan() -> None:
    # Steps of noise alone add up: 25 of them, lr 1, have standard deviation 5·z·C / batch_size.
    task = RowTask(features=400, learning_rate=1.0, classes=50)
    state = model_state(task.build_model())
    data = toy_table(0, features=400)
    plan = Plan(sample_rate=1e-12, noise_multiplier=2.0, clip_norm=0.5, batch_size=4.0, steps=25)
    change = train(task, data, plan, state=state).state["head.weight"] - state["head.weight"]
    assert float(change.std()) == pytest.approx(5 * 2.0 * 0.5 / 4.0, rel=5 / math.sqrt(2 * 20_000))


def test_no_patient_moves_a_step_by_more_than_the_clip_norm() -> None:
    data, task = several_slides(), mem_task(learning_rate=1.0)
    state = model_state(task.build_model())
    plan = replace(EXACT, clip_norm=0.05, batch_size=1.0)
    whole = train(task, data, plan, state=state).state
    for patient in {record.patient for record in data.train}:
        rest = MemoryBags([r for r in data.records if r.patient != patient], data.bags)
        without = train(task, rest, plan, state=state).state
        moved = math.sqrt(sum(float((whole[n] - without[n]).double().square().sum()) for n in whole))
        assert 0.04 < moved <= 0.05 * (1 + 1e-4)  # the state itself is rounded to float32


@pytest.mark.parametrize(
    ("record", "most", "count"), [("patient", None, 5), ("slide", 2, 9), ("slide", 9, 16)]
)
def test_records_are_patients_or_slides(record: str, most: int | None, count: int) -> None:
    # Exact steps at rate 1 divide by 1: the loss is the mean over the records, each once.
    task, data = mem_task(), several_slides()
    plan = replace(EXACT, record=record, slides_per_patient=most)
    drawn: list[int] = []

    class Watched(BagTask):
        def record_batch(self, data: Any, records: Any, seed: int) -> Any:
            drawn.append(len(records))
            return super().record_batch(data, records, seed)

    result = train(Watched(**task.to_json()), data, plan)
    assert drawn == [1] * count and result.n_samples == count


def test_dropout_follows_the_secret_source_and_not_the_public_seed() -> None:
    task = RowTask(hidden=20, dropout=0.5)
    one, same, other = (
        train(task, plan=EXACT, noise=SeededNoise(noise), seed=seed)
        for noise, seed in ((0, 0), (0, 1), (1, 0))
    )
    assert hash_state(one.state) == hash_state(same.state) != hash_state(other.state)


def test_what_cannot_be_trained_is_refused() -> None:
    with raises_reason("SITE_HAS_NO_TRAINING_DATA", "'train'"):
        train(data=toy_table(0, n=0))
    with raises_reason("MODEL_NOT_PRIVATE", "BatchNorm1d"):
        train(RowTask(hidden=4, batch_norm=True))
    with raises_reason("PRIVACY_INVALID"):
        train(plan=Plan(noise_multiplier=None))
    with raises_reason("TRAINING_FAILED"):
        train(RowTask(learning_rate=1e30), plan=Plan(clip_norm=1e15))


class Remembering(nn.Linear):
    """A layer that keeps the mean of what it saw."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.register_buffer("seen", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        self.seen: Tensor
        self.seen += x.detach().mean(dim=0)
        return super().forward(x)


@dataclass(frozen=True)
class RememberingTask(RowTask):
    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Remembering(self.features, self.classes)


def test_what_a_model_would_remember_of_records_does_not_leave() -> None:
    task = RememberingTask()
    state = model_state(task.build_model())
    state["seen"] = torch.full_like(model_state(task.build_model())["seen"], 7.0)
    for sample_rate in (1.0, 1e-12):
        trained = train(task, plan=replace(EXACT, sample_rate=sample_rate, noise_multiplier=1.0), state=state)
        assert torch.equal(trained.state["seen"], state["seen"])


def oracle(data: MemoryBags, patient: str) -> tuple[BagTask, dict[str, Tensor]]:
    """Return a model whose answer is not finite for a bag with a certain patch of ``patient``."""
    task = mem_task(memories=1, dim=1, hidden=1, learning_rate=1e-3)
    record = next(record for record in data.train if record.patient == patient)
    patch = data.bags[record.slide_id][0]
    state = {name: torch.zeros_like(t) for name, t in model_state(task.build_model()).items()}
    state["blocks.0.encoder.0.weight"][0] = 1e6 * patch / patch.norm() ** 2
    state["blocks.0.encoder.0.bias"][0] = -0.99e6
    state["blocks.0.encoder.2.weight"][0, 0] = 1e18
    state["head.weight"][:, 0] = torch.tensor([1e18, -1e18])
    return task, state


def test_no_error_tells_of_a_record_that_the_model_was_made_to_fail_on() -> None:
    data = several_slides()
    task, state = oracle(data, "p3")
    model = task.build_model()
    load_state(model, state)
    own = task.record_batch(data, [r for r in task.records(data, "patient", None) if r[0].patient == "p3"], 0)
    gradients = torch.autograd.grad(task.record_losses(model, own).sum(), list(model.parameters()))
    assert not all(bool(gradient.isfinite().all()) for gradient in gradients)
    plan = Plan(noise_multiplier=1e4, sample_rate=1.0, steps=1)
    assert train(task, data, plan, state=state).n_steps == 1


class Faulty(MemoryBags):
    """Bags of which those of one patient are not as they should be."""

    def __init__(self, data: MemoryBags, patient: str, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__(data.records, data.bags)
        self.patient, self.fault = patient, fault

    def features(self, record: Any, rows: Any = None) -> Tensor:
        bag = super().features(record, rows)
        return self.fault(bag) if record.patient == self.patient else bag


def raises(error: Exception) -> Callable[[Tensor], Tensor]:
    def fault(bag: Tensor) -> Tensor:
        raise error

    return fault


FAULTS = {
    "unreadable": raises(BagError("s3.h5 is damaged", reason="BAG_DAMAGED")),
    "gone": raises(FileNotFoundError("s3.h5")),
    "no memory": raises(MemoryError()),
    "a refusal with another reason": raises(JobError("no", reason="TRAINING_FAILED")),
    "width": lambda bag: bag[:, :-1],
    "dimensions": lambda bag: bag[0],
    "NaN": lambda bag: bag * math.nan,
    "infinite": lambda bag: bag * math.inf,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("patient", ["p0", "p3"])
def test_a_drawn_record_that_fails_counts_as_none_and_nothing_else_changes(fault: str, patient: str) -> None:
    """A failed round would tell that this patient was drawn. p0 is the first record."""
    data = several_slides()
    there = [record for record in data.records if record.patient != patient]
    faulty = Faulty(data, patient, FAULTS[fault])
    got = train(mem_task(), faulty, EXACT)
    expected = train(mem_task(), MemoryBags(there, data.bags), EXACT)
    assert got.n_steps == expected.n_steps
    assert all(torch.equal(got.state[name], expected.state[name]) for name in expected.state)
    assert len(got.failures) == (fault not in ("NaN", "infinite"))
    assert expected.failures == ()


def test_what_fails_whatever_the_record_still_fails() -> None:
    class NoModel(BagTask):
        def build_model(self) -> Any:
            raise JobError("no such model", reason="NO_MODEL")

    task = mem_task()
    with raises_reason("NO_MODEL"):
        train(NoModel(**task.to_json()), several_slides(), state=model_state(task.build_model()))


def test_a_patient_with_very_many_slides_is_one_record() -> None:
    generator = torch.Generator().manual_seed(0)
    records = [Record(f"s{i}", "p0", i % 2, "train", patches=40) for i in range(60)]
    data = MemoryBags(records, {r.slide_id: torch.randn((40, 6), generator=generator) for r in records})
    plan = replace(EXACT, clip_norm=0.02, batch_size=1.0)
    task = mem_task(learning_rate=1.0)
    state = model_state(task.build_model())
    moved = train(task, data, plan, state=state).state
    length = math.sqrt(sum(float((moved[n] - state[n]).double().square().sum()) for n in state))
    assert 0.019 < length <= 0.02 * (1 + 1e-4)


def test_it_learns_with_a_little_noise() -> None:
    task = mem_task(learning_rate=0.5, seed=1)
    plan = Plan(sample_rate=0.25, batch_size=15.0, steps=120, noise_multiplier=0.5)
    result = train(task, memory_bags(0, n=90), plan)
    metrics = evaluate(predict(task, result.state, memory_bags(99, n=90), "all"), bootstraps=0)
    assert metrics["auc"].value is not None and metrics["auc"].value > 0.8
