from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.bags.models.mem import MEM, MemoryBlock, MemSettings, memory_attention

from ..mem import make_mem

F_IN, CLASSES = 6, 3


def small_mem(seed: int = 0, **arguments: Any) -> MEM:
    options = {"features": F_IN, "memories": 4, "dim": 5, "hidden": 7, "seed": seed, **arguments}
    return make_mem(CLASSES, **options)


def random_bag(seed: int, n: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn((n, F_IN), generator=torch.Generator().manual_seed(seed))


def numbers(layer: nn.Linear) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().double().numpy()
    return layer.weight.detach().double().numpy(), bias


def oracle_block(
    block: MemoryBlock, bag: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[list[float]]]:
    """Adnan eqs. 3 and 4 for one bag without padding, one number at a time; x̂ (m, h) and p (m, n)."""
    memory, _ = numbers(block.memory)
    (w1, b1), (w2, b2) = numbers(block.encoder[0]), numbers(block.encoder[2])  # type: ignore[arg-type]
    code = [w2 @ np.maximum(w1 @ x + b1, 0.0) + b2 for x in bag]
    outputs, attentions = [], []
    for unit in range(block.memories):
        a = memory[unit * block.dim : (unit + 1) * block.dim]
        u = [np.tanh(a @ x) for x in bag]
        p = [0.0] * len(bag)
        for row in u:
            exponentials = [np.exp(row @ column) for column in u]
            for j, value in enumerate(exponentials):
                p[j] += value / sum(exponentials) / len(bag)
        attentions.append(p)
        outputs.append(sum(weight * c for weight, c in zip(p, code, strict=True)))
    return np.array(outputs), attentions


def padded(bags: list[Tensor], longest: int, filling: float) -> tuple[Tensor, Tensor]:
    x = torch.full((len(bags), longest, F_IN), filling)
    mask = torch.zeros((len(bags), longest), dtype=torch.bool)
    for index, bag in enumerate(bags):
        x[index, : len(bag)] = bag
        mask[index, : len(bag)] = True
    return x, mask


@pytest.mark.parametrize("blocks", [1, 2])
def test_it_is_the_equations(blocks: int) -> None:
    model = small_mem(blocks=blocks)
    bags = [random_bag(seed, n) for seed, n in enumerate((1, 4, 9))]
    out = model.attend(*padded(bags, 9, 0.0))
    for index, bag in enumerate(bags):
        x, first = bag.double().numpy(), None
        for block in model.blocks:
            x, attention = oracle_block(block, x)  # type: ignore[arg-type]
            first = first or attention
        weight, bias = numbers(model.head)
        logits = weight @ x.flatten() + bias
        np.testing.assert_allclose(out.outputs[index].detach().numpy(), logits, rtol=1e-4, atol=1e-5)
        got = out.attention[index, :, : len(bag)].detach().numpy()
        np.testing.assert_allclose(got, np.array(first), rtol=1e-4, atol=1e-6)


def test_the_rows_are_averaged_and_not_the_columns() -> None:
    """Averaging along the axis that was normalised gives 1/n everywhere: a bug that raises nothing."""
    units = torch.tanh(random_bag(3, 8))[None, None]  # (1, 1, n, d)
    p = memory_attention(units, torch.ones((1, 8), dtype=torch.bool))[0, 0]
    share = (units[0, 0] @ units[0, 0].T).softmax(dim=-1)
    torch.testing.assert_close(share.mean(dim=1), torch.full((8,), 1 / 8))  # the bug
    torch.testing.assert_close(p, share.mean(dim=0))
    assert float((p - 1 / 8).abs().max()) > 0.02
    # A vector that agrees with all others draws the attention.
    lone = torch.tensor([[3.0, 0.0], [1.0, 0.2], [1.0, -0.2], [0.0, 0.1]])[None, None]
    assert int(memory_attention(lone, torch.ones((1, 4), dtype=torch.bool)).argmax()) == 0


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 10_000), blocks=st.integers(1, 2), shuffle=st.randoms())
def test_the_order_of_patches_does_not_matter(n: int, seed: int, blocks: int, shuffle: object) -> None:
    model, bag = small_mem(blocks=blocks), random_bag(seed, n)
    order = list(range(n))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    before, after = model.attend(bag[None]), model.attend(bag[order][None])
    torch.testing.assert_close(after.outputs, before.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.attention[0], before.attention[0][:, order], rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    more=st.integers(0, 6),
    filling=st.sampled_from([0.0, 1e6, float("nan"), float("inf")]),
    norm=st.sampled_from(["none", "rms"]),
)
def test_padding_changes_nothing(sizes: list[int], more: int, filling: float, norm: str) -> None:
    model = small_mem(blocks=2, reconstruction=1.0, input_norm=norm)
    bags = [random_bag(index, n) for index, n in enumerate(sizes)]
    together = model.attend(*padded(bags, max(sizes) + more, filling))
    for index, bag in enumerate(bags):
        alone = model.attend(bag[None])
        torch.testing.assert_close(together.outputs[index], alone.outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.auxiliary[index], alone.auxiliary[0], rtol=1e-4, atol=1e-5)
        attention = together.attention[index]
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(4))
        assert bool((attention[:, len(bag) :] == 0).all())


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("n", [0, 5])
def test_a_bag_without_a_patch_is_finite_and_harms_no_other(n: int, norm: str) -> None:
    bag = random_bag(0, 5)
    with_empty, without = (
        small_mem(reconstruction=1.0, input_norm=norm),
        small_mem(reconstruction=1.0, input_norm=norm),
    )
    x, mask = padded([bag, bag[:0]] if n else [bag[:0]], n, float("nan"))
    out = with_empty.attend(x, mask)
    assert bool(out.outputs.isfinite().all()) and bool((out.attention[-1] == 0).all())
    (out.outputs.sum() + out.auxiliary.sum()).backward()
    alone = without.attend(bag[None])
    (alone.outputs.sum() + alone.auxiliary.sum()).backward()
    for (name, one), two in zip(with_empty.named_parameters(), without.parameters(), strict=True):
        assert one.grad is not None and bool(one.grad.isfinite().all()), name
        if n and name != "head.bias":
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_scores", [1, 200, 4 * 3 * 30 * 7])
def test_chunks_of_rows_change_nothing(max_scores: int) -> None:
    x, mask = padded([random_bag(index, n) for index, n in enumerate((30, 7, 1))], 30, 0.0)
    whole, chunked = small_mem(blocks=2), small_mem(blocks=2)
    chunked.max_scores = max_scores
    with torch.no_grad():
        expected, got = whole.attend(x, mask), chunked.attend(x, mask)
    torch.testing.assert_close(got.outputs, expected.outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.attention, expected.attention, rtol=1e-5, atol=1e-7)


