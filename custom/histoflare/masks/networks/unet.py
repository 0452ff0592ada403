"""A plain U-Net: MONAI's BasicUNet (Falk et al. 2019) with transposed convolutions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from histoflare.masks.networks.norm import MAX_GROUPS, Norm


class UNet(nn.Module):
    """Logits (b, classes, h, w) for images (b, 3, h, w), h and w multiples of 16; no auxiliary outputs.

    Args:
        classes: Number of classes.
        width: 96 gives 64, 128, 256, 512 and 1024 channels, another width as many times more or less.
        norm: Of every convolution.
    """

    loss_weights = (1.0,)

    def __init__(self, classes: int, *, width: int = 96, norm: Norm = "batch") -> None:
        super().__init__()
        from monai.networks.nets import BasicUNet

        first = 2 * width // 3
        groups = math.gcd(MAX_GROUPS, first)
        self.net = BasicUNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=classes,
            features=(first, 2 * first, 4 * first, 8 * first, 16 * first, first),
            norm="batch" if norm == "batch" else ("group", {"num_groups": groups}),
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return the logits (b, k, h, w); in training a list that holds them."""
        logits: Tensor = self.net(images)
        return [logits] if self.training else logits
