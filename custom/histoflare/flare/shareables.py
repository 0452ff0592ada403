"""The global model as a task: with what the strategy sends beside it, and whom it asks in this round."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator

from histoflare.flare.header_names import ASKED, TOTAL_ROUNDS
from histoflare.flare.job import job_of
from histoflare.flare.job_schema import TRAINING
from histoflare.flare.tensors import as_arrays, as_state
from histoflare.rounds.strategy import join, split


class AskingShareableGenerator(FullModelShareableGenerator):
    """FLARE's full-model generator; its tasks say whom the topology asks, to ``AskingScatterAndGather``.

    What the strategy keeps at the server stays out of a task, but for what it sends down.
    """

    def learnable_to_shareable(self, model_learnable: ModelLearnable, fl_ctx: FLContext) -> Shareable:
        """Return the task of this round."""
        job = job_of(fl_ctx)
        sites = job.training_sites(client.name for client in fl_ctx.get_engine().get_clients())
        job.strategy.check_sites(sites)
        turn = job.strategy.topology.plan(fl_ctx.get_prop(AppConstants.CURRENT_ROUND), sites, job.seed)
        model, own = split(as_state(model_learnable[ModelLearnableKey.WEIGHTS]))
        # An evaluation is about the model alone, and about the same bytes in a job of either kind.
        downlink = job.strategy.downlink(own) if job.kind == TRAINING else {}
        sent = as_arrays(join(model, downlink))
        shareable: Shareable = super().learnable_to_shareable(make_model_learnable(sent, {}), fl_ctx)
        shareable.set_header(ASKED, list(turn.trainers))
        shareable.set_header(TOTAL_ROUNDS, job.rounds)
        return shareable
