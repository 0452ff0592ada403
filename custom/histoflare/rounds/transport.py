"""How the numbers of an update are written for the way to the server.

A transport is one file in ``rounds/transports/`` and one line in its registry. What it does to the tensors
comes after clip and noise, so it can tell nothing more about the data (post-processing).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
    def pack(
        self, tensors: Mapping[str, torch.Tensor], weight: float = 1.0, step: float | None = None
    ) -> State:
        """Return an update's tensors as they are sent.

        Args:
            tensors: Of the update, as the privacy plan released them.
            weight: Of the update. A transport that hides it must send weight · update; others do not use it.
            step: The tensors are multiples of it (``PrivacyPlan.sum_step``); None: of nothing.

        Raises:
            JobError: A number cannot be written, and that may be told (UPDATE_OUT_OF_RANGE).
        """

    def form(self, like: Mapping[str, torch.Tensor]) -> State:
        """Return tensors of the names, shapes and dtypes in which an update like ``like`` is sent."""
        return self.pack(like)

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Return the tensors of an update that came, in the dtypes of ``like``."""

    def open(
        self, packed: Sequence[Mapping[str, torch.Tensor]], step: float | None = None
    ) -> tuple[State, float]:
        """Return the weighted sum (float64) and the sum of the weights of a round's updates as they came.

        Only where ``readable`` is False. Which order they come in must change no bit.

        Args:
            packed: What all sites of the round sent.
            step: As in :meth:`pack`.

        Raises:
            JobError: They do not belong together (SUM_VOID); or each is read by itself (TRANSPORT_UNFIT).
        """
        raise JobError(
            f"Updates under the transport {self.name} are read one by one, not as a sum.",
            reason="TRANSPORT_UNFIT",
        )


def check_readable(strategy: Any, transport: Transport) -> None:
    """Raise :class:`JobError` (TRANSPORT_UNFIT) if a strategy needs what a transport hides."""
    if transport.readable:
        return
    if strategy.numbers:
        raise JobError(
            f"With the transport {transport.name} a site sends nothing beside its term of the sum, and the "
            f"strategy {strategy.name} sends {', '.join(strategy.numbers)}: choose float32, or another "
            "strategy.",
            reason="TRANSPORT_UNFIT",
        )
    if strategy.topology.skips_sites:
        raise JobError(
            f"With the transport {transport.name} the sites of a round make one sum, and in the topology "
            f"{strategy.topology.name} they take turns: choose float32, or another strategy.",
            reason="TRANSPORT_UNFIT",
        )
    if not strategy.linear:
        raise JobError(
            f"With the transport {transport.name} the server sees only the sum of the updates, and the "
            f"strategy {strategy.name} needs each of them: choose float32, or a strategy that is linear.",
            reason="TRANSPORT_UNFIT",
        )
