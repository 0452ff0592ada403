from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from histoflare.masks.losses import cross_entropy_and_dice, segmentation_loss

SMOOTH = 1e-5
IGNORE = 255


def drawn(
    seed: int, classes: int = 3, batch: int = 2, h: int = 4, w: int = 5, ignored: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits (b, k, h, w) and a mask (b, h, w) of which a share is not annotated."""
    random = np.random.default_rng(seed)
    logits = 2 * random.standard_normal((batch, classes, h, w))
    mask = random.integers(0, classes, (batch, h, w))
    mask[random.random(mask.shape) < ignored] = IGNORE
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(mask, dtype=torch.uint8)


def oracle(logits: NDArray[np.float64], mask: NDArray[np.int64]) -> float:
    """The formula, over a list of the batch's annotated pixels."""
    classes = logits.shape[1]
    pixels = np.moveaxis(logits, 1, -1).reshape(-1, classes)
    labels = mask.reshape(-1)
    pixels, labels = pixels[labels != IGNORE], labels[labels != IGNORE]
    if len(labels) == 0:
        return 0.0
    p = np.exp(pixels - pixels.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    y = np.eye(classes)[labels]
    cross_entropy = -np.log(p[np.arange(len(labels)), labels]).mean()
    overlap = (2 * (p * y).sum(axis=0) + SMOOTH) / ((p**2).sum(axis=0) + (y**2).sum(axis=0) + SMOOTH)
    return float(0.5 * cross_entropy + 0.5 * (1 - overlap).mean())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 5),
    batch=st.integers(1, 3),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_loss_is_the_formula_over_the_annotated_pixels(
    seed: int, classes: int, batch: int, ignored: float
) -> None:
    logits, mask = drawn(seed, classes, batch, ignored=ignored)
    found = float(cross_entropy_and_dice(logits, mask))
    assert found == pytest.approx(oracle(logits.double().numpy(), mask.long().numpy()), rel=1e-5, abs=1e-6)


def test_uniform_logits_on_one_class_of_four() -> None:
    # p = 1/4 everywhere, n = 12 pixels of class 0. CE = ln 4. Dice: class 0 has 2·3 / (12/16 + 12), the
    # others (0 + s) / (12/16 + s).
    logits, mask = torch.zeros(1, 4, 3, 4), torch.zeros(1, 3, 4, dtype=torch.uint8)
    dice = [1 - (6 + SMOOTH) / (12.75 + SMOOTH)] + 3 * [1 - SMOOTH / (0.75 + SMOOTH)]
    expected = 0.5 * math.log(4) + 0.5 * sum(dice) / 4
    assert float(cross_entropy_and_dice(logits, mask)) == pytest.approx(expected, rel=1e-6)


def test_a_certain_right_answer_costs_nothing_and_a_wrong_one_much() -> None:
    mask = torch.tensor([[[0, 1, 2, IGNORE]]], dtype=torch.uint8)
    right = torch.full((1, 3, 1, 4), -50.0)
    for x, label in enumerate((0, 1, 2, 0)):
        right[0, label, 0, x] = 50.0
    assert float(cross_entropy_and_dice(right, mask)) == pytest.approx(0.0, abs=1e-6)
    wrong = right.roll(1, dims=1)
    assert float(cross_entropy_and_dice(wrong, mask)) == pytest.approx(0.5 * 100 + 0.5, rel=1e-4)


def test_dice_is_taken_over_the_batch_and_not_per_image() -> None:
    logits, mask = drawn(1, ignored=0.0)
    per_image = [float(cross_entropy_and_dice(logits[i : i + 1], mask[i : i + 1])) for i in range(2)]
    together = float(cross_entropy_and_dice(logits, mask))
    assert together != pytest.approx(sum(per_image) / 2, abs=1e-4)
    tall = (logits.transpose(0, 1).reshape(1, 3, 8, 5), mask.reshape(1, 8, 5))
    assert together == pytest.approx(float(cross_entropy_and_dice(*tall)), rel=1e-5)


def test_what_is_not_annotated_has_no_gradient_and_no_part_in_the_value() -> None:
    logits, mask = drawn(2)
    logits.requires_grad_()
    loss = cross_entropy_and_dice(logits, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    left_out = (mask == IGNORE)[:, None].expand_as(gradient)
    assert left_out.any() and torch.equal(gradient[left_out], torch.zeros(int(left_out.sum())))
    assert gradient[~left_out].abs().min() > 0
    other = torch.where(left_out, 7.0, logits.detach())
    assert float(cross_entropy_and_dice(other, mask)) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_gradient_is_the_difference_quotient_of_the_formula() -> None:
    logits, mask = drawn(3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy_and_dice(logits, mask), logits)
    at, labels, step = logits.detach().double().numpy(), mask.long().numpy(), 1e-5
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        slope = (oracle(up, labels) - oracle(down, labels)) / (2 * step)
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_without_an_annotated_pixel_loss_and_gradient_are_zero() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    loss = segmentation_loss([logits, 2 * logits], mask, (0.5, 0.5))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_mask_may_be_of_any_integer_type() -> None:
    logits, mask = drawn(4)
    values = {float(cross_entropy_and_dice(logits, mask.to(kind))) for kind in (torch.uint8, torch.int64)}
    assert len(values) == 1


def test_outputs_are_weighted() -> None:
    first, mask = drawn(5)
    second, _ = drawn(6)
    third, _ = drawn(7)
    labels = mask.long().numpy()
    parts = [oracle(each.double().numpy(), labels) for each in (first, second, third)]
    expected = 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2]
    found = float(segmentation_loss([first, second, third], mask, (0.5, 0.3, 0.2)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_outputs_and_weights_must_be_as_many() -> None:
    logits, mask = drawn(8)
    with pytest.raises(ValueError, match="zip"):
        segmentation_loss([logits], mask, (0.5, 0.3, 0.2))
