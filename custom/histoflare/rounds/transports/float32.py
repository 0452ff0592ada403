"""Updates as they are, in single precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare.rounds.state import State
from histoflare.rounds.transport import Transport


@dataclass(frozen=True)
class Float32(Transport):
    """Tensors are sent as they are."""

    name: ClassVar[str] = "float32"
    readable: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def pack(
        self, tensors: Mapping[str, torch.Tensor], weight: float = 1.0, step: float | None = None
    ) -> State:
        """Return the tensors themselves."""
        return dict(tensors)

    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors themselves."""
        return dict(tensors)


PLAIN = Float32()
"""The transport of a job that names none."""
