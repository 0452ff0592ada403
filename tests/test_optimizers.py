"""PyTorch's optimizers without its compiler: the same bytes, and none of its imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from histoflare import optimizers


def weights_after(kind: type[torch.optim.Optimizer], **settings: Any) -> list[Tensor]:
    """Return all weights after 30 steps of a falling learning rate; one layer has none to learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 2).requires_grad_(False))
    optimizer = kind(model.parameters(), **settings)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(30):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
        rate.step()
    assert all(weight.grad is not None for weight in model[0].parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(weight.grad is None for weight in model.parameters())
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
        ("Adam", {"lr": 0.01}),
        ("Adam", {"lr": 0.01, "weight_decay": 1e-3}),
    ],
)
def test_they_end_with_the_bytes_of_pytorch(name: str, settings: dict[str, Any]) -> None:
    found = weights_after(getattr(optimizers, name), **settings)
    expected = weights_after(getattr(torch.optim, name), **settings)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], weights_after(getattr(optimizers, name), lr=0.02)[0])


def test_a_trainers_steps_import_no_compiler() -> None:
    """It would cost each trainer's process a second."""
    code = """
import sys, torch
from dataclasses import replace
from histoflare.flare.job import read_job
from histoflare.shipped import JOBS
task = read_job(JOBS / "mem_fedavg").task
for name in ("sgd", "adam"):
    model = task.build_model()
    optimizer = replace(task, optimizer=name).build_optimizer(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad()
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
