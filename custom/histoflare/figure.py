"""One number that says how good a model is, with its interval, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; ``value`` is None for the ``reason`` given.

    Without an interval (None), ``no_interval`` says why, if one was asked for. ``patients``: how many are
    behind the part of it (the class) that the fewest are behind.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None
    patients: int = 0
    no_interval: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figure without what it has not (no NaN)."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        said = {} if self.no_interval is None else {"no_interval": self.no_interval}
        return {"value": self.value, "low": self.low, "high": self.high, **said}
