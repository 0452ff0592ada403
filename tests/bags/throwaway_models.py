"""Models that no job can name, run by the contract suite beside the registered ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from histoflare import ranges
from histoflare.bags.models.model import Attended, BagModel, ModelSettings


@dataclass(frozen=True)
class MeanSettings(ModelSettings):
    """The mean of the patches and a linear head."""

    name: ClassVar[str] = "mean"
    sample_mixing: ClassVar[bool] = False

    def problems(self, features: int) -> list[str]:
        return []

    def build(self, features: int, outputs: int) -> BagModel:
        return Mean(features, outputs)


class Mean(BagModel):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, outputs)

    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        weight = mask.to(x.dtype)  # (..., n)
        attention = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1.0)  # (..., n)
        mean = (attention[..., None, :] @ x).squeeze(-2)  # (..., f)
        return Attended(self.head(mean), attention[..., None, :])


@dataclass(frozen=True)
class GatedSettings(ModelSettings):
    """Gated attention (Ilse et al. 2018, eq. 9), with the entropy of the attention in the loss."""

    name: ClassVar[str] = "gated"
    sample_mixing: ClassVar[bool] = False

    hidden: int = 8
    entropy: float = 0.01

    def problems(self, features: int) -> list[str]:
        return [
            *ranges.whole("hidden", self.hidden, 4096),
            *ranges.at_least_zero("entropy", self.entropy),
        ]

    def build(self, features: int, outputs: int) -> BagModel:
        return Gated(self, features, outputs)


class Gated(BagModel):
    def __init__(self, settings: GatedSettings, features: int, outputs: int) -> None:
        super().__init__()
        self.entropy = settings.entropy
        self.what = nn.Linear(features, settings.hidden)
        self.gate = nn.Linear(features, settings.hidden)
        self.score = nn.Linear(settings.hidden, 1)
        self.head = nn.Linear(features, outputs)

    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        scores = self.score(self.what(x).tanh() * self.gate(x).sigmoid())[..., None, :, 0]  # (..., 1, n)
        lowest = torch.finfo(x.dtype).min
        attention = scores.masked_fill(~mask[..., None, :], lowest).softmax(dim=-1) * mask[..., None, :]
        outputs = self.head((attention @ x).squeeze(-2))  # (..., k)
        entropy = -torch.xlogy(attention, attention.clamp(min=1e-9)).sum(dim=(-2, -1))  # (...)
        return Attended(outputs, attention, self.entropy * entropy)


THROWAWAY: dict[str, type[ModelSettings]] = {"mean": MeanSettings, "gated": GatedSettings}
