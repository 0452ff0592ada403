"""FLARE's own parts for a job that does nothing, to be timed beside ours."""

from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor


class IdleExecutor(Executor):
    """Answers at once with an update of zeros."""

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        received = from_shareable(shareable).data
        return DXO(
            DataKind.WEIGHT_DIFF, data={n: np.zeros_like(v) for n, v in received.items()}
        ).to_shareable()


class IdlePersistor(ModelPersistor):
    """Starts from zeros and writes nothing."""

    def __init__(self, shapes: dict) -> None:
        super().__init__()
        self._shapes = shapes

    def load_model(self, fl_ctx: Any) -> ModelLearnable:
        return make_model_learnable({n: np.zeros(s, np.float32) for n, s in self._shapes.items()}, {})

    def save_model(self, model: ModelLearnable, fl_ctx: Any) -> None:
        return
