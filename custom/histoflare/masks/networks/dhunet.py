"""DHUnet: a Swin and a ConvNeXt encoder on the same patch, one decoder, deep supervision."""

from __future__ import annotations

from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.masks.networks.convnext import ConvNeXtEncoder
from histoflare.masks.networks.fusion import GLFusion
from histoflare.masks.networks.norm import Norm
from histoflare.masks.networks.sizes import SIDE_MULTIPLE_PX
from histoflare.masks.networks.swin import SwinEncoder

SWIN_DROP_PATH = 0.2
CONVNEXT_DROP_PATH = 0.1


class DHUnet(nn.Module):
    """Dual-branch segmentation network: logits (b, classes, h, w) for images (b, 3, h, w).

    Both encoders get the same image, their maps of equal size are added and fused from coarse to fine
    (:class:`GLFusion`); a 1x1 convolution without bias makes the logits. In training four 3x3 convolutions
    on the outputs of the fusion stages stand for the auxiliary heads, of which those on 4 width channels
    (x16, nearest) and on width channels at a quarter of the side (x4) have a part in the loss. The other two
    are made, since the published network has them and its size counts them, but get no gradient.

    The published size: width 96 and 4 classes, 55,412,026 parameters.

    Args:
        classes: Number of classes.
        width: Channels of the encoders' first stage, a multiple of 24.
        norm: Of the decoder. The encoders have LayerNorm only.
        drop_path: Stochastic depth in training (up to 0.2 in Swin, 0.1 in ConvNeXt), or none.

    Attributes:
        loss_weights: Weights of the outputs of training in the loss: 0.5 main, 0.3 the x4, 0.2 the x16 head.
    """

    loss_weights = (0.5, 0.3, 0.2)

    def __init__(
        self, classes: int, *, width: int = 96, norm: Norm = "batch", drop_path: bool = True
    ) -> None:
        super().__init__()
        self.swin = SwinEncoder(width, SWIN_DROP_PATH if drop_path else 0.0)
        self.convnext = ConvNeXtEncoder(width, CONVNEXT_DROP_PATH if drop_path else 0.0)
        self.fusion = GLFusion(width, norm)
        self.head = nn.Conv2d(width, classes, kernel_size=1, bias=False)
        self.supervision = nn.ModuleList(
            nn.Conv2d(channels, classes, kernel_size=3, padding=1)
            for channels in (4 * width, 2 * width, width, width)
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return the logits (b, k, h, w); in training a list of main, x4 and x16, each (b, k, h, w).

        Raises:
            JobError: A side of ``images`` is no multiple of 32 px.
        """
        height_px, width_px = images.shape[-2:]
        if height_px % SIDE_MULTIPLE_PX or width_px % SIDE_MULTIPLE_PX:
            raise JobError(
                f"DHUnet takes patches whose sides are multiples of {SIDE_MULTIPLE_PX} px, "
                f"not {width_px} x {height_px} px: choose another patch_px"
            )
        fused = self.fusion(self.convnext(images), self.swin(images))  # coarsest first
        main: Tensor = self.head(fused[-1])  # (b, k, h, w)
        if not self.training:
            return main
        fine = enlarge(self.supervision[2](fused[2]), 4)  # (b, k, h, w)
        coarse = enlarge(self.supervision[0](fused[0]), 16)  # (b, k, h, w)
        return [main, fine, coarse]


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Return ``x`` (b, c, h, w) with every pixel repeated ``factor`` times each way."""
    enlarged: Tensor = nn.functional.interpolate(x, scale_factor=float(factor), mode="nearest")
    return enlarged
