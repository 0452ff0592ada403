"""MOON (Li et al. 2021): what a site sees is drawn to what the global model sees, and away from its last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoflare import ranges
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.state import load_state
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SiteOutcome, SiteRound
from histoflare.rounds.task import Task

LAST = "last/"
"""Prefix, in a site's own state, of its model as its last training left it."""


@dataclass(frozen=True, kw_only=True)
class Moon(FedAvg):
    """The loss of a batch has μ · -log(e^{s(z, z_g)/τ} / (e^{s(z, z_g)/τ} + e^{s(z, z_l)/τ})) added to it.

    Li et al. 2021, eq. 3: z is the representation of the model in training, z_g that of the global model, z_l
    that of the site's model of its last round, s their cosine. A representation is what goes into the model's
    last layer with weights; the paper's projection head is not added. Of images it is the mean over the
    pixels. In a site's first round, which has no last model, the term is left out.

    The term looks at training data: under DP-SGD it is refused. A step costs three passes more.

    Attributes:
        mu: μ, at least 0. temperature: τ, above 0.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        share, batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "moon"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ("its last model",)
    sees_data: ClassVar[bool] = True
    mu: float = 1.0
    temperature: float = 0.5

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [*ranges.at_least_zero("mu", self.mu), *ranges.above_zero("temperature", self.temperature)]

    def hook(self, ctx: SiteRound) -> LocalHook | None:
        """Return the term, from a site's second round on."""
        last = {n.removeprefix(LAST): t for n, t in ctx.site_state.items() if n.startswith(LAST)}
        if not last:
            return None
        start = self.personalize(ctx.model, ctx.site_state)
        return _Contrast(ctx.task, start, last, self.mu, self.temperature)

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train; send the change, and keep the model."""
        outcome = super().local_round(ctx)
        last = {LAST + name: tensor for name, tensor in outcome.training.state.items()}
        return replace(outcome, site_state={**outcome.site_state, **last})


class _Contrast(LocalHook):
    def __init__(
        self,
        task: Task,
        start: Mapping[str, Tensor],
        last: Mapping[str, Tensor],
        mu: float,
        temperature: float,
    ) -> None:
        self._task, self._mu, self._temperature = task, mu, temperature
        self._global, self._last = (_frozen(task, state) for state in (start, last))

    def loss(self, model: nn.Module, batch: Any, loss: Tensor) -> Tensor:
        z = representation(self._task, model, batch)
        with torch.no_grad():
            near, far = (
                representation(self._task, each.to(z.device), batch) for each in (self._global, self._last)
            )
        logits = torch.stack([F.cosine_similarity(z, near), F.cosine_similarity(z, far)], dim=1)
        target = torch.zeros(len(z), dtype=torch.long, device=z.device)
        return loss + self._mu * F.cross_entropy(logits / self._temperature, target)


def _frozen(task: Task, state: Mapping[str, Tensor]) -> nn.Module:
    model = task.build_model()
    load_state(model, state)
    return model.eval()


def representation(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Return what goes into a model's last layer with weights, (samples, features).

    Args:
        batch: As the task makes it: the model is run on it through the task's loss.
    """
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    seen: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        task.loss(model, batch)
    finally:
        handle.remove()
    z = seen[-1]
    return z.flatten(2).mean(dim=2) if z.ndim > 3 else z.flatten(end_dim=-2)
