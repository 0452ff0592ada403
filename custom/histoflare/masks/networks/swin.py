"""Swin-T's first eight blocks as an encoder: MONAI's layers, features taken before each merge.

Source: Liu et al. 2021 (Swin Transformer). The blocks, the windows and the merges are those of MONAI's
``SwinTransformer(downsample="mergingv2")``, which has the quadrants of a merge in the order of the original.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

WINDOW = 7
DEPTHS = (2, 2, 2, 2)
HEADS = (3, 6, 12, 24)


def position_index(window: tuple[int, int]) -> Tensor:
    """Return (n, n), the row of the table of position biases for each pair of a window's n = h * w places.

    Places are counted row by row; the table is that of a window of ``WINDOW`` x ``WINDOW``, with the row
    (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1 for a place dy rows below and dx columns right of
    another.
    """
    y = torch.arange(window[0]).repeat_interleave(window[1])  # (n,)
    x = torch.arange(window[1]).repeat(window[0])  # (n,)
    dy = y[:, None] - y[None, :] + WINDOW - 1  # (n, n), >= 0
    dx = x[:, None] - x[None, :] + WINDOW - 1  # (n, n), >= 0
    return dy * (2 * WINDOW - 1) + dx


class SwinEncoder(nn.Module):
    """Images (b, 3, h, w) to four feature maps of width, 2, 4 and 8 width channels at h/4, h/8, h/16, h/32.

    Patch 4, window 7, depths 2 in every stage, heads 3, 6, 12, 24, MLP ratio 4, a LayerNorm after the patch
    embedding, no absolute positions. A map is returned as it leaves its stage's last block, without a norm.

    A map whose side is no multiple of 7 is padded for the attention. A map smaller than a window gets a
    window of its own size and the biases of the same offsets (the layers remember the size they last saw,
    so two threads must not run one encoder on images of different sizes).

    Args:
        width: Channels of the first stage, a multiple of 24; 96 is Swin-T's.
        drop_path_rate: Rate of the last block's stochastic depth; the first has 0, between them it is linear.
    """

    def __init__(self, width: int, drop_path_rate: float) -> None:
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        body = SwinTransformer(
            in_chans=3,
            embed_dim=width,
            window_size=(WINDOW, WINDOW),
            patch_size=(4, 4),
            depths=DEPTHS,
            num_heads=HEADS,
            drop_path_rate=drop_path_rate,
            patch_norm=True,
            spatial_dims=2,
            downsample="mergingv2",
        )
        stages = [body.layers1[0], body.layers2[0], body.layers3[0], body.layers4[0]]
        self.patch_embed = body.patch_embed
        self.stages = nn.ModuleList(stages)
        self.merges = nn.ModuleList(stage.downsample for stage in stages[:-1])
        for stage in stages:
            stage.downsample = None  # the last stage's merge leads nowhere and is gone with this
        self._windows: list[tuple[int, int, torch.device] | None] = [None] * len(stages)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in (block for stage in stages for block in stage.blocks):
            del block.attn.relative_position_index  # no buffer: nothing of an image is kept in it

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps, finest first: (b, width, h/4, w/4) to (b, 8 width, h/32, w/32)."""
        x = self.patch_embed(images)  # (b, width, h/4, w/4)
        features: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            window = (min(x.shape[2], WINDOW), min(x.shape[3], WINDOW), x.device)
            if window != self._windows[index]:
                self._set_window(index, window)
            x = stage(x.contiguous())  # (b, c, h, w)
            features.append(x)
            if index < len(self.merges):
                x = self.merges[index](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (b, 2c, h/2, w/2)
        return features

    def _set_window(self, stage: int, window: tuple[int, int, torch.device]) -> None:
        """Give the blocks of a stage the index of this window; it follows from its size and is no state."""
        index = position_index(window[:2]).to(window[2])
        for block in cast(Any, self.stages[stage]).blocks:
            block.attn.relative_position_index = index
        self._windows[stage] = window
