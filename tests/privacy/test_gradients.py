"""Sums of clipped gradients: the definition, Opacus beside it, and what one record can do to a sum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from histoflare.bags.patients import collate_patients
from histoflare.privacy.gradients import HEADROOM, Losses, sum_one_by_one
from histoflare.rounds.local import one_thread
from tests.refusals import raises_reason

from .models import (
    FEATURES,
    Outside,
    Reused,
    channel_losses,
    convolutional,
    mem_task,
    one_by_one,
    only,
    patients,
    row_losses,
    rows,
    single_rows,
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


@pytest.mark.parametrize("fields", [{}, {"blocks": 2, "reconstruction": 0.3, "input_norm": "rms"}])
def test_one_by_one_is_the_definition_in_float64(fields: dict[str, Any]) -> None:
    task = mem_task(**fields)
    model, singles = task.build_model(), one_by_one(patients(RAGGED))
    _, norms = by_definition(model, task.record_losses, singles, 1.0)
    clip_norm = sorted(norms)[1] * 1.05
    expected, _ = by_definition(model, task.record_losses, singles, clip_norm * (1 - HEADROOM))
    got = sum_one_by_one(model, task.record_losses, singles, clip_norm)
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-12, atol=0)
    assert list(got.tensors) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(got.tensors, expected, rtol=1e-12, atol=1e-15)
    assert not any(tensor.requires_grad for tensor in (*got.tensors.values(), got.norms, got.losses))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    got = sum_one_by_one(model, row_losses, single_rows(rows()), 0.5)
    expected, norms = by_definition(
        model, row_losses, [(x[None], y[None]) for x, y in zip(*rows(), strict=True)], 0.5
    )
    assert list(got.tensors) == ["2.weight"]
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-4, atol=0)
    assert length(difference(got.tensors, expected)) < HEADROOM * len(norms) * 0.5 * 1.01


def test_the_model_is_left_as_it_was() -> None:
    task = mem_task()
    model, untouched = task.build_model(), task.build_model()
    sum_one_by_one(model, task.record_losses, one_by_one(patients(RAGGED)), 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    for one, two in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, two)


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
    total = sum_one_by_one(model, task.record_losses, one_by_one(batch), clip_norm)
    without = sum_one_by_one(model, task.record_losses, one_by_one(only(batch, others)), clip_norm)
    assert length(difference(total.tensors, without.tensors)) <= clip_norm


def test_a_patient_with_many_slides_weighs_no_more() -> None:
    task = mem_task()
    model, batch = task.build_model(), patients([[7] * 30, [7]], scale=20.0)
    for p in (0, 1):
        alone = sum_one_by_one(model, task.record_losses, [only(batch, [p])], 0.01)
        assert float(alone.norms[0]) > 0.01 and 0.0099 < length(alone.tensors) <= 0.01


def test_a_record_that_is_not_finite_is_left_out_and_harms_no_other() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = rows()
    kept = [0, 2, 3, 4]
    expected = sum_one_by_one(model, row_losses, single_rows((x[kept], y[kept])), 0.5)
    x[1, 2] = math.nan
    got = sum_one_by_one(model, row_losses, single_rows((x, y)), 0.5)
    assert got.norms.isfinite().tolist() == [True, False, True, True, True]
    assert length(difference(got.tensors, expected.tensors)) == 0.0


def test_a_gradient_of_zero_is_zero() -> None:
    model = nn.Linear(FEATURES, 2, bias=False)
    x, y = rows()
    got = sum_one_by_one(model, row_losses, single_rows((torch.zeros_like(x), y)), 0.5)
    assert length(got.tensors) == 0.0 and got.norms.tolist() == [0.0] * 5


@pytest.mark.parametrize("fields", [{}, {"blocks": 2, "reconstruction": 0.3, "input_norm": "rms"}])
@pytest.mark.parametrize("sizes", [RAGGED, [[40, 30], [1]], [[3]]])
def test_the_samples_of_opacus_clipped_and_summed_are_the_same(
    fields: dict[str, Any], sizes: list[list[int]]
) -> None:
    """Opacus (Yousefpour et al. 2021) makes all records' gradients of one batch, by other code than ours."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    task = mem_task(**fields)
    model, batch = task.build_model(), patients(sizes)
    clip_norm = float(sum_one_by_one(model, task.record_losses, one_by_one(batch), 1.0).norms.median()) * 1.05
    got = sum_one_by_one(model, task.record_losses, one_by_one(batch), clip_norm)
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        task.record_losses(model, batch).sum().backward()
    samples = {name: p.grad_sample.double() for name, p in model.named_parameters()}  # (P, ...)
    hooks.cleanup()
    norms = torch.stack([s.flatten(start_dim=1).norm(dim=1) for s in samples.values()]).norm(dim=0)
    factors = (clip_norm * (1 - HEADROOM) / norms).clamp(max=1.0)
    expected = {name: torch.tensordot(factors, sample, dims=1) for name, sample in samples.items()}
    torch.testing.assert_close(got.norms, norms, rtol=1e-4, atol=1e-6)
    assert length(difference(got.tensors, expected)) < 1e-5 * length(expected)


