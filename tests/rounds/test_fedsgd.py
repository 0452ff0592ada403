"""Federated SGD: one step of the server is one step on the data of all sites together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from histoflare.errors import BagError
from histoflare.privacy.plan import DpSgd, Open, UpdateNoise
from histoflare.rounds.round import site_round
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import State, model_state
from histoflare.rounds.strategies.fedsgd import FedSgd
from histoflare.rounds.transports.masked_sum import MaskedSum

from ..refusals import raises_reason
from .toy import RowTask, Table, ToyTask, toy_sites

DATA = toy_sites(4)
WHOLE = RowTask(batch_size=1000)


def zeros(task: ToyTask) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in model_state(task.build_model()).items()}


def pooled_gradient(
    weight: np.ndarray, bias: np.ndarray, tables: list[Table]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean gradient of softmax regression over all rows: (p - onehot) xᵀ, by hand."""
    x = np.concatenate([table.x.double().numpy() for table in tables])
    y = np.concatenate([table.y.numpy() for table in tables])
    logits = x @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    residual = p - np.eye(2)[y]
    return residual.T @ x / len(y), residual.mean(axis=0)


@pytest.mark.parametrize("transport", [None, MaskedSum()], ids=["plain", "masked sum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds_are_gradient_descent_on_all_data_together(momentum: float, transport: Any) -> None:
    strategy = FedSgd(learning_rate=0.5, momentum=momentum)
    options = {} if transport is None else {"transport": transport}
    run = run_in_process(WHOLE, DATA, strategy, 5, 1, initial_state=zeros(WHOLE), **options)
    weight, bias = np.zeros((2, 5)), np.zeros(2)
    velocity: Any = (np.zeros((2, 5)), np.zeros(2))
    for _ in range(5):
        gradient = pooled_gradient(weight, bias, list(DATA.values()))
        velocity = tuple(momentum * v + g for v, g in zip(velocity, gradient, strict=True))
        weight, bias = weight - 0.5 * velocity[0], bias - 0.5 * velocity[1]
    np.testing.assert_allclose(run.state["head.weight"].numpy(), weight, atol=2e-6)
    np.testing.assert_allclose(run.state["head.bias"].numpy(), bias, atol=2e-6)


def test_uniform_weights_take_the_mean_of_the_sites_gradients() -> None:
    run = run_in_process(
        WHOLE, DATA, FedSgd(learning_rate=1.0, weighting="uniform"), 1, 1, initial_state=zeros(WHOLE)
    )
    means = [pooled_gradient(np.zeros((2, 5)), np.zeros(2), [table])[0] for table in DATA.values()]
    np.testing.assert_allclose(run.state["head.weight"].numpy(), -np.mean(means, axis=0), atol=1e-6)


def test_the_batch_is_the_task_s_first_of_the_round() -> None:
    task = ToyTask(batch_size=8)
    seen: list[int] = []

    class Counting(ToyTask):
        def loss(self, model: Any, batch: Any) -> Any:
            seen.append(len(batch[1]))
            return super().loss(model, batch)

    run_in_process(Counting(batch_size=8, local_epochs=3), DATA, FedSgd(), 2, 1)
    assert seen == [8] * 8, "one batch a site and round"
    changes = [
        site_round(
            *(task, FedSgd(), model_state(task.build_model()), DATA["site_0"]),
            site="site_0",
            site_state={},
            round_index=index,
            total_rounds=2,
            seed=1,
            plan=Open(),
        ).update.tensors["head.weight"]
        for index in (0, 1)
    ]
    assert not torch.equal(*changes), "another batch in another round"


def test_running_statistics_move_by_what_the_batches_moved_them() -> None:
    """And not by the learning rate: a tenth of the way to the batch's mean, as BatchNorm has it."""
    task = ToyTask(hidden=4, batch_norm=True, batch_size=1000)
    run = run_in_process(task, DATA, FedSgd(learning_rate=0.01, momentum=0.5, weighting="uniform"), 1, 1)
    body = torch.nn.functional.linear
    means = [
        body(table.x, run.initial["body.weight"], run.initial["body.bias"]).mean(dim=0)
        for table in DATA.values()
    ]
    expected = 0.1 * torch.stack(means).mean(dim=0)
    torch.testing.assert_close(run.state["norm.running_mean"], expected, rtol=1e-4, atol=1e-6)
    stepped = ("body", "norm", "head")
    assert set(run.own) == {f"velocity/{layer}.{part}" for layer in stepped for part in ("weight", "bias")}


@pytest.mark.parametrize(("part", "models"), [(0.0, 1), (0.4, 2), (0.5, 2), (1.0, 5), (0.01, 1)])
def test_what_is_handed_out_is_the_mean_of_the_last_models(part: float, models: int) -> None:
    strategy = FedSgd(learning_rate=0.5, momentum=0.5, averaged_part=part)
    plain = FedSgd(learning_rate=0.5, momentum=0.5)
    run = run_in_process(WHOLE, DATA, strategy, 5, 1)
    after = [run_in_process(WHOLE, DATA, plain, rounds, 1).state for rounds in range(1, 6)]
    for name, tensor in run.handed_out.items():
        expected = torch.stack([state[name].double() for state in after[5 - models :]]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)
        assert torch.equal(run.state[name], after[-1][name]), "the rounds themselves go on as ever"


def test_layers_that_are_not_shared_take_their_step_at_the_site() -> None:
    task = ToyTask(hidden=4)
    run = run_in_process(task, DATA, FedSgd(learning_rate=0.3, share=["body"]), 1, 1)
    whole = FedSgd(learning_rate=0.3)
    for site, data in DATA.items():
        alone = run_in_process(task, {site: data}, whole, 1, 1).state
        torch.testing.assert_close(run.site_states[site]["personal/head.weight"], alone["head.weight"])
    assert torch.equal(run.state["head.weight"], run.initial["head.weight"])


def test_under_dp_sgd_a_site_sends_one_step() -> None:
    """Without noise, with a clip that cuts nothing and all records drawn: the sum ÷ the divisor."""
    plan = DpSgd(clip_norm=1e6, noise_multiplier=0.0, sample_rate=1.0, batch_size=20.0, delta=1e-3)
    run = run_in_process(
        *(WHOLE, DATA, FedSgd(learning_rate=1.0, weighting="uniform"), 1, 1, plan),
        initial_state=zeros(WHOLE),
    )
    sums = [
        len(table.y) * pooled_gradient(np.zeros((2, 5)), np.zeros(2), [table])[0] for table in DATA.values()
    ]
    np.testing.assert_allclose(run.state["head.weight"].numpy(), -np.mean(sums, axis=0) / 20, atol=1e-5)


def test_several_steps_of_dp_sgd_are_no_gradient() -> None:
    plan = DpSgd(noise_multiplier=1.0, sample_rate=0.5, batch_size=20.0, steps=2)
    with raises_reason("PRIVACY_INVALID", 2):
        run_in_process(WHOLE, DATA, FedSgd(weighting="uniform"), 1, 1, plan)


def test_data_that_cannot_be_read_are_a_gradient_of_zeros_where_a_refusal_would_tell() -> None:
    class Broken(ToyTask):
        def train_batches(self, data: Table, seed: int) -> Any:
            raise BagError("a bag is gone")

    strategy = FedSgd(weighting="uniform")
    plan = UpdateNoise(noise_multiplier=0.0, noise_seed=1)
    run = run_in_process(Broken(), DATA, strategy, 1, 1, plan)
    assert torch.equal(run.state["head.weight"], run.initial["head.weight"])
    with raises_reason("BAG_UNUSABLE"):
        run_in_process(Broken(), DATA, strategy, 1, 1)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    damaged = {
        site: Table(table.x * torch.inf, table.y, table.x_test, table.y_test) for site, table in DATA.items()
    }
    with raises_reason("TRAINING_FAILED"):
        run_in_process(WHOLE, damaged, FedSgd(), 1, 1)


def test_a_site_without_data_says_so() -> None:
    empty = Table(
        *(tensor[:0] for tensor in (DATA["site_0"].x, DATA["site_0"].y)), DATA["site_0"].x, DATA["site_0"].y
    )
    with raises_reason("SITE_HAS_NO_TRAINING_DATA"):
        run_in_process(WHOLE, {"a": empty}, FedSgd(), 1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        *({"learning_rate": value} for value in (0, -1.0, float("nan"), float("inf"), "1", True)),
        *({"momentum": value} for value in (1.0, -0.1, float("nan"), "0", True)),
        *({"averaged_part": value} for value in (1.1, -0.1, float("nan"), "1", True)),
    ],
    ids=str,
)
def test_a_rate_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with raises_reason("JOB_INVALID", next(iter(fields))):
        FedSgd(**fields)
