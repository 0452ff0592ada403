from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from histoflare.masks.networks.fusion import (
    CrossScaleExpand,
    GLFusion,
    expand_four_times,
    expand_twice,
)


def maps(width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn((2, 2**stage * width, 32 // 2**stage, 16 // 2**stage), generator=generator)
        for stage in range(4)
    ]


def support(expand: CrossScaleExpand, side: int) -> list[tuple[int, int, int, int]]:
    """(first row, last row, first column, last column) that one pixel reaches, for each channel out."""
    for branch in expand.branches:
        assert isinstance(branch, nn.ConvTranspose2d) and branch.bias is not None
        nn.init.ones_(branch.weight)
        nn.init.zeros_(branch.bias)
    channels = expand.norm.num_features
    x = torch.zeros(1, channels, side, side)  # type: ignore[arg-type]
    x[:, :, side // 2, side // 2] = 1.0
    with torch.no_grad():
        out = expand.eval()(x)[0]
    reached = []
    for channel in out:
        rows, columns = channel.abs().sum(dim=1).nonzero(), channel.abs().sum(dim=0).nonzero()
        reached.append((int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])))
    return reached


def test_the_doubling_has_kernels_of_2_and_4() -> None:
    # Pixel i reaches 2i - p to 2i - p + k - 1: k 2 and p 0, k 4 and p 1, a quarter of the channels each.
    assert support(expand_twice(48, "batch"), 8) == [(8, 9, 8, 9)] * 12 + [(7, 10, 7, 10)] * 12


def test_the_last_enlargement_has_kernels_of_4_to_32() -> None:
    # Pixel i reaches 4i - p to 4i - p + k - 1 with p 0, 2, 6, 14; 1/2, 1/4, 1/8, 1/8 of the channels.
    i = 4 * 8
    assert support(expand_four_times(24, "batch"), 16) == (
        [(i, i + 3, i, i + 3)] * 12
        + [(i - 2, i + 5, i - 2, i + 5)] * 6
        + [(i - 6, i + 9, i - 6, i + 9)] * 3
        + [(i - 14, i + 17, i - 14, i + 17)] * 3
    )


def test_stages_double_to_a_quarter_and_then_reach_the_whole() -> None:
    fused = GLFusion(24, "group")(maps(24, 0), maps(24, 1))
    assert [tuple(each.shape[1:]) for each in fused] == [
        (96, 8, 4),
        (48, 16, 8),
        (24, 32, 16),
        (24, 128, 64),
    ]


def test_only_the_sum_of_both_encoders_counts() -> None:
    fusion = GLFusion(24, "group")
    one, two = maps(24, 0), maps(24, 1)
    added = [first + second for first, second in zip(one, two, strict=True)]
    nothing = [torch.zeros_like(each) for each in added]
    for found, expected in zip(fusion(one, two), fusion(nothing, added), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stage", range(4))
def test_a_map_reaches_its_stage_and_the_finer_ones(stage: int) -> None:
    fusion = GLFusion(24, "group")
    before = fusion(maps(24, 0), maps(24, 1))
    changed = maps(24, 0)
    changed[stage] = changed[stage] + 1.0 + torch.rand_like(changed[stage])
    after = fusion(changed, maps(24, 1))
    same = [torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert same == [coarseness < 3 - stage for coarseness in range(4)]


def test_a_convolution_and_its_norm_come_before_the_rectifier() -> None:
    stage = GLFusion(24, "batch").eval().stages[0]
    x = torch.randn(1, 192, 4, 4)
    with torch.no_grad():
        # numpy-like by hand: 3x3 cross-correlation with zeros around, evaluation norm, max(0, ·)
        padded = torch.zeros(1, 192, 6, 6)
        padded[:, :, 1:5, 1:5] = x
        patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (1, 192, 4, 4, 3, 3)
        conv = torch.einsum("bchwij,ocij->bohw", patches, stage.conv.weight)
        expected = stage.expand(torch.clamp(conv / (1 + 1e-5) ** 0.5, min=0.0))
        torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-5)
    assert stage.conv.bias is None
