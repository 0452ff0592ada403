"""Encoders: a patch becomes a vector of features.

Three kinds, each named by an id that a bag's header carries:

- ``densenet121``: MONAI's DenseNet121 up to its global average pooling (1024 features, ImageNet
  normalisation; Adnan 2022, Kalra et al. 2020) with weights from a local file, pinned by its SHA-256.
- ``densenet121-random``: the same network with seeded initial weights, for demos and tests. Its normalisation
  statistics come from generated patches that are part of this package: it is the same at every site and no
  patient had a part in it.
- ``torchscript:<name>``: any TorchScript file, pinned by its SHA-256, for pathology foundation models.

Every encoder takes uint8 RGB patches and normalises them itself, and the features of a patch do not depend on
the other patches of its batch.
"""

from __future__ import annotations

import hashlib
import io
import re
from functools import lru_cache
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import nn

from histoflare.bags.densenet import (
    densenet121,
    first_line,
    load_densenet,
    set_statistics,
    standardise_features,
)
from histoflare.errors import EncoderError

ENCODER_KINDS = "densenet121, densenet121-random, torchscript:<name>"
RANDOM_ID = "densenet121-random:v1"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pixels encoded in one go. On a CPU more is slower (DenseNet121, 224 px, two cores: 29 ms a patch in
# batches of 4, 47 ms in batches of 32) and needs more memory, about 0.5 kB a pixel.
CPU_BATCH_PX = 1 << 18
CUDA_BATCH_PX = 1 << 24

# Of densenet121-random: patches for the BatchNorm statistics, and, those included, for the features' own.
REFERENCE_PATCHES = 32
REFERENCE_FEATURE_PATCHES = 96
REFERENCE_PATCH_PX = 224


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
        probe: torch.Tensor | None = None,
    ) -> None:
        self.id = encoder_id
        self.device = device
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
        step = max(1, budget // (patches.shape[2] * patches.shape[3]))
        steps = [self._forward(patches[start : start + step]) for start in range(0, len(patches), step)]
        return torch.cat(steps) if steps else torch.empty(0, self.features)  # (b, f)

    def _forward(self, patches: torch.Tensor) -> torch.Tensor:
        size = f"{patches.shape[3]} x {patches.shape[2]} px"
        with torch.inference_mode():
            try:
                features = self._network(normalise(patches.to(self.device)))
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                    raise EncoderError(
                        f"not enough memory on {self.device} for encoder {self.id} and patches of {size}: "
                        "use --device cpu, or a machine with more",
                        reason="ENCODER_MEMORY",
                    ) from error
                raise EncoderError(
                    f"encoder {self.id} does not take patches of {size}; choose the size it was made for "
                    f"with --patch-px ({first_line(error)})",
                    reason="ENCODER_INPUT",
                ) from error
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else ()
            width = self.features or (found[-1] if found else 0)
            if found != (len(patches), width) or width == 0:
                raise EncoderError(
                    f"encoder {self.id} gives {found or type(features).__name__} for {len(patches)} patches: "
                    f"its output must be one vector a patch, (b, {self.features or 'features'})",
                    reason="ENCODER_OUTPUT",
                )
            features = cast(torch.Tensor, features).float().cpu()
        if not torch.isfinite(features).all():
            raise EncoderError(f"encoder {self.id} gives NaN or infinity", reason="ENCODER_NOT_FINITE")
        return features.clone()  # an ordinary tensor: those of inference mode cannot be trained on


def normalise(patches: torch.Tensor) -> torch.Tensor:
    """Return float32 ``(patches / 255 - mean) / std`` by ImageNet's mean and std, for uint8 (b, 3, h, w)."""
    images = patches.contiguous(memory_format=torch.channels_last).float()
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1) * 255
    images -= mean
    images /= std
    return images


