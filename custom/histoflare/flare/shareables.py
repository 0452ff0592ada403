"""The global model as a task: with whom the strategy asks in this round."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator

from histoflare.flare.headers import ASKED, TOTAL_ROUNDS


class AskingShareableGenerator(FullModelShareableGenerator):
    """FLARE's full-model generator; its tasks say whom the strategy asks, to ``AskingScatterAndGather``.

    Args:
        strategy_id: Component whose ``participants`` chooses.
        seed, rounds: The job's.
    """

    def __init__(self, strategy_id: str = "strategy", seed: int = 0, rounds: int = 1) -> None:
        super().__init__()
        self._strategy_id = strategy_id
        self._seed = seed
        self._rounds = rounds

    def learnable_to_shareable(self, model_learnable: ModelLearnable, fl_ctx: FLContext) -> Shareable:
        """Return the task of this round."""
        engine = fl_ctx.get_engine()
        sites = sorted(client.name for client in engine.get_clients())
        strategy = engine.get_component(self._strategy_id)
        strategy.check_sites(sites)
        asked = strategy.participants(fl_ctx.get_prop(AppConstants.CURRENT_ROUND), sites, self._seed)
        shareable: Shareable = super().learnable_to_shareable(model_learnable, fl_ctx)
        shareable.set_header(ASKED, list(asked))
        shareable.set_header(TOTAL_ROUNDS, self._rounds)
        return shareable
