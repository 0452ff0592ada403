from __future__ import annotations

import torch
from transformers import ConvNextConfig, ConvNextModel

from histoflare.masks.checkpoint_names import convnext_names
from histoflare.masks.networks.convnext import ConvNeXtEncoder

WIDTH = 24


def test_features_are_those_of_transformers_without_norms() -> None:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[24, 48, 96, 192], depths=[3, 3, 3, 3])
    model = ConvNextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    encoder = ConvNeXtEncoder(WIDTH, 0.1).eval()
    tensors, unexpected = convnext_names(model.state_dict())
    assert unexpected == []
    encoder.load_state_dict(tensors)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states[-4:]
        found = encoder(images)
    assert [tuple(each.shape[1:]) for each in found] == [
        (24, 16, 24),
        (48, 8, 12),
        (96, 4, 6),
        (192, 2, 3),
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
