"""States on their way to disk and wire: no copies but where one is needed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from histoflare.flare.persistor import read_state
from histoflare.flare.tensors import apart, as_arrays, as_state


def test_what_shares_memory_or_is_turned_is_copied_and_nothing_else(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    state = {
        "whole": whole,
        "again": whole,
        "part": whole[1],
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.zeros(0),
        "nothing": torch.zeros(0),
    }
    found = apart(state)
    assert found["whole"] is whole
    assert len({tensor.data_ptr() for tensor in found.values() if tensor.numel()}) == 4
    save_file(found, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_a_model_that_was_read_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    state = read_state(path, like={"w": torch.zeros(1000)})
    content = path.read_bytes()
    with path.open("r+b") as file:  # the same file, not another in its place
        file.write(content[:-4000] + b"\0" * 4000)
    assert state["w"].sum() == 1000


def test_arrays_and_states_are_the_same_memory() -> None:
    state = {"w": torch.zeros(3)}
    arrays = as_arrays(state)
    arrays["w"][0] = 1.0
    assert state["w"][0] == 1.0
    assert as_state(arrays)["w"].data_ptr() == state["w"].data_ptr()
