from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.layers import DropPath
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextDropPath

from histoflare.masks.networks import build_network
from histoflare.masks.networks.dhunet import DHUnet
from tests.refusals import raises_reason

# Width 96 and 4 classes, of the authors' code.
PUBLISHED = {
    "convnext": 20_607_072,
    "swin": 20_411_850,
    "fusion": 14_365_056,
    "head": 384,
    "supervision": 27_664,
}


def small() -> DHUnet:
    network = build_network("dhunet", 3, width=24, seed=1)
    assert isinstance(network, DHUnet)
    return network


def images(batch: int = 2) -> Tensor:
    return torch.randn((batch, 3, 64, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def full() -> DHUnet:
    return DHUnet(4)


def test_each_part_has_the_published_number_of_parameters(full: DHUnet) -> None:
    found = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in full.named_children()
    }
    assert found == PUBLISHED
    assert sum(found.values()) == 55_412_026


def test_the_state_holds_the_parameters_and_the_batch_norms_alone(full: DHUnet) -> None:
    rest = full.state_dict().keys() - dict(full.named_parameters()).keys()
    assert {name.rsplit(".", 1)[1] for name in rest} == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(name.startswith("fusion.") for name in rest)
    # 4 after convolutions, 4 in front of expansions, three tensors each
    assert len(rest) == 24


def test_stochastic_depth_rises_linearly(full: DHUnet) -> None:
    swin = [module.drop_prob for module in full.swin.modules() if isinstance(module, DropPath)]
    convnext = [
        module.drop_prob for module in full.convnext.modules() if isinstance(module, ConvNextDropPath)
    ]
    # The first block of each has none.
    np.testing.assert_allclose(swin, 0.2 * np.arange(1, 8) / 7, rtol=1e-6)
    np.testing.assert_allclose(convnext, 0.1 * np.arange(1, 12) / 11, rtol=1e-6)


def test_layer_scale_begins_at_a_millionth() -> None:
    scales = [value for key, value in small().named_parameters() if "layer_scale" in key]
    assert len(scales) == 12
    assert all(torch.equal(scale, torch.full_like(scale, 1e-6)) for scale in scales)


def test_both_encoders_see_the_image_and_the_head_has_no_bias() -> None:
    network = small().eval()
    with torch.no_grad():
        expected = network(images())
        for part in (network.swin, network.convnext):
            changed = [tensor.clone() for tensor in part.parameters()]
            for parameter in part.parameters():
                parameter.mul_(0.5)
            assert not torch.allclose(network(images()), expected)
            for parameter, old in zip(part.parameters(), changed, strict=True):
                parameter.copy_(old)
        network.head.weight.zero_()
        assert torch.equal(network(images()), torch.zeros_like(expected))


def blocks_are_constant(logits: Tensor, side: int) -> bool:
    b, k, h, w = logits.shape
    tiles = logits.view(b, k, h // side, side, w // side, side)
    return bool((tiles == tiles[:, :, :, :1, :, :1]).all())


def test_auxiliary_heads_are_enlarged_by_the_nearest_pixel() -> None:
    main, fine, coarse = small()(images())
    assert blocks_are_constant(fine, 4) and not blocks_are_constant(fine, 8)
    assert blocks_are_constant(coarse, 16) and not blocks_are_constant(coarse, 32)
    assert not blocks_are_constant(main, 2)


def test_outputs_are_heads_on_the_maps_that_the_weights_are_for() -> None:
    network = small()
    assert network.loss_weights == (0.5, 0.3, 0.2)
    heads = [head for head in network.supervision if isinstance(head, nn.Conv2d)]
    assert [head.in_channels for head in heads] == [96, 48, 24, 24]  # 384, 192, 96 and 96 at full width
    main, fine, coarse = network(images())
    (main.square().mean() + fine.square().mean()).backward(retain_graph=True)
    assert heads[2].weight.grad is not None and heads[0].weight.grad is None
    coarse.square().mean().backward()
    assert heads[0].weight.grad is not None
    without = {key for key, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {f"supervision.{index}.{kind}" for index in (1, 3) for kind in ("weight", "bias")}


def test_a_side_that_is_no_multiple_of_32_px_is_an_error() -> None:
    with raises_reason("JOB_INVALID", "32", "100 x 64"):
        small()(torch.zeros(1, 3, 64, 100))
