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

from histoflare.bags.patients import collate_patients
from histoflare.errors import JobError
from histoflare.privacy import bookkeeping
from histoflare.privacy.gradients import HEADROOM, Losses, sum_of_clipped_gradients, sum_one_by_one
from histoflare.privacy.requirements import ENGINES
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
    with raises_reason("MODEL_NOT_PRIVATE", "0.weight"):
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
    for total, without in (
        (
            sum_one_by_one(model, task.record_losses, one_by_one(batch), clip_norm),
            sum_one_by_one(model, task.record_losses, one_by_one(only(batch, others)), clip_norm),
        ),
        (
            sum_of_clipped_gradients(model, task.record_losses, batch, clip_norm),
            sum_of_clipped_gradients(model, task.record_losses, only(batch, others), clip_norm),
        ),
    ):
        assert length(difference(total.tensors, without.tensors)) <= clip_norm


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
    with pytest.raises(JobError, match="one record at a time") as caught:
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
    with raises_reason("PRIVACY_INVALID", "clip_norm"):
        sum_of_clipped_gradients(nn.Linear(FEATURES, 2), row_losses, rows(), clip_norm)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_zero_is_zero(engine: str) -> None:
    model = nn.Linear(FEATURES, 2, bias=False)
    x, y = rows()
    got = sum_of_clipped_gradients(model, row_losses, (torch.zeros_like(x), y), 0.5, engine)
    assert length(got.tensors) == 0.0 and got.norms.tolist() == [0.0] * 5


# What a model that somebody else has chosen may do to float32.

WAYS = {
    "one by one": sum_one_by_one,
    **{
        engine: lambda model, losses, singles, clip_norm, engine=engine: sum_of_clipped_gradients(
            model, losses, joined(singles), clip_norm, engine
        )
        for engine in ENGINES
    },
}
"""(model, losses, batches of one, clip norm) → ClippedSum, in each way there is."""


def joined(singles: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*singles, strict=True))


def weighted_sums(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return Σ_to w_t · model(x)_to of x (P, T, i) and w (P, T): each patch's b is its weight."""
    x, weight = batch
    return (model(x) * weight[..., None]).sum(dim=(1, 2))


def bag(x: Tensor, *weights: float) -> tuple[Tensor, Tensor]:
    return x[None], torch.tensor([weights])


@pytest.mark.parametrize("way", ["one by one", "bookkeeping", "hooks", "microbatch"])
def test_gradients_whose_squares_are_0_in_float32_are_clipped_like_any_other(way: str) -> None:
    # a of 1e17 and b of 1e-25: ‖b aᵀ‖ is about 1e-7 and ‖b‖² is 0.
    generator = torch.Generator().manual_seed(0)
    model, clip_norm = nn.Linear(40, 40, bias=False), 1e-20
    singles = [bag(1e17 * torch.rand((2, 40), generator=generator), 1e-25, 1e-25) for _ in range(3)]
    _, norms = by_definition(model, weighted_sums, singles, clip_norm)
    got = WAYS[way](model, weighted_sums, singles, clip_norm)
    assert min(norms) > 1e-8
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-5, atol=0)
    assert 2 * clip_norm < length(got.tensors) <= 3 * clip_norm


def test_that_is_why_a_job_may_not_name_ghost() -> None:
    singles = [bag(torch.full((2, 40), 1e17), 1e-25, 1e-25)]
    got = WAYS["ghost"](nn.Linear(40, 40, bias=False), weighted_sums, singles, 1e-20)
    assert got.norms.tolist() == [0.0] and length(got.tensors) > 1e10 * 1e-20


@pytest.mark.parametrize("way", ["one by one", "bookkeeping", "microbatch"])
@pytest.mark.parametrize("where", [0, 10, 20])
def test_a_record_whose_terms_cancel_does_not_take_others_along(way: str, where: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40)
    singles = [bag(torch.rand((2, 40), generator=generator), 1.0, 1.0) for _ in range(20)]
    twice = torch.rand((1, 40), generator=generator).expand(2, -1)
    trick = bag(twice, 2.0**40, -(2.0**40))
    without = WAYS[way](model, weighted_sums, singles, 1.0)
    got = WAYS[way](model, weighted_sums, [*singles[:where], trick, *singles[where:]], 1.0)
    assert got.norms[where] == 0.0 and length(without.tensors) > 10
    assert length(difference(got.tensors, without.tensors)) <= (0.0 if way == "one by one" else 1.0)


@pytest.mark.parametrize("where", [0, 10, 20])
def test_a_record_that_is_all_rounding_is_clipped_and_refused_by_none(where: int) -> None:
    # With 1e12 the terms do not cancel to the last bit: what is left is far above the clip norm.
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40)
    singles = [bag(torch.rand((2, 40), generator=generator), 1.0, 1.0) for _ in range(20)]
    trick = bag(torch.rand((1, 40), generator=generator).expand(2, -1), 1e12, -1e12)
    without = sum_one_by_one(model, weighted_sums, singles, 1.0)
    got = sum_one_by_one(model, weighted_sums, [*singles[:where], trick, *singles[where:]], 1.0)
    assert length(difference(got.tensors, without.tensors)) <= 1.0
    with pytest.raises(JobError, match="outside its layer"):  # in a batch, an engine of Opacus takes fright
        WAYS["hooks"](model, weighted_sums, [*singles, trick], 1.0)


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
    for bad in (
        lambda model, batch: row_losses(model, batch).mean(),
        lambda model, batch: torch.zeros(1),
        lambda model, batch: row_losses(model, batch).repeat(2),
    ):
        with pytest.raises(JobError, match=r"needs one for each record|takes one at a time") as caught:
            sum_one_by_one(nn.Linear(FEATURES, 2), bad, single_rows(rows()), 1.0)
        assert caught.value.reason == "MODEL_NOT_PRIVATE"
