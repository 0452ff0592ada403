"""The engines that a step of DP-SGD is timed beside compute what they are timed for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from histoflare.privacy.gradients import HEADROOM

from ..privacy.models import mem_task, only, patients
from ..privacy.test_gradients import RAGGED, by_definition, difference, length, weighted_sums
from .gradient_engines import ENGINES, sum_of_clipped_gradients


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"blocks": 2},
        {"reconstruction": 0.5},
        {"blocks": 2, "reconstruction": 0.3, "input_norm": "rms"},
    ],
)
def test_every_engine_is_the_definition_on_mem(engine: str, fields: dict[str, Any]) -> None:
    task = mem_task(**fields)
    model, batch = task.build_model(), patients(RAGGED)
    singles = [only(batch, [p]) for p in range(len(RAGGED))]
    _, norms = by_definition(model, task.record_losses, singles, 1.0)
    clip_norm = sorted(norms)[1] * 1.05  # two of the four are clipped
    expected, _ = by_definition(model, task.record_losses, singles, clip_norm)
    got = sum_of_clipped_gradients(model, task.record_losses, batch, clip_norm, engine)
    torch.testing.assert_close(got.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert list(got.tensors) == [name for name, _ in model.named_parameters()]
    # The engines clip a little below the clip norm, by HEADROOM.
    assert length(difference(got.tensors, expected)) < 2 * HEADROOM * 2 * clip_norm
    torch.testing.assert_close(got.losses, task.record_losses(model, batch).detach())
    assert not any(tensor.requires_grad for tensor in (*got.tensors.values(), got.norms, got.losses))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [RAGGED, [[40, 30], [1]], [[3]], [[1], [1]]])
def test_the_engines_agree_to_rounding(engine: str, sizes: list[list[int]]) -> None:
    task = mem_task(reconstruction=0.1)
    model, batch = task.build_model(), patients(sizes)
    oracle = sum_of_clipped_gradients(model, task.record_losses, batch, 0.3, "microbatch")
    got = sum_of_clipped_gradients(model, task.record_losses, batch, 0.3, engine)
    assert length(difference(got.tensors, oracle.tensors)) < 1e-5 * length(oracle.tensors)


def test_that_is_why_a_job_may_not_name_ghost() -> None:
    batch = torch.full((1, 2, 40), 1e17), torch.tensor([[1e-25, 1e-25]])
    got = sum_of_clipped_gradients(nn.Linear(40, 40, bias=False), weighted_sums, batch, 1e-20, "ghost")
    assert got.norms.tolist() == [0.0] and length(got.tensors) > 1e10 * 1e-20
