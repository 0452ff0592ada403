"""A linear model on the mean of a bag: few weights, for training under noise.

Under differential privacy the noise of a step grows with the square root of the number of weights. MEM as
the private job has it has some 50,000; this one has (directions + 1) numbers for each output, without bias
one less. Before the weights stand three fixed maps, none of which is fitted to anybody's data: each patch's
vector is scaled by itself, projected on random directions that follow from a public seed (Johnson and
Lindenstrauss 1984, with random signs as in Achlioptas 2003), and the bag's mean is scaled to length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from histoflare import ranges
from histoflare.bags.models.model import Attended, BagModel, ModelSettings
from histoflare.seeds import derive_seed


@dataclass(frozen=True)
class LinearSettings(ModelSettings):
    """The settings of :class:`Linear`.

    Attributes:
        directions: Number of random directions; 0 keeps all features.
        direction_seed: Which directions; the same number gives the same ones everywhere.
        bias: Whether each output has a number b of its own. Under DP-SGD it is the loudest of all: every
            patient's gradient has it at full length, half of a gradient's square, where the directions
            share the other half. Without it the rest has more of the clip and no noise moves the threshold;
            how common classes are is then told by the target (``class_shares``), not learned.
    """

    name: ClassVar[str] = "linear"
    sample_mixing: ClassVar[bool] = False

    directions: int = 64
    direction_seed: int = 0
    bias: bool = True

    def problems(self, features: int) -> list[str]:
        """Return what is out of range."""
        all_kept = type(self.directions) is int and self.directions == 0
        return [
            *([] if all_kept else ranges.whole("directions", self.directions, 16_384)),
            *ranges.seed("direction_seed", self.direction_seed),
            *([] if type(self.bias) is bool else [f"bias: true or false, not {self.bias!r}"]),
        ]

    def build(self, features: int, outputs: int) -> BagModel:
        """Return the network."""
        return Linear(self, features, outputs)


class Linear(BagModel):
    """Outputs = W v + b, with v the direction of the mean of a bag's projected patches; b is 0 without bias.

    The gradient of a bag's cross-entropy has an L2 norm of at most 2, without bias of at most √2, whatever is
    in the bag.
    Attention is the same for all patches.

    Args:
        settings: See :class:`LinearSettings`.
        features: f, length of a patch's feature vector.
        outputs: k, length of an answer.
    """

    def __init__(self, settings: LinearSettings, features: int, outputs: int) -> None:
        super().__init__()
        self.directions: Tensor | None
        signs = None
        if settings.directions:
            generator = torch.Generator().manual_seed(derive_seed(settings.direction_seed, "directions"))
            shape = (features, settings.directions)
            signs = torch.randint(2, shape, generator=generator, device="cpu").float().mul_(2).sub_(1)
        # Not persistent: it is no part of the model's state, so it is neither sent nor noised nor stored.
        self.register_buffer("directions", signs, persistent=False)
        self.head = nn.Linear(settings.directions or features, outputs, bias=settings.bias)

    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        weight = mask.to(x.dtype)  # (..., n)
        attention = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1.0)  # (..., n)
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-12)  # (..., n, f)
        mean = (attention[..., None, :] @ x).squeeze(-2)  # (..., f)
        if self.directions is not None:
            mean = mean @ self.directions  # (..., d)
        length = mean.square().sum(dim=-1, keepdim=True).add(1e-12).sqrt()  # (..., 1)
        return Attended(self.head(mean / length), attention[..., None, :])
