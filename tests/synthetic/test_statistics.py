"""The statistics of the random encoder, and that those in its file are those of generated patches."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from histoflare.bags.densenet import densenet121, is_statistic
from histoflare.bags.encoder import STATISTICS, load_encoder
from histoflare.bags.preprocessing import IMAGENET
from histoflare.synthetic.slides import reference_patches
from histoflare.synthetic.statistics import (
    REFERENCE_FEATURE_PATCHES,
    REFERENCE_PATCH_PX,
    make_statistics,
    set_statistics,
)


def test_random_encoder_has_unit_statistics_on_its_reference_patches() -> None:
    """With statistics of the batch itself, what enters each norm's scale has mean 0 and variance 1."""
    network = densenet121()
    values = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    patches = torch.from_numpy(values)
    images = IMAGENET.apply(patches)
    set_statistics(network, images)
    seen: list[torch.Tensor] = []
    norm = network.layers.denseblock2.denselayer3.layers.norm1
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        network(images)
    torch.testing.assert_close(seen[0].mean(dim=(0, 2, 3)), torch.zeros(norm.num_features), atol=2e-2, rtol=0)
    torch.testing.assert_close(seen[0].var(dim=(0, 2, 3)), torch.ones(norm.num_features), atol=2e-2, rtol=0)


@pytest.mark.slow
def test_random_features_are_standardised_on_the_reference_patches() -> None:
    """Their mean over those patches is 0 and their deviation 1, but for constant ones."""
    count, size_px = REFERENCE_FEATURE_PATCHES, REFERENCE_PATCH_PX
    patches = torch.from_numpy(reference_patches(count, size_px)).permute(0, 3, 1, 2)
    features = load_encoder("densenet121-random", device="cpu").encode(patches)  # (count, 1024)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(1024), atol=1e-2, rtol=0)
    torch.testing.assert_close(features.std(dim=0).median(), torch.tensor(1.0), atol=1e-2, rtol=0)


@pytest.mark.slow
def test_the_file_holds_the_statistics_of_generated_patches() -> None:
    stored, made = safetensors.torch.load_file(STATISTICS), make_statistics()
    assert set(stored) == set(made) == {name for name in densenet121().state_dict() if is_statistic(name)}
    for name, tensor in made.items():  # other processors round otherwise
        torch.testing.assert_close(stored[name], tensor, rtol=1e-2, atol=1e-3 * float(tensor.abs().max()))
