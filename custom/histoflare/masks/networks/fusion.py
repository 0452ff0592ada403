"""DHUnet's decoder: global and local features added, fused from coarse to fine, expanded across scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from histoflare.masks.networks.norm import Norm, make_norm


class CrossScaleExpand(nn.Module):
    """Enlarge a map by transposed convolutions of several kernels side by side, after a norm.

    Every kernel k has the stride s of the enlargement and padding (k - s) / 2, so that all give the same
    size; their channels are concatenated in the order given.

    Args:
        channels: Of the input.
        stride: The enlargement s.
        branches: (kernel, channels out) of each, kernel - stride even and not negative.
        norm: Kind of the norm in front.
    """

    def __init__(self, channels: int, stride: int, branches: Sequence[tuple[int, int]], norm: Norm) -> None:
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.branches = nn.ModuleList(
            nn.ConvTranspose2d(channels, out, kernel, stride=stride, padding=(kernel - stride) // 2)
            for kernel, out in branches
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, all channels out, s h, s w) for ``x`` (b, channels, h, w)."""
        x = self.norm(x)
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def expand_twice(channels: int, norm: Norm) -> CrossScaleExpand:
    """Return the x2 expansion: kernels 2 and 4 with channels / 4 each, so half the channels come out."""
    quarter = channels // 4
    return CrossScaleExpand(channels, 2, [(2, quarter), (4, quarter)], norm)


def expand_four_times(channels: int, norm: Norm) -> CrossScaleExpand:
    """Return the last x4 expansion: kernels 4, 8, 16, 32 with 1/2, 1/4, 1/8, 1/8 of the channels."""
    parts = [(4, channels // 2), (8, channels // 4), (16, channels // 8), (32, channels // 8)]
    return CrossScaleExpand(channels, 4, parts, norm)


class FusionStage(nn.Module):
    """Conv3x3 (no bias), norm, ReLU, cross-scale expansion.

    Args:
        channels_in: Of the sum of both encoders' maps, concatenated with what came before.
        channels: Out of the convolution.
        expand: The expansion of ``channels``.
        norm: Kind of the norm after the convolution.
    """

    def __init__(self, channels_in: int, channels: int, expand: CrossScaleExpand, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel_size=3, padding=1, bias=False)
        self.norm = make_norm(norm, channels)
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        """Return the expanded map for ``x`` (b, channels_in, h, w)."""
        out: Tensor = self.expand(torch.relu(self.norm(self.conv(x))))
        return out


class GLFusion(nn.Module):
    """Fuse the four maps of two encoders from the coarsest to the finest.

    Stage i = 4, 3, 2, 1: cat(local_i + global_i, what stage i + 1 gave) goes through a
    :class:`FusionStage`; stage 4 has nothing before it. Width 96: 768 -> 768, 768 -> 384, 384 -> 192 and
    192 -> 96 channels in the convolutions, then x2, x2, x2 (half the channels) and x4 (as many).

    Args:
        width: Channels of the finest map; those of stage i are 2^(i-1) times as many.
        norm: Kind of all norms.
    """

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        coarse = [8 * width, 4 * width, 2 * width]
        stages = [
            FusionStage(
                8 * width if index == 0 else 2 * channels, channels, expand_twice(channels, norm), norm
            )
            for index, channels in enumerate(coarse)
        ]
        self.stages = nn.ModuleList(
            [*stages, FusionStage(2 * width, width, expand_four_times(width, norm), norm)]
        )

    def forward(self, local_maps: Sequence[Tensor], global_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return what each stage gives, coarsest first.

        Args:
            local_maps: The convolutional encoder's four maps, finest first, (b, 2^i width, h/2^(i+2), …).
            global_maps: The transformer's, of the same shapes.

        Returns:
            (b, 4 width, h/16, …), (b, 2 width, h/8, …), (b, width, h/4, …) and (b, width, h, …).
        """
        outputs: list[Tensor] = []
        for stage, local, context in zip(
            self.stages, reversed(local_maps), reversed(global_maps), strict=True
        ):
            # Channels last, as one encoder's are, would slow the widest kernel's gradient at small widths.
            x = (local + context).contiguous()  # (b, c, h, w)
            if outputs:
                x = torch.cat([x, outputs[-1]], dim=1)  # (b, 2c, h, w)
            outputs.append(stage(x))
        return outputs
