"""How the numbers of an update are written for the way to the server.

A transport is one file in ``rounds/transports/`` and one line in its registry. What it does to the tensors
comes after clip and noise, so it can tell nothing more about the data (post-processing).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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


def check_readable(strategy: Any, transport: Transport) -> None:
    """Raise :class:`JobError` (TRANSPORT_UNFIT) if a strategy needs what a transport hides."""
    if not (transport.readable or strategy.linear):
        raise JobError(
            f"With the transport {transport.name} the server sees only the sum of the updates, and the "
            f"strategy {strategy.name} needs each of them: choose float32, or a strategy that is linear.",
            reason="TRANSPORT_UNFIT",
        )
