"""Several models that answer as one: the mean of their probabilities, whoever asks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from histoflare.bags.heatmap import BagAttention, relative_attention
from histoflare.bags.task import BagTask
from histoflare.ensemble import Ensemble, join_models, mean_probabilities, members_of, split_models
from histoflare.errors import JobError
from histoflare.masks.task import MaskTask
from histoflare.model_file import ENTRY, describe_model, read_model_file, read_model_header, save_model
from histoflare.rounds.local import load_model
from histoflare.rounds.state import State, hash_state, model_state

from .bags.throwaway_targets import Number
from .mem import make_mem_task

SMALL: dict[str, Any] = {"features": 6, "memories": 2, "dim": 3, "hidden": 4}
MEM_TASK = make_mem_task(["a", "b", "c"], "e:v1", **SMALL)
MASK_TASK = MaskTask(
    ["none", "some"],
    network="dhunet",
    width=24,
    patch_px=32,
    window_px=32,
    stride_px=32,
    local_epochs=None,
    local_steps=1,
)


def models_of(task: Any, count: int = 3) -> dict[str, State]:
    """Return models of a task that differ."""
    return {f"site_{i}": model_state(replace(task, seed=i).build_model()) for i in range(count)}


def test_the_softmax_of_an_ensemble_is_the_mean_of_its_members() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 4, 3), generator=generator)
    members = [nn.Conv1d(4, 2, 1) for _ in range(3)]
    expected = torch.stack([member(x).softmax(dim=1) for member in members]).mean(dim=0)
    for axis in (2, -2):
        asked = Ensemble(members, partial(mean_probabilities, class_axis=axis))
        torch.testing.assert_close(asked(x).softmax(dim=1), expected)


def test_numbers_are_averaged_as_numbers() -> None:
    task = make_mem_task(["share"], "e:v1", target=Number(("share",)), **SMALL)
    models, bag = models_of(task), torch.randn((7, 6))
    singly = [float(task.answer(load_model(task, each), bag).predicted) for each in models.values()]
    together = float(task.answer(load_model(task, join_models(models)), bag).predicted)
    assert together == pytest.approx(np.mean(singly), rel=1e-3)


def test_certain_members_that_disagree_leave_no_certainty_and_no_nan() -> None:
    class Certain(nn.Module):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.label = label

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(2)[[self.label]] * 1e4

    said = Ensemble([Certain(0), Certain(1)], partial(mean_probabilities, class_axis=-1))(
        torch.zeros(1)
    ).softmax(dim=-1)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.5]]))


def test_one_model_stays_as_it_is() -> None:
    state = model_state(MEM_TASK.build_model())
    assert (
        hash_state(join_models({"global": state})) == hash_state(state) == hash_state(split_models(state)[0])
    )
    assert type(load_model(MEM_TASK, state)) is type(MEM_TASK.build_model())
    assert "models" not in describe_model(MEM_TASK)


def test_a_file_holds_an_ensemble_and_is_read_like_any_other(tmp_path: Path) -> None:
    models, path = models_of(MEM_TASK), tmp_path / "model.safetensors"
    save_model(path, join_models(models), MEM_TASK)
    assert read_model_header(path).models == 3
    loaded = read_model_file(path, BagTask)
    assert [hash_state(each) for each in split_models(loaded.state)] == [
        hash_state(each) for each in models.values()
    ]
    asked, bag = loaded.build_model(), torch.randn((7, 6))
    members = [load_model(MEM_TASK, each) for each in models.values()]
    singly = [list(MEM_TASK.answer(member, bag).probabilities.values()) for member in members]
    together = list(MEM_TASK.answer(asked, bag).probabilities.values())
    np.testing.assert_allclose(together, np.mean(singly, axis=0), atol=1e-6)
    looks = [relative_attention(member, bag) for member in members]
    np.testing.assert_allclose(relative_attention(asked, bag), np.mean(looks, axis=0), atol=1e-6)
    added = [BagAttention(member, bag).added(bag[:2]) for member in members]
    np.testing.assert_allclose(BagAttention(asked, bag).added(bag[:2]), np.mean(added, axis=0), atol=1e-6)


def test_masks_are_averaged_pixel_by_pixel() -> None:
    models = models_of(MASK_TASK, 2)
    windows = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    singly = [
        MASK_TASK.window_probabilities(load_model(MASK_TASK, each), windows) for each in models.values()
    ]
    asked = load_model(MASK_TASK, join_models(models))
    assert len(members_of(asked)) == 2 and not asked.training
    np.testing.assert_allclose(
        MASK_TASK.window_probabilities(asked, windows), np.mean(singly, axis=0), atol=1e-6
    )


@pytest.mark.parametrize("fault", ["fewer", "more", "tensor", "shape", "nan", "count"])
def test_a_file_that_is_not_the_ensemble_it_says_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, join_models(models_of(MEM_TASK)), MEM_TASK)
    tensors = load_file(path)
    header = json.loads(read_metadata(path))
    name = "member/site_1/head.bias"
    match fault:
        case "fewer":
            tensors = {n: t for n, t in tensors.items() if not n.startswith("member/site_1/")}
        case "more":
            tensors |= {n.replace("site_1", "site_3"): t for n, t in tensors.items() if "site_1" in n}
        case "tensor":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:1]
        case "nan":
            tensors[name] = tensors[name] * torch.nan
        case "count":
            header["models"] = 0
    save_file({n: t.clone() for n, t in tensors.items()}, path, metadata={ENTRY: json.dumps(header)})
    with pytest.raises(JobError) as caught:
        read_model_file(path, BagTask)
    assert caught.value.reason == "MODEL_FILE_INVALID"


def read_metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text: str = file.metadata()[ENTRY]
    return text
