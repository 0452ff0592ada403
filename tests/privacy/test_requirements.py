"""Which models can be trained under DP-SGD, beside what Opacus says of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from histoflare.errors import JobError
from histoflare.privacy.requirements import check_model
from tests.refusals import raises_reason

from .models import convolutional, mem_task


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2)),
    "mem": lambda: mem_task(reconstruction=0.1, blocks=2).build_model(),
    "group norm": convolutional,
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
    "instance norm": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2, affine=True)),
    "instance norm with statistics": lambda: nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "batch norm 2d": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "synchronised batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)),
    "embedding": lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)),
    "lstm": lambda: nn.LSTM(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}
TAKEN = {"linear", "mem", "group norm", "layer norm", "instance norm", "embedding", "lstm", "attention"}


def is_taken(model: nn.Module) -> bool:
    try:
        check_model(model)
    except JobError as error:
        assert error.reason == "MODEL_NOT_PRIVATE"
        return False
    return True


def test_what_is_taken() -> None:
    assert {name for name, make in MODELS.items() if is_taken(make())} == TAKEN


def test_nothing_is_taken_that_opacus_refuses_but_what_has_no_samples_there() -> None:
    from opacus.validators import ModuleValidator

    valid = {name for name, make in MODELS.items() if ModuleValidator.is_valid(make())}
    # One backward pass for each record is right for any layer that does not mix them.
    assert valid <= TAKEN and TAKEN - valid == {"lstm", "attention"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (MODELS["batch norm"], "1 (BatchNorm1d) "),
        (MODELS["instance norm with statistics"], "track_running_stats=False"),
        (lambda: nn.Linear(3, 2).requires_grad_(False), "parameter"),
        (lambda: nn.Linear(3, 2).to(torch.bfloat16), "weight is torch.bfloat16"),
        (lambda: nn.Linear(3, 2).to(torch.complex64), "weight is torch.complex64"),
        (lambda: nn.LazyLinear(2), "weight "),
    ],
)
def test_the_reason_is_said(make: Callable[[], nn.Module], says: str) -> None:
    with raises_reason("MODEL_NOT_PRIVATE", says):
        check_model(make())


def test_every_reason_is_said_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, dtype=torch.bfloat16))
    with raises_reason("MODEL_NOT_PRIVATE", "BatchNorm1d", "2.weight"):
        check_model(model)


def test_frozen_layers_of_any_kind_and_tied_parameters_are_taken() -> None:
    check_model(nn.Sequential(nn.Conv1d(1, 2, 3).requires_grad_(False), nn.Linear(4, 2)))
    check_model(tied())
