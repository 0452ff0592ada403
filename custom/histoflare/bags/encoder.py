"""Encoders by name: a patch becomes a vector of features.

Four kinds, each named by an id that a bag's header carries:

- ``densenet121``: MONAI's DenseNet121 up to its global average pooling (1024 features, ImageNet
  normalisation; Adnan 2022, Kalra et al. 2020) with weights from a local file, pinned by its SHA-256.
- ``densenet121-random``: the same network with seeded initial weights, for demos and tests. Its normalisation
  statistics are those of generated patches, in a file of this package: it is the same at every site and no
  patient had a part in it.
- ``efficientnet-lite0``: ImageNet weights that come with the extra ``demo``, see ``bags.efficientnet``.
- ``torchscript:<name>``: any TorchScript file, pinned by its SHA-256, for pathology foundation models. What
  it was trained with (mean, std, input size) is given beside it, see ``bags.preprocessing``.

An id ends with the first 12 digits of the weights' SHA-256; that of a TorchScript file goes on with a hyphen
and the 8 digits of its preprocessing, so that features of one file under two normalisations never mix.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import torch
from torch import nn

from histoflare.bags.densenet import (
    densenet121,
    first_line,
    load_densenet,
)
from histoflare.bags.efficientnet import (
    PREPROCESSING,
    SHA256,
    EfficientNetLiteFeatures,
    load_efficientnet,
)
from histoflare.bags.encoder_names import (
    EFFICIENTNET,
    RANDOM,
    TORCHSCRIPT,
    check_encoder,
    find_packaged_weights,
)
from histoflare.bags.network_encoder import Encoder, NetworkEncoder
from histoflare.bags.preprocessing import Preprocessing, read_preprocessing
from histoflare.errors import EncoderError

RANDOM_ID = f"{RANDOM}:v1"
SHA256_DIGITS = 12
"""Of the weights' SHA-256, in an encoder's id."""

STATISTICS = Path(__file__).with_name("densenet121_random.safetensors")
"""Of densenet121-random; made by ``synthetic.statistics``."""
STATISTICS_SHA256 = "cc504a89f338a04aa85e1fea6722c543f4c9bab5bde9cd0144322a3d760517a0"

PROBE_PX = 224
"""Side of the patches that a TorchScript file is tried with, if nothing says another."""


def load_encoder(
    spec: str,
    weights: Path | None = None,
    sha256: str | None = None,
    device: str = "auto",
    probe_px: int | None = None,
) -> Encoder:
    """Return the encoder that ``spec`` names.

    Args:
        spec: ``densenet121``, ``densenet121-random``, ``efficientnet-lite0`` or ``torchscript:<name>``.
        weights: The weight file; not for ``densenet121-random``. Without one ``efficientnet-lite0`` takes
            that of the installed package, whose SHA-256 is known. Beside a TorchScript file lies what it was
            trained with, see ``bags.preprocessing``.
        sha256: SHA-256 of the weight file in hexadecimal; checked before anything in the file is used.
        device: ``auto`` (CUDA when there is one), ``cpu`` or ``cuda``.
        probe_px: Side of the patches to come, on which a TorchScript file is tried; None: of its own.

    Raises:
        EncoderError: Unknown spec or device (ENCODER_UNKNOWN), no or another file than pinned
            (ENCODER_WEIGHTS_MISSING, ENCODER_HASH), a file that is no such network (ENCODER_WEIGHTS), that
            nothing says the mean and std of (ENCODER_PREPROCESSING), or that does not give one finite vector
            a patch (ENCODER_INPUT, ENCODER_OUTPUT, ENCODER_NOT_FINITE).
    """
    where = choose_device(device)
    check_encoder(spec, weights, sha256)
    if spec == RANDOM:
        return _random_densenet(str(where))
    if spec == EFFICIENTNET:
        return _efficientnet(weights, sha256, where)
    content, digest = read_pinned(spec, weights, sha256)
    if TORCHSCRIPT.fullmatch(spec) is None:
        network = densenet121()
        load_densenet(network, content, str(weights))
        return NetworkEncoder(network, f"densenet121:{digest[:SHA256_DIGITS]}", network.features, where)
    assert weights is not None
    preprocessing = read_preprocessing(weights)
    encoder_id = f"{spec}:{digest[:SHA256_DIGITS]}-{preprocessing.digest}"
    return _torchscript(encoder_id, content, preprocessing, where, probe_px)


def load_encoder_of(
    encoder_id: str,
    weights: Path | None = None,
    sha256: str | None = None,
    device: str = "auto",
    probe_px: int | None = None,
) -> Encoder:
    """Return the encoder that has made features: the one whose id a bag, a job or a model names.

    Args:
        encoder_id: The id. Its digits of the weights' SHA-256 are what the file must have.
        weights: The weight file, if the encoder has one. sha256: All 64 digits, where somebody has them.
        device, probe_px: As for :func:`load_encoder`.

    Raises:
        EncoderError: As :func:`load_encoder`, or what is here is another encoder (ENCODER_MISMATCH).
    """
    spec, _, rest = encoder_id.rpartition(":")
    pinned = rest.partition("-")[0]
    if spec == "imported":
        raise EncoderError(
            f"the features of {encoder_id} were made by another program: a slide cannot be encoded so here",
            reason="ENCODER_UNKNOWN",
        )
    if spec.startswith("torchscript:") and "-" not in rest:
        raise EncoderError(
            f"{encoder_id} is from a time when every TorchScript file was given ImageNet's mean and std, and "
            "does not say its own: prepare the bags again and train again",
            reason="ENCODER_MISMATCH",
        )
    if weights is not None:
        sha256 = sha256 or pinned
    encoder = load_encoder(spec, weights, sha256, device, probe_px)
    if encoder.id != encoder_id:
        raise EncoderError(
            f"the encoder wanted is {encoder_id}, the one here is {encoder.id}: the weights differ, or what "
            "the file beside them says (mean, std, input_px, interpolation)",
            reason="ENCODER_MISMATCH",
        )
    return encoder


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
    """Return the content of ``weights`` and its SHA-256, if that is ``sha256`` or begins with its 12 digits.

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
    wanted = sha256.strip().lower()
    if digest[: len(wanted)] != wanted or len(wanted) not in (SHA256_DIGITS, len(digest)):
        raise EncoderError(
            f"{weights} has SHA-256 {digest}, not {sha256}: it is not the agreed file and was not used",
            reason="ENCODER_HASH",
        )
    return content, digest


