"""ConvNeXt with three blocks in every stage as an encoder: the layers of transformers, without norms after.

Source: Liu et al. 2022 (ConvNeXt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

DEPTHS = (3, 3, 3, 3)
LAYER_SCALE = 1e-6
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def convnext_config(width: int, depths: Sequence[int], drop_path_rate: float) -> Any:
    """Return transformers' configuration of a ConvNeXt whose stages have width, 2, 4 and 8 width channels."""
    from transformers import ConvNextConfig

    return ConvNextConfig(
        num_channels=3,
        patch_size=4,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=list(depths),
        drop_path_rate=drop_path_rate,
        layer_scale_init_value=LAYER_SCALE,
        out_features=STAGES,
    )


class ConvNeXtEncoder(nn.Module):
    """Images (b, 3, h, w) to four feature maps of width, 2, 4 and 8 width channels at h/4, h/8, h/16, h/32.

    A map is returned as it leaves its stage's last block: the norms that ``ConvNextBackbone`` has for its
    outputs are left out.

    Args:
        width: Channels of the first stage; 96 is ConvNeXt-T's.
        drop_path_rate: Rate of the last block's stochastic depth; the first has 0, between them it is linear.
    """

    def __init__(self, width: int, drop_path_rate: float) -> None:
        super().__init__()
        from transformers import ConvNextBackbone

        backbone = ConvNextBackbone(convnext_config(width, DEPTHS, drop_path_rate))
        self.embeddings = backbone.embeddings
        self.stages = backbone.encoder.stages

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps, finest first: (b, width, h/4, w/4) to (b, 8 width, h/32, w/32)."""
        x = self.embeddings(images)  # (b, width, h/4, w/4)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)  # (b, c, h, w); from the second stage on half the side, twice the channels
            features.append(x)
        return features
