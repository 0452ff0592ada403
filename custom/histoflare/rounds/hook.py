"""What a strategy changes in local training, from step to step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LocalHook:
    """Is called at every optimizer step of local training. A method that is not overridden does nothing.

    Under DP-SGD only :meth:`gradient` and :meth:`after_step` are called, after the clip and the noise of the
    step: what they use must not depend on this site's data but through what was released. A strategy whose
    hook looks at data says so (``Strategy.sees_data``), and is refused there.
    """

    def loss(self, model: nn.Module, batch: Any, loss: Tensor) -> Tensor:
        """Return the loss of a step.

        Args:
            model: The model in training.
            batch: The batch of the step, as the task makes it.
            loss: The task's own loss of it, a scalar.
        """
        return loss

    def gradient(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return what is added to the gradient of one parameter; None adds nothing.

        Args:
            name: Of the parameter, as in the model's state.
            parameter: Its value before the step.
        """
        return None

    def after_step(self, model: nn.Module) -> None:
        """Look at the model, or change it, after a step."""