def test_long_bags_need_no_square_of_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    softmax = torch.Tensor.softmax

    def recorded(self: Tensor, dim: int) -> Tensor:
        sizes.append(self.numel())
        return softmax(self, dim=dim)

    monkeypatch.setattr(torch.Tensor, "softmax", recorded)
    with torch.no_grad():
        memory_attention(
            torch.randn(1, 2, 3000, 4), torch.ones((1, 3000), dtype=torch.bool), max_scores=10**6
        )
    assert max(sizes) <= 10**6 and sum(sizes) == 2 * 3000 * 3000


def test_a_head_may_have_no_bias() -> None:
    with_bias, without = small_mem(), small_mem(bias=False)
    assert set(with_bias.state_dict()) - set(without.state_dict()) == {"head.bias"}
    bag = random_bag(1, 5)[None]
    torch.testing.assert_close(without(bag), with_bias(bag) - with_bias.state_dict()["head.bias"])
    assert MemSettings(bias=0).problems(F_IN) == ["bias: true or false, not 0"]  # type: ignore[arg-type]


def test_blocks_stack() -> None:
    model = small_mem(blocks=3)
    assert [block.memory.in_features for block in model.blocks] == [F_IN, 7, 7]  # type: ignore[union-attr]
    out = model.attend(random_bag(0, 11)[None])
    assert out.outputs.shape == (1, CLASSES)
    assert out.attention.shape == (1, 4, 11)  # of the first block: over patches