# What a model that somebody else has chosen may do to float32.


def weighted_sums(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return Σ_to w_t · model(x)_to of x (P, T, i) and w (P, T): each patch's b is its weight."""
    x, weight = batch
    return (model(x) * weight[..., None]).sum(dim=(1, 2))


def bag(x: Tensor, *weights: float) -> tuple[Tensor, Tensor]:
    return x[None], torch.tensor([weights])


def test_gradients_whose_squares_are_0_in_float32_are_clipped_like_any_other() -> None:
    # a of 1e17 and b of 1e-25: ‖b aᵀ‖ is about 1e-7 and ‖b‖² is 0.
    generator = torch.Generator().manual_seed(0)
    model, clip_norm = nn.Linear(40, 40, bias=False), 1e-20
    singles = [bag(1e17 * torch.rand((2, 40), generator=generator), 1e-25, 1e-25) for _ in range(3)]
    _, norms = by_definition(model, weighted_sums, singles, clip_norm)
    got = sum_one_by_one(model, weighted_sums, singles, clip_norm)
    assert min(norms) > 1e-8
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-5, atol=0)
    assert 2 * clip_norm < length(got.tensors) <= 3 * clip_norm


@pytest.mark.parametrize("where", [0, 10, 20])
def test_a_record_whose_terms_cancel_does_not_take_others_along(where: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40)
    singles = [bag(torch.rand((2, 40), generator=generator), 1.0, 1.0) for _ in range(20)]
    twice = torch.rand((1, 40), generator=generator).expand(2, -1)
    trick = bag(twice, 2.0**40, -(2.0**40))
    without = sum_one_by_one(model, weighted_sums, singles, 1.0)
    got = sum_one_by_one(model, weighted_sums, [*singles[:where], trick, *singles[where:]], 1.0)
    assert got.norms[where] == 0.0 and length(without.tensors) > 10
    assert length(difference(got.tensors, without.tensors)) == 0.0


@pytest.mark.parametrize("where", [0, 10, 20])
def test_a_record_that_is_all_rounding_is_clipped(where: int) -> None:
    # With 1e12 the terms do not cancel to the last bit: what is left is far above the clip norm.
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40)
    singles = [bag(torch.rand((2, 40), generator=generator), 1.0, 1.0) for _ in range(20)]
    trick = bag(torch.rand((1, 40), generator=generator).expand(2, -1), 1e12, -1e12)
    without = sum_one_by_one(model, weighted_sums, singles, 1.0)
    got = sum_one_by_one(model, weighted_sums, [*singles[:where], trick, *singles[where:]], 1.0)
    assert length(difference(got.tensors, without.tensors)) <= 1.0


