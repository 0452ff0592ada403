"""Patches in, features out: what every encoder is, and the one around a network.

Every encoder takes uint8 RGB patches and normalises them itself, in float32, and the features of a patch do
not depend on the other patches of its batch.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn

from histoflare.bags.densenet import first_line
from histoflare.bags.preprocessing import IMAGENET, Preprocessing
from histoflare.errors import EncoderError

# Pixels encoded in one go. On a CPU more is slower (DenseNet121, 224 px, two cores: 29 ms a patch in
# batches of 4, 47 ms in batches of 32) and needs more memory, about 0.5 kB a pixel.
CPU_BATCH_PX = 1 << 18
CUDA_BATCH_PX = 1 << 24

HALF_TYPES = ("Half", "BFloat16", "c10::Half")
"""What PyTorch's errors call the types that do not meet float32."""


class Encoder(Protocol):
    """Patches in, features out."""

    @property
    def id(self) -> str:
        """Name of the encoder and its weights; equal ids give features that may be mixed."""
        ...

    @property
    def features(self) -> int:
        """Number of features of a patch."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What it does to a patch before its network sees it; None: nothing."""
        ...

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """Return float32 features (b, features) on the CPU of uint8 RGB ``patches`` (b, 3, h, w)."""
        ...


class NetworkEncoder:
    """An :class:`Encoder` around a network that maps normalised images (b, 3, h, w) to features (b, f).

    Args:
        network: Moved to ``device`` and put into evaluation mode here.
        encoder_id: The id.
        features: Number f of features; None takes it from ``probe``.
        device: Where it runs.
        preprocessing: From patches to what the network takes.
        probe: uint8 patches (b, 3, h, w), b > 1, on which the network is tried at once.

    Raises:
        EncoderError: As :meth:`encode`, and the probe's features depend on the batch (ENCODER_BATCH).
    """

    def __init__(
        self,
        network: nn.Module,
        encoder_id: str,
        features: int | None,
        device: torch.device,
        preprocessing: Preprocessing = IMAGENET,
        probe: torch.Tensor | None = None,
    ) -> None:
        self.id = encoder_id
        self.device = device
        self.preprocessing = preprocessing
        # Channels last: 37 instead of 50 ms for a patch of 224 px on a CPU.
        self._network = network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.features = features or 0
        if probe is not None:
            together = self._forward(probe)
            self.features = features or together.shape[1]
            if not torch.allclose(self.encode(probe[:1]), together[:1], rtol=1e-2, atol=1e-2):
                raise EncoderError(
                    f"encoder {self.id} gives a patch other features in another batch: export it in eval()",
                    reason="ENCODER_BATCH",
                )

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """Return float32 features (b, features) on the CPU of uint8 RGB ``patches`` (b, 3, h, w).

        Raises:
            EncoderError: The patches are no uint8 RGB images, or of a size the network does not take
                (ENCODER_INPUT); the features are not (b, features) (ENCODER_OUTPUT) or not finite
                (ENCODER_NOT_FINITE).
        """
        if patches.dtype != torch.uint8 or patches.ndim != 4 or patches.shape[1] != 3:
            raise EncoderError(
                f"an encoder takes uint8 patches (b, 3, h, w), not {patches.dtype} {tuple(patches.shape)}",
                reason="ENCODER_INPUT",
            )
        budget = CUDA_BATCH_PX if self.device.type == "cuda" else CPU_BATCH_PX
        largest_px = max(patches.shape[2] * patches.shape[3], (self.preprocessing.input_px or 0) ** 2)
        step = max(1, budget // largest_px)
        steps = [self._forward(patches[start : start + step]) for start in range(0, len(patches), step)]
        return torch.cat(steps) if steps else torch.empty(0, self.features)  # (b, f)

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        size = f"{patches.shape[3]} x {patches.shape[2]} px"
        with torch.inference_mode():
            try:
                images = self.preprocessing.apply(patches.to(self.device))
                features = self._network(images)
            except EncoderError as error:
                raise EncoderError(
                    f"encoder {self.id} and patches of {size}: {error}", reason=error.reason
                ) from None
            except RuntimeError as error:
                raise self._refused(error, size) from error
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else ()
            width = self.features or (found[-1] if found else 0)
            if found != (len(patches), width) or width == 0:
                raise EncoderError(
                    f"encoder {self.id} gives {found or type(features).__name__} for {len(patches)} patches: "
                    f"its output must be one vector a patch, (b, {self.features or 'features'}). Export it "
                    "with its pooling inside (class token, mean of tokens or of maps, as its authors do)",
                    reason="ENCODER_OUTPUT",
                )
            features = cast(torch.Tensor, features).float().cpu()
        if not torch.isfinite(features).all():
            raise EncoderError(f"encoder {self.id} gives NaN or infinity", reason="ENCODER_NOT_FINITE")
        return features.clone()  # an ordinary tensor: those of inference mode cannot be trained on

    def _refused(self, error: RuntimeError, size: str) -> EncoderError:
        """Return what a network's error means."""
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            return EncoderError(
                f"not enough memory on {self.device} for encoder {self.id} and patches of {size}: "
                "use --device cpu, or a machine with more",
                reason="ENCODER_MEMORY",
            )
        if any(kind in str(error) for kind in HALF_TYPES):
            return EncoderError(
                f"encoder {self.id} was exported in half precision: export it in float32 (model.float()), so "
                f"that its features are the same on every machine ({first_line(error)})",
                reason="ENCODER_WEIGHTS",
            )
        return EncoderError(
            f"encoder {self.id} does not take patches of {size}; choose the size it was made for "
            f"with --patch-px ({first_line(error)})",
            reason="ENCODER_INPUT",
        )
