"""DenseNet121 as an encoder's network: MONAI's layers, seeded or loaded weights, and their normalisation.

Source: Huang et al. 2017 (the network), Adnan 2022 and Kalra et al. 2020 (its pooled features for a mosaic).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from histoflare.errors import EncoderError
from histoflare.seeds import derive_seed


class DenseNetFeatures(nn.Module):
    """MONAI's DenseNet121 up to its global average pooling: images (b, 3, h, w) to features (b, 1024).

    Pooled features are shifted and scaled by ``mean`` and ``deviation``: 0 and 1 with loaded weights.
    """

    features = 1024
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("deviation", torch.ones(self.features))
        from monai.networks.nets import DenseNet121

        self.layers = DenseNet121(spatial_dims=2, in_channels=3, out_channels=1).features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return relu and average over the plane of the last feature maps, as torchvision's forward does."""
        maps = self.layers(images)  # (b, 1024, h / 32, w / 32)
        pooled = torch.relu(maps).mean(dim=(2, 3))  # (b, 1024)
        return (pooled - self.mean) / self.deviation


def densenet121() -> DenseNetFeatures:
    """Return the network with seeded initial weights (He, normal, fan-in), the same on every machine.

    NumPy draws them: PyTorch's generator gives other last digits on other processors.
    """
    with torch.random.fork_rng(devices=[]):
        network = DenseNetFeatures()
    generator = np.random.default_rng(derive_seed("densenet121-random", 1))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                values = generator.standard_normal(tuple(module.weight.shape)) * (2 / fan_in) ** 0.5
                module.weight.copy_(torch.from_numpy(values))
    return network


def is_statistic(name: str) -> bool:
    """Return whether a tensor of the network is a normalisation statistic, and no weight."""
    return name in ("mean", "deviation") or name.endswith(("running_mean", "running_var"))


# torchvision says denselayer1.norm.1 (the published file) or denselayer1.norm1, MONAI
# denselayer1.layers.norm1.
DENSELAYER = re.compile(r"^(.*denselayer\d+)\.(?:layers\.)?(norm|conv)\.?([12])\.(.+)$")


def load_densenet(network: DenseNetFeatures, content: bytes, name: str) -> None:
    """Load a DenseNet121 state dict, named as torchvision or MONAI do, into ``network``: every tensor of it.

    Args:
        network: Changed in place.
        content: A file written by ``torch.save``; only tensors are unpickled.
        name: The file's name, for messages.

    Raises:
        EncoderError: It is no such file, or a tensor is missing, of another shape or not finite
            (ENCODER_WEIGHTS).
    """
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise EncoderError(
            f"{name} is no PyTorch state dict that can be read safely ({first_line(error)}); save it with "
            "torch.save(network.state_dict(), file)",
            reason="ENCODER_WEIGHTS",
        ) from error
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    tensors = _feature_tensors(stored) if isinstance(stored, Mapping) else {}
    wanted = network.layers.state_dict()
    problems = [f"{key} is too many" for key in tensors.keys() - wanted.keys()]
    for key, tensor in wanted.items():
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):  # files of older PyTorch lack this counter
                problems.append(f"{key} is missing")
        elif tensors[key].shape != tensor.shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}")
        elif not torch.isfinite(tensors[key]).all():
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        raise EncoderError(
            f"{name} does not hold the weights of DenseNet121; of {len(wanted)} tensors "
            f"{len(problems)} are wrong: " + "; ".join(sorted(problems)[:3]),
            reason="ENCODER_WEIGHTS",
        )
    network.layers.load_state_dict(wanted | tensors)


def _feature_tensors(stored: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors below ``features.`` under MONAI's names; the classifier is left out."""
    tensors = {}
    for key, value in stored.items():
        bare = str(key).removeprefix("module.")
        if bare.startswith("features.") and isinstance(value, torch.Tensor):
            tensors[DENSELAYER.sub(r"\1.layers.\2\3.\4", bare.removeprefix("features."))] = value
    return tensors


def first_line(error: BaseException) -> str:
    """Return what an error of PyTorch says, in one line."""
    lines = str(error).strip().splitlines() or [""]
    # TorchScript gives a traceback of the network's own code, with the cause in the last line.
    return lines[-1 if lines[0].startswith("The following operation failed") else 0][:200]