def test_defaults_are_those_of_the_design_and_all_parameters_are_linear() -> None:
    model = make_mem(2)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "blocks.0.memory.weight": (10 * 128, 1024),
        "blocks.0.encoder.0.weight": (256, 1024),
        "blocks.0.encoder.0.bias": (256,),
        "blocks.0.encoder.2.weight": (256, 256),
        "blocks.0.encoder.2.bias": (256,),
        "head.weight": (2, 2560),
        "head.bias": (2,),
    }
    inside = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    assert inside == {id(p) for p in model.parameters()}
    assert not list(model.buffers())


def test_the_seed_makes_the_bytes_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = small_mem(1), small_mem(1), small_mem(2)
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_leading_axes_are_a_batch_of_bags(blocks: int, norm: str) -> None:
    model = small_mem(blocks=blocks, reconstruction=1.0, input_norm=norm)
    x, mask = padded([random_bag(index, n) for index, n in enumerate((5, 1, 7, 0, 3, 2))], 7, float("nan"))
    flat = model.attend(x, mask)
    for lead in ((2, 3), (3, 2), (1, 6), (2, 1, 3)):
        got = model.attend(x.view(*lead, 7, F_IN), mask.view(*lead, 7))
        for name, shape in (("outputs", (CLASSES,)), ("attention", (4, 7)), ("auxiliary", ())):
            one, other = getattr(got, name), getattr(flat, name)
            assert one.shape == (*lead, *shape)
            torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-5, atol=1e-6)
    whole = model.attend(x[:2, :1].nan_to_num().view(1, 2, 1, F_IN))  # without a mask, all are patches
    torch.testing.assert_close(whole.outputs[0], model(x[:2, :1].nan_to_num()), rtol=1e-5, atol=1e-6)


def test_every_layer_sees_a_patient_as_one_sample() -> None:
    model = small_mem(blocks=2, reconstruction=1.0)
    seen: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, x, y: seen.append((x[0].ndim, len(x[0]))) and None)
    model.attend(torch.zeros(3, 2, 5, F_IN), torch.ones((3, 2, 5), dtype=torch.bool))
    assert seen == [(3, 3)] * 11  # what samplers of per-record gradients take


def test_chunks_without_gradients_hold_for_leading_axes() -> None:
    x, mask = padded([random_bag(index, n) for index, n in enumerate((30, 7, 1, 12))], 30, 0.0)
    x, mask = x.view(2, 2, 30, F_IN), mask.view(2, 2, 30)
    expected = small_mem().attend(x, mask)
    chunked = small_mem()
    chunked.max_scores = 200
    with torch.no_grad():
        got = chunked.attend(x, mask)
    torch.testing.assert_close(got.outputs, expected.outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.attention, expected.attention, rtol=1e-5, atol=1e-7)


def test_rms_norm_takes_a_patchs_length_out() -> None:
    model, bag = small_mem(input_norm="rms"), random_bag(0, 6)
    stretched = bag * torch.tensor([0.1, 1.0, 10.0, 3.0, 50.0, 7.0])[:, None]
    torch.testing.assert_close(model(stretched[None]), model(bag[None]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(small_mem()(stretched[None]), small_mem()(bag[None]), atol=1e-2)


def test_the_decoder_learns_to_reconstruct() -> None:
    model, bag = small_mem(reconstruction=1.0), random_bag(0, 20)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        error = model.attend(bag).auxiliary.mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]
    assert small_mem().attend(bag).auxiliary is None
