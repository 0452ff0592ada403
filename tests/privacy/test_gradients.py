"""Sums of clipped gradients: the engines against the definition, and what one record can do to a sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.privacy import bookkeeping
from histoflare.privacy.gradients import HEADROOM, Losses, sum_of_clipped_gradients
from histoflare.privacy.requirements import ENGINES
from histoflare.rounds.local import one_thread

from .models import (
    FEATURES,
    Outside,
    Reused,
    channel_losses,
    convolutional,
    mem_task,
    only,
    patients,
    row_losses,
    rows,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


RAGGED = [[5, 1, 3], [2], [9, 9], [1]]


def length(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name].double() - other[name].double() for name in one}


def by_definition(
    model: nn.Module, losses: Losses, singles: list[Any], clip_norm: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Σ g · min(1, C/‖g‖) with each record in a batch of its own, in float64."""
    total: dict[str, Tensor] = {}
    norms = []
    for single in singles:
        model.zero_grad(set_to_none=True)
        losses(model, single).sum().backward()
        gradient = {
            name: torch.zeros_like(p).double() if p.grad is None else p.grad.double()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        norms.append(length(gradient))
        factor = min(1.0, clip_norm / norms[-1]) if norms[-1] else 1.0
        for name, tensor in gradient.items():
            total[name] = total.get(name, 0) + factor * tensor
    model.zero_grad(set_to_none=True)
    return total, norms


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"blocks": 2},
        {"reconstruction": 0.5},
        {"blocks": 2, "reconstruction": 0.3, "input_norm": "rms"},
    ],
)
def test_every_engine_is_the_definition_on_mem(engine: str, fields: dict[str, Any]) -> None:
    task = mem_task(**fields)
    model, batch = task.build_model(), patients(RAGGED)
    singles = [only(batch, [p]) for p in range(len(RAGGED))]
    _, norms = by_definition(model, task.record_losses, singles, 1.0)
    clip_norm = sorted(norms)[1] * 1.05  # two of the four are clipped
    expected, _ = by_definition(model, task.record_losses, singles, clip_norm)
    got = sum_of_clipped_gradients(model, task.record_losses, batch, clip_norm, engine)
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert list(got.tensors) == [name for name, _ in model.named_parameters()]
    # The engines clip a little below the clip norm, by HEADROOM.
    assert length(difference(got.tensors, expected)) < 2 * HEADROOM * 2 * clip_norm
    torch.testing.assert_close(got.losses, task.record_losses(model, batch).detach())
    assert not any(tensor.requires_grad for tensor in (*got.tensors.values(), got.norms, got.losses))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [RAGGED, [[40, 30], [1]], [[3]], [[1], [1]]])
def test_the_engines_agree_to_rounding(engine: str, sizes: list[list[int]]) -> None:
    task = mem_task(reconstruction=0.1)
    model, batch = task.build_model(), patients(sizes)
    oracle = sum_of_clipped_gradients(model, task.record_losses, batch, 0.3, "microbatch")
    got = sum_of_clipped_gradients(model, task.record_losses, batch, 0.3, engine)
    assert length(difference(got.tensors, oracle.tensors)) < 1e-5 * length(oracle.tensors)


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
def test_opacus_engines_take_other_layers(engine: str) -> None:
    model = convolutional()
    oracle = sum_of_clipped_gradients(model, channel_losses, rows(), 0.5, "microbatch")
    got = sum_of_clipped_gradients(model, channel_losses, rows(), 0.5, engine)
    assert length(difference(got.tensors, oracle.tensors)) < 1e-4 * length(oracle.tensors)
    with pytest.raises(JobError, match=r"0\.weight is not the weight"):
        sum_of_clipped_gradients(model, channel_losses, rows(), 0.5)


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
def test_a_layer_may_be_used_twice(engine: str) -> None:
    oracle = sum_of_clipped_gradients(Reused(), row_losses, rows(), 0.5, "microbatch")
    got = sum_of_clipped_gradients(Reused(), row_losses, rows(), 0.5, engine)
    torch.testing.assert_close(got.norms, oracle.norms, rtol=1e-5, atol=0)
    assert length(difference(got.tensors, oracle.tensors)) < 1e-5 * length(oracle.tensors)


