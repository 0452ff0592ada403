"""What plain values of a file or a job must be: JSON's and TOML's types, and no boolean for a number."""

from __future__ import annotations

import math
import sys
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number, whole or not, and no boolean.

    A whole number beyond a float's range is none that can be computed with.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_above_zero(value: object, most: float = math.inf) -> TypeGuard[float]:
    """Return whether a value is a finite number above 0, and at most ``most``."""
    return is_number(value) and 0 < value <= most


def is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[int]:
    """Return whether a value is a whole number from ``least`` to ``most``, and no boolean."""
    return type(value) is int and least <= value <= most
