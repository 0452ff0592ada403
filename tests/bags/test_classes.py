"""Classes whose shares are known beforehand: the logit-adjusted loss, against its closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.targets.classes import Classes
from histoflare.bags.task import BagTask
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import try_variant
from histoflare.privacy.protocol import hash_protocol
from tests.refusals import raises_reason

LABELS = ("a", "b", "c")
SHARES = (0.7, 0.2, 0.1)
positive = st.floats(1e-3, 1e3)
logits = st.floats(-20, 20)


def loss_of(outputs: list[float], value: int, shares: tuple[float, ...] | None) -> float:
    target = Classes(LABELS, shares)
    found = target.losses(torch.tensor([outputs], dtype=torch.float64), torch.tensor([value]))
    return float(found[0])


@given(st.tuples(logits, logits, logits), st.tuples(positive, positive, positive), st.integers(0, 2))
def test_the_loss_is_menons_equation_ten(
    outputs: tuple[float, float, float], shares: tuple[float, float, float], value: int
) -> None:
    """log(1 + Σ over other classes y' of (π_y' / π_y) exp(f_y' - f_y)), τ = 1."""
    others = [
        shares[k] / shares[value] * math.exp(outputs[k] - outputs[value]) for k in range(3) if k != value
    ]
    expected = math.log1p(sum(others))
    assert loss_of(list(outputs), value, shares) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.tuples(logits, logits, logits), st.floats(1e-3, 1e3), st.integers(0, 2))
def test_only_the_proportion_counts_and_equal_shares_change_nothing(
    outputs: tuple[float, float, float], times: float, value: int
) -> None:
    scaled = tuple(times * share for share in SHARES)
    assert loss_of(list(outputs), value, scaled) == pytest.approx(
        loss_of(list(outputs), value, SHARES), rel=1e-9, abs=1e-9
    )
    assert loss_of(list(outputs), value, (times, times, times)) == pytest.approx(
        loss_of(list(outputs), value, None), rel=1e-9, abs=1e-9
    )


def test_how_common_a_class_is_need_not_be_learned() -> None:
    """Of patients in these shares the loss is flat where all answers are equal, as it is of equal classes."""
    for shares, level in ((SHARES, True), (None, False)):
        outputs = torch.zeros((10, 3), requires_grad=True)
        values = torch.tensor([0] * 7 + [1] * 2 + [2])
        Classes(LABELS, shares).losses(outputs, values).sum().backward()
        assert outputs.grad is not None
        assert bool((outputs.grad.sum(dim=0).abs() < 1e-5).all()) is level


def test_what_is_learned_is_the_answer_for_equal_classes() -> None:
    """The best model of x with 80 : 20 is log p(x | class) up to a constant: Bayes with equal priors."""
    likelihood = np.array([[0.6, 0.4], [0.3, 0.7]])  # of class (rows) and what a patient shows (columns)
    joint = torch.tensor(np.array([[0.8], [0.2]]) * likelihood)
    outputs = torch.zeros((2, 2), dtype=torch.float64, requires_grad=True)  # (shown, class)
    target = Classes(("a", "b"), (0.8, 0.2))
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.stack(
            [target.losses(outputs, torch.full((2,), c)) for c in range(2)]
        )  # (class, shown)
        total: torch.Tensor = (joint * losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    expected = likelihood / likelihood.sum(axis=0)
    found = F.softmax(outputs.detach(), dim=1).T.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert target.answer(outputs.detach()[1].numpy()).predicted == "b", "though more who show it are of a"


@pytest.mark.parametrize(
    "shares", [[0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, math.nan], [1, 1, 1e7], "abc", 0.5, [True, 1, 1], []]
)
def test_shares_of_no_sense_are_refused(shares: object) -> None:
    with raises_reason("JOB_INVALID", "target.class_shares"):
        task({"name": "classes", "class_shares": shares})


def task(target: object) -> BagTask:
    return BagTask(LABELS, "toy:1", LinearSettings(), target, features=6)  # type: ignore[arg-type]


def test_a_task_with_shares_is_json_and_another_task() -> None:
    with_shares = task({"name": "classes", "class_shares": list(SHARES)})
    assert BagTask.from_json(json.loads(json.dumps(with_shares.to_json()))) == with_shares
    assert with_shares != task({"name": "classes"}) == replace(with_shares, target=Classes())
    assert "target" not in task({"name": "classes"}).to_json()
    assert torch.equal(
        task({"name": "classes"}).build_model().state_dict()["head.weight"],
        with_shares.build_model().state_dict()["head.weight"],
    )


def test_a_consortium_agrees_on_them_in_its_protocol() -> None:
    folder = Path(__file__).parents[2] / "jobs" / "linear_shared"
    said = {"protocol.target.name": "classes", "protocol.target.class_shares": [0.8, 0.2]}
    job = try_variant(folder, said)
    assert job.task.target.class_shares == (0.8, 0.2)
    assert hash_protocol(job.protocol) != hash_protocol(read_job(folder).protocol)
