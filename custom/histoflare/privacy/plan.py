"""What a site does to an update before anything else sees it.

A privacy plan is one named step between local training and the way out: :meth:`PrivacyPlan.release`. Every
runtime calls it through ``rounds.strategy.site_round``, so no strategy and no job can go round it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class PrivacyPlan(Protocol):
    """The step between local training and release."""

    @property
    def name(self) -> str:
        """Short name for logs and reports."""

    @property
    def epsilon(self) -> float:
        """The guarantee so far, ``math.inf`` if there is none. Derived from what was booked, never set."""

    def release(self, tensors: Mapping[str, Tensor], *, site: str, round_index: int) -> dict[str, Tensor]:
        """Return what may leave in place of ``tensors``: the same names, shapes and dtypes.

        Raises:
            HistoflareError: Nothing may leave (no budget, no reservation).
        """


class Open:
    """No protection: what was trained is what leaves.

    Guarantee: none. ε = ∞ before, during and after; nothing is booked.
    """

    name = "open"

    @property
    def epsilon(self) -> float:
        """Infinity."""
        return math.inf

    def release(self, tensors: Mapping[str, Tensor], *, site: str, round_index: int) -> dict[str, Tensor]:
        """Return the tensors as they are."""
        return dict(tensors)

    def describe(self) -> str:
        """Return one sentence for logs and reports."""
        return "Updates leave as they are: no clipping, no noise, nothing booked, ε = ∞."
