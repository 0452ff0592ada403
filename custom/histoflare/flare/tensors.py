"""Model states on FLARE's wire: dictionaries of NumPy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def as_arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return a state, or what came over the wire, as arrays, without copies where it is on the CPU.

    FLARE delivers arrays or tensors, depending on the server's format: both are taken.
    """
    return {
        name: value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for name, value in values.items()
    }


def as_state(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return arrays or tensors that came over the wire as a state on the CPU, to be read only.

    Without copies: with 55 million parameters and four sites those would be a gigabyte a round.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {
            name: value.detach().cpu()
            if isinstance(value, torch.Tensor)
            else torch.from_numpy(np.asarray(value))
            for name, value in arrays.items()
        }


def apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` as tensors that lie in memory one by one, as safetensors wants them.

    Only what is not like that already is copied: a tensor that shares its memory with one before it, or whose
    rows do not follow each other.
    """
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        alone = place not in seen and tensor.is_contiguous()
        result[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return result


def tensor_bytes(message: Mapping[str, Any]) -> int:
    """Return the size of the tensors in a FLARE message with a DXO of weights, in bytes; 0 for any other."""
    try:
        data = message["DXO"]["data"]
    except (KeyError, TypeError):
        return 0
    return sum(int(value.nbytes) for value in data.values() if hasattr(value, "nbytes"))
