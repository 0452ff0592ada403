"""Segmentation networks by name.

All take float32 images (b, 3, h, w), normalised by ImageNet's mean and std, h and w multiples of 32. In
evaluation mode they return logits (b, k, h, w), in training a list ``[main, *auxiliary]`` of such logits,
whose weights in the loss are ``network.loss_weights``.

A further baseline is a module of its own here and a line in ``NETWORKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from histoflare.errors import JobError
from histoflare.masks.networks.dhunet import SIDE_MULTIPLE_PX, DHUnet
from histoflare.masks.networks.norm import NORMS, Norm
from histoflare.masks.networks.unet import UNet
from histoflare.masks.networks.upernet import ConvNeXtUPerNet

__all__ = [
    "NETWORKS",
    "NORMS",
    "SIDE_MULTIPLE_PX",
    "WIDTH_MULTIPLE",
    "ConvNeXtUPerNet",
    "DHUnet",
    "NetworkKind",
    "Norm",
    "UNet",
    "build_network",
]

WIDTH_MULTIPLE = 24


@dataclass(frozen=True)
class NetworkKind:
    """A network there is.

    Attributes:
        build: Makes it from (classes, width, norm, drop_path); draws from PyTorch's global generator.
        description: One line; sizes are those at width 96 and 4 classes.
    """

    build: Callable[[int, int, Norm, bool], nn.Module]
    description: str


# A network whose size is not that of the published one has its own size in its name.
NETWORKS: dict[str, NetworkKind] = {
    "dhunet": NetworkKind(
        lambda classes, width, norm, drop_path: DHUnet(classes, width=width, norm=norm, drop_path=drop_path),
        "DHUnet: Swin and ConvNeXt encoders, one decoder; 55,412,026 parameters, as published",
    ),
    "unet-monai-31m": NetworkKind(
        lambda classes, width, norm, _: UNet(classes, width=width, norm=norm),
        "U-Net: MONAI's BasicUNet; 31.1 million parameters, not the 39.40 million of the published baseline",
    ),
    "convnext-upernet": NetworkKind(
        lambda classes, width, norm, drop_path: ConvNeXtUPerNet(
            classes, width=width, norm=norm, drop_path=drop_path
        ),
        "ConvNeXt-T and UPerNet of transformers; 46.5 million parameters, as published",
    ),
}


def build_network(
    name: str,
    classes: int,
    *,
    width: int = 96,
    norm: str = "batch",
    drop_path: bool = True,
    seed: int,
) -> nn.Module:
    """Return the network ``name`` with initial weights from ``seed``, in training mode.

    The same arguments give the same bytes in every process; the global random state is left alone.

    Args:
        name: One of ``NETWORKS``.
        classes: Number of classes, at least 2.
        width: Channels of the first stage, a multiple of 24: 96 is the full size, 24 is for tests and CPUs.
        norm: Of the decoder, ``"batch"`` or ``"group"``.
        drop_path: Stochastic depth in training where the network has it, or none.
        seed: Of the initial weights.

    Raises:
        JobError: There is no such network, norm or width, or there are fewer than 2 classes.
    """
    if name not in NETWORKS:
        raise JobError(f"no network '{name}'; there are {', '.join(NETWORKS)}")
    if norm not in NORMS:
        raise JobError(f"no norm '{norm}' for a network; there are {', '.join(NORMS)}")
    if width < WIDTH_MULTIPLE or width % WIDTH_MULTIPLE:
        raise JobError(f"a network's width is a multiple of {WIDTH_MULTIPLE} (96 is full size), not {width}")
    if classes < 2:
        raise JobError(f"a segmentation needs at least 2 classes, background included, not {classes}")
    chosen: Norm = "batch" if norm == "batch" else "group"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETWORKS[name].build(classes, width, chosen, drop_path)
