from __future__ import annotations

import pytest
import torch
from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

from histoflare.masks.networks import build_network
from histoflare.masks.networks.norm import SingleValueBatchNorm


def test_weights_of_transformers_own_network_give_its_logits() -> None:
    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=[24, 48, 96, 192],
        depths=[3, 3, 9, 3],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    theirs = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, num_labels=3, hidden_size=96, use_auxiliary_head=False)
    ).eval()
    ours = build_network("convnext-upernet", 3, width=24, seed=0).eval()
    ours.load_state_dict({f"net.{key}": value for key, value in theirs.state_dict().items()})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images).logits)


def test_batch_norm_of_a_single_value_goes_by_the_running_statistics() -> None:
    layer = SingleValueBatchNorm(2)
    layer.running_mean.copy_(torch.tensor([1.0, -1.0]))  # type: ignore[union-attr]
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))  # type: ignore[union-attr]
    out = layer.train()(torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([2.0, 2.0]), rtol=1e-4, atol=0.0)
    assert layer.running_mean is not None and layer.running_mean.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (4, 3, 5, 5)])
def test_batch_norm_of_more_values_is_the_ordinary_one(shape: tuple[int, ...]) -> None:
    ours, theirs = SingleValueBatchNorm(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
