"""What a model on bags is, and what it declares.

A model is one file here and one line in ``MODELS``: a frozen dataclass of its settings
(:class:`ModelSettings`) and the network that they make (:class:`BagModel`). Everything else (training,
DP-SGD, model files, heat maps, pages) asks for nothing but what is written here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Attended:
    """What a model makes of a batch of bags; ``...`` is the batch's leading axes, (b) or (patients, slides).

    Attributes:
        outputs: (..., k), as many as the task's target wants; without a last softmax or the like.
        attention: (..., h, n), h >= 1 kinds of attention to the patches, each >= 0 and summing to 1 over the
            bag's patches; 0 on padding, and all 0 for a bag without a patch.
        auxiliary: (...), what a bag's loss has besides the target's, already weighted; None: nothing.
    """

    outputs: Tensor
    attention: Tensor
    auxiliary: Tensor | None = None


class BagModel(nn.Module, ABC):
    """A network on bags. What it says depends neither on the order of the patches nor on the padding.

    A bag without a patch gives a finite answer. Under DP-SGD x is (patients, slides, n, f), and a patient is
    one sample.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the outputs (..., k); arguments as of :meth:`attend`."""
        return self.attend(x, mask).outputs

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Attended:
        """Return outputs, attention and auxiliary loss.

        Args:
            x: Features (..., n, f). Whatever the padding holds, NaN included, makes no difference.
            mask: (..., n) bool, True where there is a patch; None: everywhere.
        """
        if mask is None:
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return self._attend(x.masked_fill(~mask[..., None], 0.0), mask)

    @abstractmethod
    def _attend(self, x: Tensor, mask: Tensor) -> Attended:
        """Return the same of features that are 0 where the mask is False."""

    def attend_added(self, bag: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that says how much is attended to a patch if it alone is added to a bag.

        The function takes patches (b, f) and returns (b,): the mean over the kinds of attention, times the
        n + 1 patches of the larger bag, so that 1 is its average patch. This one asks the model once for each
        patch; a model that knows a shorter way has its own.

        Args:
            bag: (n, f), on the model's device.
        """

        def added(patches: Tensor) -> Tensor:
            bags = (torch.cat([bag, patch[None]])[None] for patch in patches)  # (1, n + 1, f)
            last = [self.attend(larger).attention[0, :, -1].double().mean() for larger in bags]
            return torch.stack(last) * (len(bag) + 1)

        return added


@dataclass(frozen=True)
class ModelSettings(ABC):
    """A model's own settings, plain numbers and words, in the table ``[task.model]`` of a job.

    Attributes:
        name: What a job, a policy and a model file call the model.
        sample_mixing: Whether what it says of one bag depends on the others of the batch, in training or by
            statistics that it keeps (BatchNorm): DP-SGD refuses such a model, and one that declares nothing.
    """

    name: ClassVar[str]
    sample_mixing: ClassVar[bool]

    @abstractmethod
    def problems(self, features: int) -> list[str]:
        """Return what is out of range (see ``histoflare.ranges``), for feature vectors of this length."""

    @abstractmethod
    def build(self, features: int, outputs: int) -> BagModel:
        """Return the network; its initial weights come from PyTorch's global generator.

        Args:
            features: f, length of a patch's feature vector.
            outputs: k, how many numbers the target wants of a bag.
        """
