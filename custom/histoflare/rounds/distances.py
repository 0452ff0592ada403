"""Lengths and angles of updates, taken as one long vector each, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the inner product of two updates with the same names."""
    return math.fsum(float((tensor.double() * other[name].double()).sum()) for name, tensor in one.items())


def length(update: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of an update."""
    return math.sqrt(inner(update, update))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of the difference of two updates with the same names."""
    return length({name: tensor.double() - other[name].double() for name, tensor in one.items()})


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the cosine of the angle between two updates with the same names; 0 if one of them is 0."""
    lengths = length(one) * length(other)
    return inner(one, other) / lengths if lengths else 0.0
