"""Model states on FLARE's wire: dictionaries of NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def to_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Return ``state`` as arrays that own their memory (FLARE may hold them longer than we hold ours)."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def to_state(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return arrays or tensors that came over the wire as a state on the CPU.

    FLARE delivers arrays or tensors, depending on the server's format: both are taken.
    """
    return {
        name: value.detach().cpu().clone()
        if isinstance(value, torch.Tensor)
        else torch.from_numpy(np.array(value))
        for name, value in arrays.items()
    }
