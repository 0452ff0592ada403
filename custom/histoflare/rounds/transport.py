"""How the numbers of an update are written for the way to the server.

A transport is one class and one line in :data:`TRANSPORTS`. What it does to the tensors comes after clip and
noise, so it can tell nothing more about the data (post-processing).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from histoflare.errors import JobError
from histoflare.rounds.state import State


class Transport(ABC):
    """Subclasses are frozen dataclasses of plain JSON-able fields, and declare two things without default.

    Attributes:
        name: As in a job's ``[transport]``.
        readable: Whether the server can read each site's update by itself. Where it cannot, it has only their
            sum, and the strategy must need no more than that (``Strategy.linear``).
        exact: Whether what arrives is what was sent, to the last bit.
    """

    name: ClassVar[str]
    readable: ClassVar[bool]
    exact: ClassVar[bool]

    @abstractmethod
    def pack(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """Return an update's tensors as they are sent."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors of an update that came, in the dtypes of ``like``."""


@dataclass(frozen=True)
class Float32(Transport):
    """Tensors are sent as they are."""

    name: ClassVar[str] = "float32"
    readable: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors themselves."""
        return dict(tensors)

    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors themselves."""
        return dict(tensors)


@dataclass(frozen=True)
class Float16(Transport):
    """float32 tensors are rounded to half precision, which halves what is sent; others stay as they are.

    What half precision cannot hold becomes the nearest that it can. Sums at the server are float64 as ever.
    """

    name: ClassVar[str] = "float16"
    readable: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors in half precision."""
        largest = torch.finfo(torch.float16).max
        return {
            name: tensor.clamp(-largest, largest).half() if tensor.dtype == torch.float32 else tensor
            for name, tensor in tensors.items()
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors in single precision again."""
        return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}


TRANSPORTS = {
    "float32": "histoflare.rounds.transport:Float32",
    "float16": "histoflare.rounds.transport:Float16",
}
"""Word in a job's ``[transport]`` → its class."""

PLAIN = Float32()
"""The transport of a job that names none."""


def check_readable(strategy: Any, transport: Transport) -> None:
    """Raise :class:`JobError` (TRANSPORT_UNFIT) if a strategy needs what a transport hides."""
    if not (transport.readable or strategy.linear):
        raise JobError(
            f"With the transport {transport.name} the server sees only the sum of the updates, and the "
            f"strategy {strategy.name} needs each of them: choose float32, or a strategy that is linear.",
            reason="TRANSPORT_UNFIT",
        )
