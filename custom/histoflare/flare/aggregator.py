"""The server's side of a round: updates are held, then combined in site order, not in order of arrival."""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from histoflare.errors import HistoflareError
from histoflare.flare.headers import NOT_ASKED, WEIGHT
from histoflare.flare.participation import ParticipationLog
from histoflare.flare.tensors import to_arrays, to_state
from histoflare.rounds.strategy import Update, check_update, server_round


class SiteOrderAggregator(Aggregator):
    """Holds a round's updates and gives them to the strategy in site order, where they are summed in float64.

    FLARE's own aggregators add each update as it arrives; floating-point sums then depend on who is faster.

    Args:
        strategy_id: Component that combines the updates.
    """

    def __init__(self, strategy_id: str = "strategy") -> None:
        super().__init__()
        self._strategy_id = strategy_id
        self._updates: dict[str, Update] = {}
        self._log = ParticipationLog()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget the round's updates."""
        self._updates = {}

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Hold one site's update of this round; refuse errors, duplicates, late and unusable ones.

        A refused update costs its site the round and no other site anything. Never raises: FLARE would end
        the round for everybody.
        """
        peer = fl_ctx.get_peer_context()
        site = peer.get_prop(ReservedKey.IDENTITY_NAME) if peer else None
        current = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if site is None or shareable.get_return_code() not in (None, ReturnCode.OK):
            return False
        if shareable.get_header(NOT_ASKED) or site in self._updates:
            return False
        if shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND) != current:
            return False
        try:
            dxo = from_shareable(shareable)
            weight = dxo.get_meta_prop(WEIGHT)
            if dxo.data_kind != DataKind.WEIGHT_DIFF or not isinstance(weight, float):
                return False
            update = Update(site=site, tensors=to_state(dxo.data), weight=weight)
            strategy = fl_ctx.get_engine().get_component(self._strategy_id)
            check_update(strategy, to_state(_weights(fl_ctx)), update)
        except (HistoflareError, ValueError, TypeError, AttributeError) as error:
            self.log_warning(fl_ctx, f"the update of {site} is refused: {error}")
            return False
        self._updates[site] = update
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Return the new global model. Without any update it stays as it was, and the record says so."""
        engine = fl_ctx.get_engine()
        weights = _weights(fl_ctx)
        sites = sorted(client.name for client in engine.get_clients())
        taking_part = sorted(self._updates)
        try:
            if self._updates:
                combined = server_round(
                    engine.get_component(self._strategy_id),
                    to_state(weights),
                    [self._updates[site] for site in taking_part],
                    sites=sorted({*sites, *taking_part}),
                )
                weights = to_arrays(combined)
        except HistoflareError as error:
            self.system_panic(f"round not combined: {error}", fl_ctx)
            taking_part = []
        self._log.add(fl_ctx, sites=sites, taking_part=taking_part)
        shareable: Shareable = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
        return shareable


def _weights(fl_ctx: FLContext) -> dict[str, Any]:
    weights: dict[str, Any] = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    return weights
