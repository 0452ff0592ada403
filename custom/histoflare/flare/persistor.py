"""The global model on the server's disk: safetensors, written whole, every round."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from safetensors.torch import save

from histoflare.flare.participation import run_folder
from histoflare.flare.tensors import to_arrays, to_state
from histoflare.rounds.state import model_state
from histoflare.storage import write_bytes

GLOBAL_MODEL_FILE = "global_model.safetensors"


class SeededPersistor(ModelPersistor):
    """Starts from the task's seeded initial model, and keeps the global model of the last round.

    Args:
        task_id: Component whose ``build_model`` gives the initial model, the same bytes on every machine.
        strategy_id: Component that may add tensors of its own to the global state.
    """

    def __init__(self, task_id: str = "task", strategy_id: str = "strategy") -> None:
        super().__init__()
        self._task_id = task_id
        self._strategy_id = strategy_id

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the initial model."""
        engine = fl_ctx.get_engine()
        state = model_state(engine.get_component(self._task_id).build_model())
        return make_model_learnable(to_arrays(engine.get_component(self._strategy_id).begin(state)), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the global model of this round, with the round in its metadata."""
        metadata = {"round": str(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))}
        write_bytes(
            run_folder(fl_ctx) / GLOBAL_MODEL_FILE,
            save(to_state(model[ModelLearnableKey.WEIGHTS]), metadata=metadata),
        )
