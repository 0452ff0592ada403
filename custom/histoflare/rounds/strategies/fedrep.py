"""FedRep (Collins et al. 2021): a body that all sites share, and a head of each site's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from histoflare.errors import JobError
from histoflare.rounds.hook import LocalHook
from histoflare.rounds.state import State, subtract
from histoflare.rounds.strategies.fedavg import FedAvg
from histoflare.rounds.strategy import SiteOutcome, SiteRound, Update


@dataclass(frozen=True, kw_only=True)
class FedRep(FedAvg):
    """In each round a site first trains its head with the body held still, then the body with the head held
    still.

    Collins et al. 2021, algorithm 1; a pass each, as the task has it. ``share`` names the body; heads stay at
    their sites. With fedavg and the same ``share`` both are trained together, which is FedPer (Arivazhagan et
    al. 2019). Several tasks may so share one body (multi-task).

    Under DP-SGD it is refused, as everything is that a site keeps.

    Attributes:
        share: Module prefixes of the body; must be named.
        weighting, weights, clients_per_round: See :class:`FedAvg`.
        batch_norm: See :class:`histoflare.rounds.strategy.Strategy`.
    """

    name: ClassVar[str] = "fedrep"
    linear: ClassVar[bool] = True
    kept: ClassVar[tuple[str, ...]] = ()
    sees_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is None:
            raise JobError(
                "fedrep shares a part of the model: name its modules in share.", reason="SHARE_INVALID"
            )

    def local_round(self, ctx: SiteRound) -> SiteOutcome:
        """Train the head, then the body; send the change of the body."""
        start = self.personalize(ctx.model, ctx.site_state)
        body = set(self.shared_names(start))
        head = ctx.train(start, Hold({name: start[name] for name in body}))
        middle = {**head.state, **{name: start[name] for name in body}}
        result = ctx.train(middle, Hold({name: t for name, t in middle.items() if name not in body}))
        trained = {**result.state, **{name: t for name, t in middle.items() if name not in body}}
        losses = [loss for loss in (head.mean_loss, result.mean_loss) if math.isfinite(loss)]
        training = replace(
            result,
            state=trained,
            n_steps=head.n_steps + result.n_steps,
            mean_loss=sum(losses) / len(losses) if losses else math.nan,
            failures=tuple(dict.fromkeys(head.failures + result.failures)),
        )
        change = subtract(trained, start, self.shared_names(start))
        update = Update(ctx.site, change, self.weight(ctx.site, result.n_samples))
        return SiteOutcome(update, self.personal_state(trained), training)


class Hold(LocalHook):
    """Puts some tensors of a model back after every step.

    Args:
        tensors: Name → what it is held at.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: State = dict(tensors)

    def after_step(self, model: nn.Module) -> None:
        """Put them back."""
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                state[name].copy_(tensor)
