"""The normalisation of a decoder: BatchNorm, or GroupNorm, which keeps no statistics of anyone's images."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group"]
NORMS: tuple[str, ...] = get_args(Norm)
MAX_GROUPS = 32


class SingleValueBatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes a batch with one value per channel, as a 1 x 1 map of a single image is.

    Such a batch has no variance; it is normalised by the running statistics and leaves them as they are.
    Every other batch is treated as by ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the base class
        """Return ``input`` (b, c, h, w) normalised."""
        if self.training and input.numel() == input.shape[1]:
            return torch.nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return a layer that normalises (b, channels, h, w); both kinds have the same two parameters."""
    if norm == "batch":
        return SingleValueBatchNorm(channels)
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def replace_batch_norms(network: nn.Module, norm: Norm) -> None:
    """Put a layer of :func:`make_norm` in the place of every BatchNorm2d below ``network``."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make_norm(norm, child.num_features))
