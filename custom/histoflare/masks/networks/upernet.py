"""ConvNeXt-T with an UPerNet head (Xiao et al. 2018), as transformers has them."""

from __future__ import annotations

from torch import Tensor, nn

from histoflare.masks.networks.convnext import convnext_config
from histoflare.masks.networks.norm import Norm, replace_batch_norms

DEPTHS = (3, 3, 9, 3)
DROP_PATH = 0.1


class ConvNeXtUPerNet(nn.Module):
    """Logits (b, classes, h, w) for images (b, 3, h, w); the head's own, at a quarter, enlarged bilinearly.

    The head has 4 width channels and no auxiliary head stands beside it: with width 96 and 4 classes these
    are 46.5 million parameters. For a batch of one image the BatchNorm of the pyramid's 1 x 1 map goes by its
    running statistics (:class:`SingleValueBatchNorm`).

    Args:
        classes: Number of classes.
        width: Channels of ConvNeXt's first stage; 96 is ConvNeXt-T's.
        norm: Of the head. ConvNeXt has LayerNorm only.
        drop_path: Stochastic depth in training (up to 0.1), or none.
    """

    loss_weights = (1.0,)

    def __init__(
        self, classes: int, *, width: int = 96, norm: Norm = "batch", drop_path: bool = True
    ) -> None:
        super().__init__()
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        backbone = convnext_config(width, DEPTHS, DROP_PATH if drop_path else 0.0)
        self.net = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=backbone, num_labels=classes, hidden_size=4 * width, use_auxiliary_head=False
            )
        )
        replace_batch_norms(self.net, norm)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return the logits (b, k, h, w); in training a list that holds them."""
        logits: Tensor = self.net(images).logits
        return [logits] if self.training else logits