def test_ghost_refuses_a_layer_used_twice() -> None:
    with pytest.raises(JobError, match="Opacus cannot train this model") as caught:
        sum_of_clipped_gradients(Reused(), row_losses, rows(), 0.5, "ghost")
    assert caught.value.reason == "MODEL_NOT_PRIVATE"


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_left_out(engine: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    got = sum_of_clipped_gradients(model, row_losses, rows(), 0.5, engine)
    expected, norms = by_definition(
        model, row_losses, [(x[None], y[None]) for x, y in zip(*rows(), strict=True)], 0.5
    )
    assert list(got.tensors) == ["2.weight"]
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-4, atol=0)
    assert length(difference(got.tensors, expected)) < HEADROOM * len(norms) * 0.5 * 1.01


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_left_as_it_was(engine: str) -> None:
    task = mem_task()
    model, untouched = task.build_model(), task.build_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    sum_of_clipped_gradients(model, task.record_losses, patients(RAGGED), 1.0, engine)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "_norm_sample") for p in model.parameters())
    for name, module in model.named_modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._backward_hooks
        assert set(vars(module)) - before[name] <= {"activations", "max_batch_len"}
    for one, two in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="boom"):
        sum_of_clipped_gradients(model, failing, patients(RAGGED), 1.0, engine)
    assert "forward" not in vars(model.head) and not model.head._forward_hooks


def failing(model: nn.Module, batch: Any) -> Tensor:
    raise RuntimeError("boom")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    clip_norm=st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 10.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=2, max_size=6),
    left_out=st.integers(0, 5),
)
def test_one_patient_more_or_less_moves_the_sum_by_at_most_the_clip_norm(
    seed: int, clip_norm: float, scale: float, sizes: list[list[int]], left_out: int
) -> None:
    task = mem_task(seed=seed, reconstruction=0.2)
    model, batch = task.build_model(), patients(sizes, seed, scale)
    others = [p for p in range(len(sizes)) if p != left_out % len(sizes)]
    total = sum_of_clipped_gradients(model, task.record_losses, batch, clip_norm).tensors
    without = sum_of_clipped_gradients(model, task.record_losses, only(batch, others), clip_norm).tensors
    assert length(difference(total, without)) <= clip_norm


