"""Normalisation statistics of ``densenet121-random``, from generated patches: no patient has a part in them.

They are stored beside the encoder (``bags.encoder.STATISTICS``), which so needs no generated slide. To make
them anew: ``python -m histoflare.synthetic.statistics``, and write the SHA-256 that it prints into
``bags.encoder``.
"""

from __future__ import annotations

import hashlib

import safetensors.torch
import torch
from torch import nn

from histoflare.bags.densenet import DenseNetFeatures, densenet121, is_statistic
from histoflare.bags.encoder import STATISTICS
from histoflare.bags.preprocessing import IMAGENET
from histoflare.storage import write_bytes
from histoflare.synthetic.slides import reference_patches

REFERENCE_PATCHES = 32
"""Patches for the BatchNorm statistics, and, those included, for the features' own."""
REFERENCE_FEATURE_PATCHES = 96
REFERENCE_PATCH_PX = 224


def make_statistics() -> dict[str, torch.Tensor]:
    """Return the statistics of every normalisation of the network, by their names in it."""
    patches = torch.from_numpy(reference_patches(REFERENCE_FEATURE_PATCHES, REFERENCE_PATCH_PX))
    images = IMAGENET.apply(patches.permute(0, 3, 1, 2))  # (b, h, w, 3) to (b, 3, h, w)
    network = densenet121()
    set_statistics(network, images[:REFERENCE_PATCHES])
    standardise_features(network, images)
    return {name: tensor for name, tensor in network.state_dict().items() if is_statistic(name)}


def set_statistics(network: nn.Module, images: torch.Tensor) -> None:
    """Set every BatchNorm layer's running statistics to those on ``images`` (b, 3, h, w), normalised."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the running values become the mean over what is seen, here one batch
    network.train()
    with torch.no_grad():
        network(images)
    network.eval()


def standardise_features(network: DenseNetFeatures, images: torch.Tensor, batch_size: int = 8) -> None:
    """Make each feature's mean 0 and standard deviation 1 over ``images`` (b, 3, h, w), normalised.

    Random features all but agree on every patch; what tells patches apart is small beside what they share.
    """
    with torch.no_grad():
        features = torch.cat([network(part) for part in torch.split(images, batch_size)])  # (b, 1024)
    deviation = features.std(dim=0)
    network.mean.copy_(features.mean(dim=0))
    network.deviation.copy_(
        deviation.clamp(min=float(deviation.max()) * 1e-3)
    )  # a constant feature stays one


if __name__ == "__main__":
    made = safetensors.torch.save(make_statistics())
    write_bytes(STATISTICS, made, public=True)
    print(hashlib.sha256(made).hexdigest())