def _efficientnet(weights: Path | None, sha256: str | None, device: torch.device) -> Encoder:
    weights = weights or find_packaged_weights()
    content, digest = read_pinned(EFFICIENTNET, weights, sha256 or SHA256)
    network = EfficientNetLiteFeatures()
    load_efficientnet(network, content, str(weights))
    encoder_id = f"{EFFICIENTNET}:{digest[:SHA256_DIGITS]}"
    return NetworkEncoder(network, encoder_id, network.features, device, PREPROCESSING)


@lru_cache(maxsize=2)
def _random_densenet(device: str) -> Encoder:
    """Build ``densenet121-random`` once a process.

    Its weights are random, its statistics those of generated patches: it depends on no patient.
    """
    content, _ = read_pinned(RANDOM_ID, STATISTICS, STATISTICS_SHA256)
    network = densenet121()
    network.load_state_dict({**network.state_dict(), **safetensors.torch.load(content)})
    return NetworkEncoder(network, RANDOM_ID, network.features, torch.device(device))


def _torchscript(
    encoder_id: str,
    content: bytes,
    preprocessing: Preprocessing,
    device: torch.device,
    probe_px: int | None,
) -> Encoder:
    """Load a TorchScript module that takes preprocessed images and gives (b, f), and try it."""
    try:
        # No map to the device: .to() moves it, and a file traced on CUDA opens on a CPU.
        loaded = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        network = cast(nn.Module, loaded).float()
    except Exception as error:
        raise EncoderError(
            f"the file of {encoder_id} is no TorchScript module ({first_line(error)}); make one with "
            "torch.jit.trace(...).save(file)",
            reason="ENCODER_WEIGHTS",
        ) from error
    side = probe_px or preprocessing.input_px or PROBE_PX
    # Two unlike patches: one of tissue's pink noise, one of empty glass.
    noise = np.random.default_rng(0).integers(120, 230, (3, side, side), dtype=np.uint8)
    probe = torch.stack([torch.from_numpy(noise), torch.full((3, side, side), 240, dtype=torch.uint8)])
    return NetworkEncoder(network, encoder_id, None, device, preprocessing, probe)