def load_encoder(
    spec: str,
    weights: Path | None = None,
    sha256: str | None = None,
    device: str = "auto",
    probe_px: int = 224,
) -> Encoder:
    """Return the encoder that ``spec`` names.

    Args:
        spec: ``densenet121``, ``densenet121-random`` or ``torchscript:<name>``.
        weights: The weight file; not for ``densenet121-random``.
        sha256: SHA-256 of the weight file in hexadecimal; checked before anything in the file is used.
        device: ``auto`` (CUDA when there is one), ``cpu`` or ``cuda``.
        probe_px: Side of the blank patch a TorchScript file is tried on.

    Raises:
        EncoderError: Unknown spec or device (ENCODER_UNKNOWN), no or another file than pinned
            (ENCODER_WEIGHTS_MISSING, ENCODER_HASH), a file that is no such network (ENCODER_WEIGHTS), or that
            does not give one finite vector a patch (ENCODER_INPUT, ENCODER_OUTPUT, ENCODER_NOT_FINITE).
    """
    where = choose_device(device)
    if spec == "densenet121-random":
        if weights is not None or sha256 is not None:
            raise EncoderError(
                "densenet121-random has no weight file; for one of your own use --encoder densenet121",
                reason="ENCODER_UNKNOWN",
            )
        return _random_densenet(str(where))
    name = re.fullmatch(r"torchscript:([A-Za-z0-9._-]+)", spec)
    if spec != "densenet121" and name is None:
        raise EncoderError(f"no encoder '{spec}'; there are {ENCODER_KINDS}", reason="ENCODER_UNKNOWN")
    content, digest = read_pinned(spec, weights, sha256)
    if name is None:
        network = densenet121()
        load_densenet(network, content, str(weights))
        return NetworkEncoder(network, f"densenet121:{digest[:12]}", network.features, where)
    return _torchscript(f"{spec}:{digest[:12]}", content, where, probe_px)


def choose_device(device: str) -> torch.device:
    """Return the device that ``device`` (``auto``, ``cpu``, ``cuda``, ``cuda:1`` …) names.

    Raises:
        EncoderError: There is no such device here (ENCODER_UNKNOWN).
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise EncoderError(
            f"no device '{device}': use auto, cpu or cuda", reason="ENCODER_UNKNOWN"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise EncoderError("there is no CUDA device here: use cpu or auto", reason="ENCODER_UNKNOWN")
    return chosen


def read_pinned(spec: str, weights: Path | None, sha256: str | None) -> tuple[bytes, str]:
    """Return the content of ``weights`` and its SHA-256, if that is ``sha256``.

    The bytes that were hashed are the bytes that are used: the file is read once.
    """
    if weights is None or not weights.is_file():
        raise EncoderError(
            f"encoder {spec} needs its weight file (--weights FILE)"
            + ("" if weights is None else f": there is no {weights}"),
            reason="ENCODER_WEIGHTS_MISSING",
        )
    content = weights.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is None:
        raise EncoderError(
            f"encoder {spec} needs the SHA-256 that the sites agreed on (--weights-sha256); "
            f"{weights} has {digest}",
            reason="ENCODER_HASH",
        )
    if digest != sha256.strip().lower():
        raise EncoderError(
            f"{weights} has SHA-256 {digest}, not {sha256}: it is not the agreed file and was not used",
            reason="ENCODER_HASH",
        )
    return content, digest


@lru_cache(maxsize=2)
def _random_densenet(device: str) -> Encoder:
    """Build ``densenet121-random`` once a process: setting its statistics takes a few seconds.

    Its weights are random, its statistics those of generated patches: it depends on no patient.
    """
    from histoflare.slides.synthetic import reference_patches

    patches = torch.from_numpy(reference_patches(REFERENCE_FEATURE_PATCHES, REFERENCE_PATCH_PX))
    images = normalise(patches.permute(0, 3, 1, 2))  # (b, h, w, 3) to (b, 3, h, w)
    network = densenet121()
    set_statistics(network, images[:REFERENCE_PATCHES])
    standardise_features(network, images)
    return NetworkEncoder(network, RANDOM_ID, network.features, torch.device(device))


def _torchscript(encoder_id: str, content: bytes, device: torch.device, probe_px: int) -> Encoder:
    """Load a TorchScript module that takes ImageNet-normalised images and gives (b, f), and try it."""
    try:
        # No map to the device: .to() moves it, and a file traced on CUDA opens on a CPU.
        loaded = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        network = cast(nn.Module, loaded)
    except Exception as error:
        raise EncoderError(
            f"the file of {encoder_id} is no TorchScript module ({first_line(error)}); make one with "
            "torch.jit.trace(...).save(file)",
            reason="ENCODER_WEIGHTS",
        ) from error
    # Two unlike patches: one of tissue's pink noise, one of empty glass.
    noise = np.random.default_rng(0).integers(120, 230, (3, probe_px, probe_px), dtype=np.uint8)
    probe = torch.stack(
        [torch.from_numpy(noise), torch.full((3, probe_px, probe_px), 240, dtype=torch.uint8)]
    )
    return NetworkEncoder(network, encoder_id, None, device, probe)
