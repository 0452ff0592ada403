"""Updates in half precision: half of what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare.rounds.state import State
from histoflare.rounds.transport import Transport


@dataclass(frozen=True)
class Float16(Transport):
    """float32 tensors are rounded to half precision, which halves what is sent; others stay as they are.

    What half precision cannot hold becomes the nearest that it can. Sums at the server are float64 as ever.
    """

    name: ClassVar[str] = "float16"
    readable: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def pack(
        self, tensors: Mapping[str, torch.Tensor], weight: float = 1.0, step: float | None = None
    ) -> State:
        """Return the tensors in half precision."""
        largest = torch.finfo(torch.float16).max
        return {
            name: tensor.clamp(-largest, largest).half() if tensor.dtype == torch.float32 else tensor
            for name, tensor in tensors.items()
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors in single precision again."""
        return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}