@pytest.mark.parametrize("engine", ENGINES)
def test_a_patient_with_many_slides_weighs_no_more(engine: str) -> None:
    task = mem_task()
    model, batch = task.build_model(), patients([[7] * 30, [7]], scale=20.0)
    for p in (0, 1):
        alone = sum_of_clipped_gradients(model, task.record_losses, only(batch, [p]), 0.01, engine)
        assert float(alone.norms[0]) > 0.01 and 0.0099 < length(alone.tensors) <= 0.01


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
def test_a_record_that_is_not_finite_is_left_out_and_harms_no_other(engine: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = rows()
    expected = sum_of_clipped_gradients(model, row_losses, (x[[0, 2, 3, 4]], y[[0, 2, 3, 4]]), 0.5, engine)
    x[1, 2] = math.nan
    got = sum_of_clipped_gradients(model, row_losses, (x, y), 0.5, engine)
    assert got.norms.isfinite().tolist() == [True, False, True, True, True]
    assert length(difference(got.tensors, expected.tensors)) < 1e-6


@pytest.mark.parametrize("engine", ["ghost", "microbatch"])
def test_where_a_record_cannot_be_left_out_its_batch_is_refused(engine: str) -> None:
    x, y = rows()
    x[1, 2] = math.nan
    model = nn.Linear(FEATURES, 2)
    with pytest.raises(JobError, match="physical batch of 1") as caught:
        sum_of_clipped_gradients(model, row_losses, (x, y), 0.5, engine)
    assert caught.value.reason == "NOT_FINITE"
    alone = sum_of_clipped_gradients(model, row_losses, (x[1:2], y[1:2]), 0.5, engine)
    assert length(alone.tensors) == 0.0 and alone.norms.isfinite().tolist() == [False]


def test_a_gradient_whose_square_is_no_float32_is_clipped_like_any_other() -> None:
    model, x = nn.Linear(FEATURES, 2, bias=False), rows(n=3)[0]
    x[0] *= 1e25

    def sums(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum(dim=1)

    norms = sum_of_clipped_gradients(model, sums, x, 0.5).norms
    torch.testing.assert_close(norms, math.sqrt(2) * x.double().norm(dim=1), rtol=1e-5, atol=0)
    alone = sum_of_clipped_gradients(model, sums, x[:1], 0.5)
    assert length(alone.tensors) == pytest.approx(0.5, rel=2e-3)


def test_both_ways_to_a_norm_are_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for t, i, o in ((1, 5, 3), (4, 30, 40), (50, 5, 3)):
        a, b = torch.randn((6, t, i), generator=generator), torch.randn((6, t, o), generator=generator)
        expected = (b.double().mT @ a.double()).square().sum(dim=(1, 2))
        torch.testing.assert_close(bookkeeping._squared_norms(a, b, {}), expected, rtol=1e-5, atol=0)


class Shared(nn.Module):
    """Two layers that see the same patches, and one that sees the first patch three times in that memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.same, self.first = (nn.Linear(FEATURES, 40) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.stack([x, x.flip(1), x.square()], dim=1)  # (P, 3, f)
        first = patches[:, :1].expand_as(patches)
        out = self.one(patches).tanh() + self.same(patches).tanh() + self.first(first).tanh()
        return out.sum(dim=1)[:, :2]


def test_layers_that_share_an_input_share_what_is_known_of_it_and_others_do_not() -> None:
    oracle = sum_of_clipped_gradients(Shared(), row_losses, rows(), 0.5, "microbatch")
    got = sum_of_clipped_gradients(Shared(), row_losses, rows(), 0.5)
    torch.testing.assert_close(got.norms, oracle.norms, rtol=1e-5, atol=0)


def test_a_norm_is_right_where_its_terms_cancel() -> None:
    # 40 patches that pull one way and 40 that pull almost exactly back: what is left is a millionth.
    generator = torch.Generator().manual_seed(1)
    a = torch.randn((1, 40, 300), generator=generator)
    b = torch.randn((1, 40, 300), generator=generator)
    a, b = torch.cat([a, a * (1 + 1e-6)], dim=1), torch.cat([b, -b], dim=1)
    expected = (b.double().mT @ a.double()).square().sum()
    squared = bookkeeping._squared_norms(a, b, {})
    naive = ((a @ a.mT) * (b @ b.mT)).sum(dim=(1, 2))
    assert abs(float(squared / expected) - 1) < 0.3 < abs(float(naive / expected) - 1)


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
def test_a_parameter_used_outside_its_layer_is_refused(engine: str) -> None:
    with pytest.raises(JobError, match="outside its layer") as caught:
        sum_of_clipped_gradients(Outside(), row_losses, rows(), 0.5, engine)
    assert caught.value.reason == "MODEL_NOT_PRIVATE"


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_one_for_each_record(engine: str) -> None:
    model = nn.Linear(FEATURES, 2)
    for bad in (
        lambda model, batch: row_losses(model, batch).mean(),
        lambda model, batch: torch.zeros(5),
        lambda model, batch: row_losses(model, batch)[:, None],
    ):
        with pytest.raises(JobError, match="one for each record") as caught:
            sum_of_clipped_gradients(model, bad, rows(), 0.5, engine)
        assert caught.value.reason == "MODEL_NOT_PRIVATE"


def test_the_first_axis_is_the_records() -> None:
    def turned(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0].reshape(2, -1, FEATURES)).sum(dim=-1).flatten()

    with pytest.raises(JobError, match="first axis must be theirs"):
        sum_of_clipped_gradients(nn.Linear(FEATURES, 2), turned, rows(n=6), 0.5)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_out_of_range_is_refused(clip_norm: float) -> None:
    with pytest.raises(JobError, match="clip_norm") as caught:
        sum_of_clipped_gradients(nn.Linear(FEATURES, 2), row_losses, rows(), clip_norm)
    assert caught.value.reason == "PRIVACY_INVALID"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_zero_is_zero(engine: str) -> None:
    model = nn.Linear(FEATURES, 2, bias=False)
    x, y = rows()
    got = sum_of_clipped_gradients(model, row_losses, (torch.zeros_like(x), y), 0.5, engine)
    assert length(got.tensors) == 0.0 and got.norms.tolist() == [0.0] * 5
