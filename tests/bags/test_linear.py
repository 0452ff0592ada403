"""The linear model: what it computes, and what of it is trained."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from histoflare.bags.models import build_model
from histoflare.bags.models.linear import Linear, LinearSettings


def a_bag(n: int, features: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn((n, features), generator=torch.Generator().manual_seed(n))


def test_it_is_a_linear_map_of_the_direction_of_the_mean() -> None:
    model = build_model(LinearSettings(directions=0), 5, 3, seed=1)
    assert isinstance(model, Linear)
    bag = a_bag(4, 5).double()
    unit = bag / bag.square().mean(dim=1, keepdim=True).sqrt()
    mean = unit.mean(dim=0)
    expected = model.head.double()(mean / mean.norm())
    torch.testing.assert_close(model(bag[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_only_the_head_is_trained_sent_and_stored() -> None:
    model = build_model(LinearSettings(directions=16), 200, 2, seed=1)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        "head.weight": (2, 16),
        "head.bias": (2,),
    }


def test_directions_follow_from_their_seed_alone_and_keep_angles() -> None:
    models = [
        build_model(LinearSettings(directions=512, direction_seed=d), 300, 2, seed=s)
        for s, d in ((1, 0), (2, 0), (1, 5))
    ]
    first, again, other = (model.directions for model in models)
    assert isinstance(first, torch.Tensor) and isinstance(again, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    x = a_bag(20, 300)
    before, after = (F.cosine_similarity(v[:10], v[10:]) for v in (x, x @ first))
    assert float((before - after).abs().max()) < 5 / math.sqrt(512)


def test_without_bias_the_answer_to_the_opposite_bag_is_the_opposite() -> None:
    model = build_model(LinearSettings(directions=16, bias=False), 40, 3, seed=1)
    assert list(model.state_dict()) == ["head.weight"]
    bag = a_bag(5, 40)[None]
    torch.testing.assert_close(model(-bag), -model(bag))
    assert LinearSettings(bias=1).problems(40) == ["bias: true or false, not 1"]  # type: ignore[arg-type]


@pytest.mark.parametrize(("bias", "most"), [(True, 2.0), (False, math.sqrt(2))])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("outputs", [2, 8])
def test_a_bags_gradient_is_bounded(scale: float, outputs: int, bias: bool, most: float) -> None:
    model = build_model(LinearSettings(directions=8, bias=bias), 30, outputs, seed=1)
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(100)
    for label in range(outputs):
        model.zero_grad()
        F.cross_entropy(model(a_bag(7, 30, scale)[None]), torch.tensor([label])).backward()
        squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        assert 0 < math.sqrt(squares) <= most * (1 + 1e-6)
