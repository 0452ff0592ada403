from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from histoflare.bags.model_file import FORMAT, load_model, save_model
from histoflare.bags.task import MemTask
from histoflare.errors import JobError

TASK = MemTask(["benign", "tumour"], "toy:1", features=6, memories=3, dim=4, hidden=8, seed=2)
MOSAIC = {"mpp": 0.5, "patch_px": 1000}
TRAINING = {"strategy": "fedavg", "rounds": 5, "seed": 0}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, TASK.build_model().state_dict(), TASK, mosaic=MOSAIC, training=TRAINING)
    return path


def rewrite(path: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor) -> None:
    state = {**safetensors.torch.load(path.read_bytes()), **tensors}
    path.write_bytes(safetensors.torch.save(state, metadata=metadata))


def header(**changes: Any) -> dict[str, str]:
    fields = {"format": FORMAT, "version": 1, "task": TASK.to_json(), **changes}
    return {FORMAT: json.dumps(fields)}


def test_what_goes_in_comes_out(written: Path) -> None:
    loaded = load_model(written)
    assert (loaded.task, loaded.mosaic, loaded.training) == (TASK, MOSAIC, TRAINING)
    model = TASK.build_model()
    assert list(loaded.state) == list(model.state_dict())
    bag = torch.randn(1, 5, 6)
    assert torch.equal(loaded.build_model()(bag), model(bag))
    assert not loaded.build_model().training


def test_anyone_can_open_it(written: Path) -> None:
    with safetensors.safe_open(written, framework="np") as opened:
        fields = json.loads(opened.metadata()[FORMAT])
        assert fields["encoder"] == "toy:1" and fields["task"]["labels"] == ["benign", "tumour"]
        assert set(opened.keys()) == set(TASK.build_model().state_dict())


def test_the_same_model_is_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    state = dict(reversed(TASK.build_model().state_dict().items()))
    save_model(again, state, TASK, mosaic=dict(reversed(MOSAIC.items())), training=TRAINING)
    assert again.read_bytes() == written.read_bytes()


def test_a_state_that_is_not_the_tasks_is_not_written(tmp_path: Path) -> None:
    state = TASK.build_model().state_dict()
    wrong = {
        "missing": {name: tensor for name, tensor in state.items() if name != "head.bias"},
        "shape": {**state, "head.bias": torch.zeros(3)},
        "extra": {**state, "extra": torch.zeros(1)},
        "nan": {**state, "head.bias": torch.full((2,), float("nan"))},
    }
    for name, bad in wrong.items():
        with pytest.raises(JobError, match=r"head\.bias|extra"):
            save_model(tmp_path / name, bad, TASK)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_model_say_why(written: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no model file") as caught:
        load_model(tmp_path / "absent")
    assert caught.value.reason == "MODEL_FILE_MISSING"
    whole = written.read_bytes()
    faults: list[tuple[Any, str]] = [
        (lambda: written.write_bytes(whole[: len(whole) // 2]), "damaged"),
        (lambda: written.write_bytes(b""), "damaged"),
        (lambda: written.write_text("not a model"), "damaged"),
        (lambda: rewrite(written, None), "not written by histoflare"),
        (lambda: rewrite(written, {FORMAT: "{"}), "not JSON"),
        (lambda: rewrite(written, header(version=2)), "version 2"),
        (lambda: rewrite(written, header(task=None)), "names no task"),
        (lambda: rewrite(written, header(mosaic=[1])), "no readable mosaic"),
        (lambda: rewrite(written, header(task={**TASK.to_json(), "hidden": 9})), "does not fit its task"),
        (lambda: rewrite(written, header(task={**TASK.to_json(), "memories": 0})), "memories"),
        (lambda: rewrite(written, header(), **{"head.bias": torch.zeros(3)}), "head.bias"),
    ]
    for spoil, words in faults:
        written.write_bytes(whole)
        spoil()
        with pytest.raises(JobError, match=words):
            load_model(written)
