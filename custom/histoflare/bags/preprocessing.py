"""What an encoder's network gets to see of a patch: its size, and its colours less a mean over a deviation.

A TorchScript file does not say what it was trained with. Its ``mean``, ``std`` and ``input_px`` stand in a
small TOML file beside it, with ``.toml`` added to its name (``uni.pt`` and ``uni.pt.toml``)::

    mean = [0.485, 0.456, 0.406]      # of red, green and blue, from 0 to 1
    std = [0.229, 0.224, 0.225]
    input_px = 224                    # side of the square images that it was trained on
    interpolation = "bicubic"         # or "bilinear": patches of another side are resized so; without it none
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from histoflare.checks import is_number, is_whole
from histoflare.errors import EncoderError

Interpolation = Literal["bilinear", "bicubic"]

SUFFIX = ".toml"
LARGEST_FILE_BYTES = 1 << 16
LARGEST_INPUT_PX = 16_384
EXAMPLE = "mean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\ninput_px = 224"


def _three(values: Any, least: float) -> bool:
    """Return whether ``values`` are three numbers from ``least`` to 1."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(is_number(value) and least <= value <= 1 for value in values)
    )


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 patches to what a network takes.

    Attributes:
        mean, std: Of red, green and blue, where 1 is the brightest; from 0 to 1, ``std`` above 0.
        input_px: Side of the images that the network takes; None takes any.
        interpolation: How patches of another side are resized (antialiased); None refuses them.

    Raises:
        EncoderError: A value is out of its range (ENCODER_PREPROCESSING); all such values are listed.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_px: int | None = None
    interpolation: Interpolation | None = None

    def __post_init__(self) -> None:
        rules = {
            "mean: three numbers from 0 to 1 (of 255, divide them by 255)": _three(self.mean, 0.0),
            "std: three numbers above 0 and at most 1 (of 255, divide them by 255)": _three(self.std, 1e-6),
            f"input_px: a whole number from 1 to {LARGEST_INPUT_PX}": self.input_px is None
            or is_whole(self.input_px, 1, LARGEST_INPUT_PX),
            'interpolation: "bilinear" or "bicubic", or left out': self.interpolation is None
            or self.interpolation in get_args(Interpolation),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise EncoderError("; ".join(broken), reason="ENCODER_PREPROCESSING")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the SHA-256 of the fields: another preprocessing has others."""
        content = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def apply(self, patches: torch.Tensor) -> torch.Tensor:
        """Return float32 ``(patches / 255 - mean) / std`` of uint8 patches (b, 3, h, w), resized if need be.

        Raises:
            EncoderError: They have another side than ``input_px``, and none are resized (ENCODER_INPUT).
        """
        images = patches.contiguous(memory_format=torch.channels_last).float()
        side = self.input_px
        if side is not None and tuple(images.shape[2:]) != (side, side):
            images = self._resized(images, side)
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1) * 255
        images -= mean
        images /= std
        return images

    def _resized(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """Return images (b, 3, side, side), in whole grey levels as Pillow and torchvision leave them."""
        if self.interpolation is None:
            raise EncoderError(
                f"it takes {side} px: cut the patches so (--patch-px {side}), or say in the {SUFFIX} file "
                'beside its weights how to resize them (interpolation = "bicubic" or "bilinear")',
                reason="ENCODER_INPUT",
            )
        resized = F.interpolate(
            images, (side, side), mode=self.interpolation, antialias=True, align_corners=False
        )
        return resized.round_().clamp_(0, 255)


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_preprocessing(weights: Path) -> Preprocessing:
    """Return what the file beside the weight file ``weights`` says.

    Raises:
        EncoderError: There is none, or it does not say mean, std and input_px (ENCODER_PREPROCESSING).
    """
    path = weights.with_name(weights.name + SUFFIX)
    try:
        with path.open("rb") as opened:
            said = tomllib.loads(opened.read(LARGEST_FILE_BYTES).decode())
    except FileNotFoundError:
        raise EncoderError(
            f"{weights}: the file does not say which mean, std and input size its encoder was trained with. "
            f"Write them to {path}, as its authors give them; for those of ImageNet:\n{EXAMPLE}",
            reason="ENCODER_PREPROCESSING",
        ) from None
    except (OSError, ValueError) as error:  # TOML's and Unicode's errors are ValueErrors
        raise EncoderError(f"{path}: cannot be read ({error})", reason="ENCODER_PREPROCESSING") from None
    names = [field.name for field in fields(Preprocessing)]
    missing = [name for name in ("mean", "std", "input_px") if name not in said]
    unknown = [name for name in said if name not in names]
    if missing or unknown:
        raise EncoderError(
            f"{path}: it says mean, std and input_px, and interpolation if patches are to be resized; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            reason="ENCODER_PREPROCESSING",
        )
    try:
        return Preprocessing(**said)
    except EncoderError as error:
        raise EncoderError(f"{path}: {error}", reason=error.reason) from None
