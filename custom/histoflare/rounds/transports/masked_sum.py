"""A secure sum: the server sees the sum of all sites' updates and no single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from histoflare.errors import JobError
from histoflare.privacy.secure_sum.ring import LIMIT, PLAIN_STEP, add_up, decode, encode
from histoflare.rounds.state import State
from histoflare.rounds.transport import Transport

WEIGHT = "sum/weight"
"""Beside the tensors: the update's weight, so that the server has the sum of all weights."""

CHECK = "sum/check"
"""Beside the tensors: a 1, so that the sum says how many vectors it is of. With a wrong pad it is random."""


@dataclass(frozen=True)
class MaskedSum(Transport):
    """Each site sends weight · update in fixed point (int64); the runtime adds pads that cancel in the sum.

    Twice the bytes of float32. A missing site voids the round. Without noise a number of weight · update
    beyond ±131,072 is refused at the site; with shared noise nothing is, as a refusal would tell of the data.
    See ``privacy.secure_sum`` for what the pads are, and docs/privacy.md for what a secure sum promises.

    >>> from histoflare import MaskedSum
    >>> MaskedSum().readable
    False
    """

    name: ClassVar[str] = "masked_sum"
    readable: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def pack(
        self, tensors: Mapping[str, torch.Tensor], weight: float = 1.0, step: float | None = None
    ) -> State:
        """Return the update's term of the sum, without pads.

        Raises:
            JobError: Without ``step``: a number has no room (UPDATE_OUT_OF_RANGE).
        """
        most = LIMIT if step is None else None
        packed = {
            name: encode(tensor, step or PLAIN_STEP, weight=weight, most=most)
            for name, tensor in tensors.items()
        }
        packed[WEIGHT] = encode(torch.tensor([weight], dtype=torch.float64), PLAIN_STEP, most=LIMIT)
        packed[CHECK] = torch.ones(1, dtype=torch.int64)
        return packed

    def form(self, like: Mapping[str, torch.Tensor]) -> State:
        """Return int64 tensors of the shapes of ``like`` and the two beside them, without memory."""
        shapes = {name: tensor.shape for name, tensor in like.items()}
        one = torch.Size([1])
        return {
            name: torch.empty(shape, dtype=torch.int64, device="meta")
            for name, shape in {**shapes, WEIGHT: one, CHECK: one}.items()
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> State:
        """Raise :class:`JobError`: a single site's numbers cannot be read."""
        raise JobError(
            "Under the transport masked_sum no single update can be read, only the sum of all.",
            reason="TRANSPORT_UNFIT",
        )

    def open(
        self, packed: Sequence[Mapping[str, torch.Tensor]], step: float | None = None
    ) -> tuple[State, float]:
        """Return Σ weight · update (float64) and Σ weight, of the terms of all sites with their pads.

        Raises:
            JobError: The pads did not cancel: a term is missing, or is of another round (SUM_VOID).
        """
        total = add_up(packed)
        if not packed or int(total.pop(CHECK)) != len(packed):
            raise JobError(
                "The secure sum of this round did not open: not all vectors in it are of the same list of "
                "sites, model and settings. The round is void.",
                reason="SUM_VOID",
            )
        weight = float(decode(total.pop(WEIGHT), PLAIN_STEP))
        return {name: decode(tensor, step or PLAIN_STEP) for name, tensor in total.items()}, weight
