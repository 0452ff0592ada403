"""Segmentation networks by name.

All take float32 images (b, 3, h, w), normalised by ImageNet's mean and std, h and w multiples of 32. In
evaluation mode they return logits (b, k, h, w), in training a list ``[main, *auxiliary]`` of such logits,
whose weights in the loss are ``network.loss_weights``.

A further baseline is a module of its own here, and a function that builds it and a line in ``NETWORKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import nn

from histoflare.errors import JobError
from histoflare.extras import describe_missing
from histoflare.masks.networks.norm import NORMS, Norm
from histoflare.masks.networks.sizes import WIDTH_MULTIPLE


@dataclass(frozen=True)
class NetworkKind:
    """A network there is.

    Attributes:
        build: Makes it from (classes, width, norm, drop_path); draws from PyTorch's global generator.
        description: One line; sizes are those at width 96 and 4 classes.
        sample_mixing: Whether, with GroupNorm, the logits of an image depend on others of its batch. DP-SGD
            takes a network only if it declares that they do not.
        parts: ``"decoder"`` and ``"head"`` → paths of the modules that are trained when a task says that it
            trains that part; those that have a gradient.
    """

    build: Callable[[int, int, Norm, bool], nn.Module]
    description: str
    sample_mixing: bool = True
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Each imports its own network: a FLARE server, which has neither MONAI nor transformers, reads the names.
def _build_dhunet(classes: int, width: int, norm: Norm, drop_path: bool) -> nn.Module:
    from histoflare.masks.networks.dhunet import DHUnet

    return DHUnet(classes, width=width, norm=norm, drop_path=drop_path)


def _build_unet(classes: int, width: int, norm: Norm, _: bool) -> nn.Module:
    from histoflare.masks.networks.unet import UNet

    return UNet(classes, width=width, norm=norm)


def _build_convnext(classes: int, width: int, norm: Norm, drop_path: bool) -> nn.Module:
    from histoflare.masks.networks.upernet import ConvNeXtUPerNet

    return ConvNeXtUPerNet(classes, width=width, norm=norm, drop_path=drop_path)


# A network whose size is not that of the published one has its own size in its name.
NETWORKS: dict[str, NetworkKind] = {
    "dhunet": NetworkKind(
        _build_dhunet,
        "DHUnet: Swin and ConvNeXt encoders, one decoder; 55,412,026 parameters, as published",
        sample_mixing=False,
        parts={"decoder": ("fusion", "head", "supervision.0", "supervision.2"), "head": ("head",)},
    ),
    "unet-monai-31m": NetworkKind(
        _build_unet,
        "U-Net: MONAI's BasicUNet; 31.1 million parameters, not the 39.40 million of the published baseline",
        sample_mixing=False,
        parts={
            "decoder": ("net.upcat_4", "net.upcat_3", "net.upcat_2", "net.upcat_1", "net.final_conv"),
            "head": ("net.final_conv",),
        },
    ),
    "convnext-upernet": NetworkKind(
        _build_convnext,
        "ConvNeXt-T and UPerNet of transformers; 46.5 million parameters, as published",
        sample_mixing=False,
        parts={"decoder": ("net.decode_head",), "head": ("net.decode_head.classifier",)},
    ),
}
"""Name → how the network is made, and what it is.

>>> from histoflare import NETWORKS
>>> print(NETWORKS["convnext-upernet"].description)
ConvNeXt-T and UPerNet of transformers; 46.5 million parameters, as published
"""


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
        JobError: There is no such network, norm or width, or there are fewer than 2 classes; or a library
            that the network is made of is not installed (LIBRARY_MISSING).
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
        try:
            return NETWORKS[name].build(classes, width, chosen, drop_path)
        except ModuleNotFoundError as error:
            missing = describe_missing(error)
            if missing is None:
                raise
            raise JobError(f"network {name}: {missing}.", reason="LIBRARY_MISSING") from error


TRAINED = ("all", "decoder", "head", "norm")
"""Which parameters of a network a task trains: all, those of its decoder, of its last layer, of its norms."""


@lru_cache
def trained_modules(name: str, train: str) -> tuple[str, ...] | None:
    """Return the paths of the modules of the network ``name`` that are trained; None for all of it.

    Args:
        name: One of ``NETWORKS``.
        train: One of :data:`TRAINED`. ``"norm"`` are all layers that normalise, in encoders and decoder.

    Raises:
        JobError: The network does not say which of its modules that part is; or a library that the network is
            made of is not installed (LIBRARY_MISSING).
    """
    if train == "all":
        return None
    if train == "norm":  # the same modules at every width
        network = build_network(name, 2, width=WIDTH_MULTIPLE, norm="group", seed=0)
        return tuple(
            path
            for path, module in network.named_modules()
            if isinstance(module, nn.GroupNorm | nn.LayerNorm)
        )
    if train not in NETWORKS[name].parts:
        raise JobError(f"The network {name} does not say which of its modules are its {train}: train all.")
    return NETWORKS[name].parts[train]
