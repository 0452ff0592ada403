from __future__ import annotations

import pytest
import torch
from torch import nn

from histoflare.errors import JobError
from histoflare.rounds.state import (
    add,
    add_weighted_mean,
    check_tensors,
    hash_state,
    is_finite,
    load_state,
    model_state,
    n_bytes,
    shared_names,
    subtract,
)
from tests.refusals import raises_reason


def test_model_state_is_a_copy_in_state_dict_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model_state(model)
    assert list(state) == list(model.state_dict())
    before = hash_state(state)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert hash_state(state) == before


def test_shared_names_leave_integers_out_and_end_at_a_module() -> None:
    state = {
        "head.weight": torch.zeros(2),
        "header.weight": torch.zeros(2),
        "head.norm.num_batches_tracked": torch.tensor(3),
        "bias": torch.zeros(1),
    }
    assert shared_names(state, None) == ["head.weight", "header.weight", "bias"]
    assert shared_names(state, ["head"]) == ["head.weight"]
    assert shared_names(state, ["head.", "bias"]) == ["head.weight", "bias"]
    assert shared_names(state, "header") == ["header.weight"]


@pytest.mark.parametrize("share", [["hea"], ["head", "tail"], [], ["head.norm"]])
def test_a_prefix_that_shares_nothing_is_refused(share: list[str]) -> None:
    state = {"head.weight": torch.zeros(2), "head.norm.num_batches_tracked": torch.tensor(3)}
    with raises_reason("SHARE_INVALID", "share = ", ": head."):
        shared_names(state, share)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"a": torch.zeros(2)}, [" b "]),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, [" c "]),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, [" a ", "(3,)", "(2,)"]),
        (
            {"a": torch.zeros(2), "b": torch.zeros(1, dtype=torch.float64)},
            [" b ", torch.float64, torch.float32],
        ),
        ({"a": torch.tensor([0.0, float("nan")]), "b": torch.zeros(1)}, [" a ", "NaN"]),
        ({"a": torch.tensor([0.0, float("inf")]), "b": torch.zeros(1)}, [" a ", "NaN"]),
    ],
)
def test_check_tensors_names_the_fault(bad: dict[str, torch.Tensor], says: list[object]) -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with raises_reason("STATE_INVALID", "update of s ", *says):
        check_tensors(bad, like, whose="The update of s")
    with pytest.raises(JobError):
        load_state(nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(1)}), bad)


def test_is_finite_sees_one_bad_value_and_forgives_a_sum_that_overflows() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.zeros(1000)
        tensor[700] = bad
        assert not is_finite(tensor)
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
    assert is_finite(torch.full((10,), torch.finfo(torch.float32).max))
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor(3))


def test_weighted_mean_adds_in_float64() -> None:
    # In float32, 1e8 + 1 - 1e8 is 0.
    updates = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    start = {"w": torch.zeros(1, dtype=torch.float64), "count": torch.tensor(7)}
    mean = add_weighted_mean(start, updates, [1.0, 1.0, 1.0])
    assert mean["w"].dtype == torch.float64
    assert mean["w"].item() == 1 / 3
    assert mean["count"].item() == 7 and mean["count"] is not start["count"]


@pytest.mark.parametrize(
    "weights", [[0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [float("nan"), 1.0], [float("inf"), 1]]
)
def test_weights_that_cannot_average_are_refused(weights: list[float]) -> None:
    with raises_reason("WEIGHTS_INVALID", weights):
        add_weighted_mean({"w": torch.zeros(1)}, [{"w": torch.zeros(1)}] * 2, weights)


def test_no_update_is_refused() -> None:
    with pytest.raises(JobError):
        add_weighted_mean({"w": torch.zeros(1)}, [], [])


def test_add_keeps_dtypes_and_what_does_not_change() -> None:
    state = {
        "w": torch.tensor([1.0]),
        "half": torch.tensor([1.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
    }
    moved = add(state, {"w": torch.tensor([0.5], dtype=torch.float64), "half": torch.tensor([0.25])})
    assert [tensor.dtype for tensor in moved.values()] == [torch.float32, torch.bfloat16, torch.int64]
    assert (moved["w"].item(), moved["half"].item(), moved["count"].item()) == (1.5, 1.25, 7)


def test_subtract_then_add_gives_the_local_model_back() -> None:
    generator = torch.Generator().manual_seed(1)
    start = {"w": torch.randn(1000, generator=generator)}
    local = {"w": start["w"] + 0.01 * torch.randn(1000, generator=generator)}
    again = add(start, subtract(local, start, ["w"]))
    torch.testing.assert_close(again["w"], local["w"], rtol=2**-23, atol=2**-30)


def test_digest_sees_bytes_names_shapes_and_dtypes() -> None:
    states = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.zeros(1, 2)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.tensor([0.0, -0.0])},
    ]
    assert len({hash_state(state) for state in states}) == len(states)
    assert hash_state({"a": torch.tensor(1.0)}) == hash_state({"a": torch.tensor(1.0)})
    assert n_bytes({"a": torch.zeros(3), "b": torch.tensor(1)}) == 20