def amplifying() -> nn.Module:
    """Return a model whose head sees W·r + V·r - (W + V)·r = 0, and so its rounding alone, times 1e12."""
    generator = torch.Generator().manual_seed(1)
    model = mem_task(features=16, memories=1, dim=1, hidden=24).build_model()
    first, second = torch.randn((2, 8, 24), generator=generator)
    head = 1e12 * torch.randn(8, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.blocks[0].encoder[0].weight.normal_(generator=generator)
        model.blocks[0].encoder[2].weight.copy_(torch.cat([first, second, first + second]))
        model.head.weight[0] = torch.cat([head, head, -head])
        model.head.weight[1] = -model.head.weight[0]
    return model


@pytest.mark.parametrize("longest", [37, 38, 64, 200])
def test_a_patient_does_not_change_the_rounding_of_another(longest: int) -> None:
    generator = torch.Generator().manual_seed(2)
    model, losses = amplifying(), mem_task().record_losses
    bags = [torch.randn((n, 16), generator=generator).abs() for n in [37] * 20 + [longest]]
    singles = [collate_patients([[one]], [[0]]) for one in bags]
    without = sum_one_by_one(model, losses, singles[:-1], 1.0)
    for where in (0, 10, 20):
        got = sum_one_by_one(model, losses, singles[:where] + singles[-1:] + singles[where:-1], 1.0)
        rest = [r for r in range(21) if r != where]
        assert float(without.norms.max()) > 1e6
        assert torch.equal(got.norms[rest], without.norms) and torch.equal(got.losses[rest], without.losses)
        assert length(difference(got.tensors, without.tensors)) <= 1.0


class Counting(nn.Linear):
    """A layer that weighs a record by how many it has seen."""

    def __init__(self) -> None:
        super().__init__(FEATURES, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen: Tensor
        self.seen += 1
        return super().forward(x) * self.seen.clone()


def test_a_record_does_not_see_what_a_buffer_would_remember_of_another() -> None:
    model, singles = Counting(), single_rows(rows())
    got = sum_one_by_one(model, row_losses, singles, 1.0)
    alone = [sum_one_by_one(model, row_losses, [single], 1.0).norms for single in singles]
    assert torch.equal(got.norms, torch.cat(alone)) and model.seen == 0


def test_one_by_one_takes_any_layer_and_parameters_used_anywhere() -> None:
    for model, losses in ((convolutional(), channel_losses), (Outside(), row_losses), (Reused(), row_losses)):
        expected, _ = by_definition(model, losses, single_rows(rows()), 0.5)
        got = sum_one_by_one(model, losses, single_rows(rows()), 0.5)
        assert length(difference(got.tensors, expected)) <= HEADROOM * 5 * 0.5


def test_the_total_does_not_lose_small_records_beside_many_large_ones() -> None:
    # 1.0 and then 1000 times 1e-8: in float32 each of these would be lost.
    model = nn.Linear(1, 1, bias=False)
    singles = [torch.ones((1, 1)), *[torch.full((1, 1), 1e-8)] * 1000]
    got = sum_one_by_one(model, lambda model, x: model(x).sum(dim=1), singles, 10.0)
    assert got.tensors["weight"].dtype == torch.float64
    assert got.tensors["weight"].item() == pytest.approx(1.00001, abs=1e-10)


def test_nothing_drawn_is_a_sum_of_zeros() -> None:
    got = sum_one_by_one(nn.Linear(3, 2), row_losses, [], 1.0)
    assert {name: t.shape for name, t in got.tensors.items()} == {"weight": (2, 3), "bias": (2,)}
    assert length(got.tensors) == 0.0 and len(got.norms) == len(got.losses) == 0


def test_one_by_one_refuses_what_is_no_single_loss() -> None:
    for bad, says in (
        (lambda model, batch: row_losses(model, batch).mean(), "()"),
        (lambda model, batch: torch.zeros(1), "(1,)"),
        (lambda model, batch: row_losses(model, batch).repeat(2), " 2 records"),
    ):
        with raises_reason("MODEL_NOT_PRIVATE", says):
            sum_one_by_one(nn.Linear(FEATURES, 2), bad, single_rows(rows()), 1.0)
