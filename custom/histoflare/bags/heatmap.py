"""How much a model attends to each patch of a slide, as numbers and as a pyramidal TIFF.

The bag is the mosaic, as when the model was trained and when it answers. For a patch of the mosaic the figure
is the attention that the model pays it in that bag. For any other it is the attention that it would be paid
if it, and no other, were added to the bag. So every figure comes from bags as the model knows them (one bag
of all patches could be ten times as large), and no patch's figure depends on which others are asked about.

Where a model has several kinds of attention (MEM: the memory units of its first block) it is their mean. It
is relative to the average patch of the bag: 1 is as much as the average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histoflare.bags.models.model import BagModel
from histoflare.ensemble import members_of
from histoflare.slides.mask_pyramid import write_mask_pyramid
from histoflare.slides.overlay import attention_colours
from histoflare.slides.planes import Plane

LEVELS = 255
NO_PATCH = 255
"""Value of the heat map where no patch was asked about; shown in white."""

COARSEST_MPP = 32.0
"""Readers of TIFF take 40 µm/px and more for a printer's resolution, so patches become several pixels."""


PX_PER_PATCH_OFF_GRID = 16
"""Pixels for a side of a patch where the plane's corner lies inside one: edges are then at most 1/32 off."""

FLATTEST = 1.25
"""The colours span at least 1/1.25 to 1.25 times the average, so that even attention looks even."""

WIDEST = 100.0
"""… and at most 1/100 to 100 times."""

MOST_IN_ONE_TILE_PX = 256
"""A map whose sides have no more pixels would be one tile without levels, and no pyramid."""


class BagAttention:
    """The attention of a model to the patches of a bag, and to others added to it one at a time.

    Args:
        model: A :class:`BagModel` in evaluation mode, or an ensemble of several, whose attention is averaged.
        features: The bag (n, f), n >= 1.
    """

    def __init__(self, model: nn.Module, features: Tensor) -> None:
        self._device = next(model.parameters()).device
        self.bag = relative_attention(model, features)
        with torch.inference_mode():
            bag = features.to(self._device)
            self._added = [cast(BagModel, member).attend_added(bag) for member in members_of(model)]

    def added(self, features: Tensor) -> NDArray[np.float64]:
        """Return the relative attention (b,) that each patch of ``features`` (b, f) would be paid."""
        with torch.inference_mode():
            each = [added(features.to(self._device)).numpy(force=True) for added in self._added]
        relative: NDArray[np.float64] = np.mean(each, axis=0)
        return relative


def relative_attention(model: nn.Module, features: Tensor) -> NDArray[np.float64]:
    """Return how much the model attends to each patch (n,) of a bag (n, f), the average patch being 1."""
    bag = features[None].to(next(model.parameters()).device)
    with torch.inference_mode():
        each = [cast(BagModel, member).attend(bag).attention[0] for member in members_of(model)]
        attention = torch.cat(each)  # (h, n) of each member below the other's
        relative: NDArray[np.float64] = attention.double().mean(dim=0).numpy(force=True)  # (n,)
    return relative * len(features)


def attention_limit(slides: Iterable[NDArray[np.float64]]) -> float:
    """Return where the colours end: 98 % of all patches lie between 1/limit and limit times the average."""
    every = [_distance(relative) for relative in slides if len(relative)]
    if not every:
        return FLATTEST
    limit = float(np.exp(np.percentile(np.concatenate(every), 98)))
    return min(max(limit, FLATTEST), WIDEST)


def is_even(limit: float) -> bool:
    """Return whether the colours of :func:`attention_limit` show nearly even attention, and no place.

    Then 98 % of all patches lie between 1/1.25 and 1.25 times the average.
    """
    return limit <= FLATTEST


def attention_levels(relative: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Return levels (n,) from 0 (1/limit times the average or less) over 0.5 (the average) to 1."""
    levels = 0.5 + np.log(np.maximum(relative, 1e-12)) / (2 * np.log(limit))
    clipped: NDArray[np.float64] = levels.clip(0.0, 1.0)
    return clipped


def _distance(relative: NDArray[np.float64]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = np.abs(np.log(np.maximum(relative, 1e-12)))
    return distance


def write_heat(
    path: Path,
    levels: NDArray[np.float64],
    l0_coords: NDArray[np.int64],
    l0_patch_px: int,
    plane: Plane,
    l0_mpp: float,
    scratch: Path,
) -> float:
    """Write levels as a pyramidal TIFF that lies on a plane of the slide; return its mpp.

    A value is round(254 · level), its palette :func:`attention_colours`; 255 (white) is where there is no
    patch. A patch is one pixel, or 2 x 2, 4 x 4 … equal ones where one would be coarser than 32 µm, where the
    plane's corner lies inside a patch, or where the whole map would fit into one tile: it has two levels at
    least.

    Args:
        path: File to write, whole or not at all.
        levels: Of the patches (n,), from 0 to 1.
        l0_coords: Their corners (n, 2) in level-0 pixels, multiples of ``l0_patch_px``.
        l0_patch_px: Side of a patch in level-0 pixels.
        plane: The part of the slide to cover.
        l0_mpp: Resolution of level 0 in µm/px.
        scratch: Folder for files that are removed again.

    Raises:
        ValueError: A corner is not on the grid of patches.
        OSError: The file cannot be written.
    """
    if (l0_coords % l0_patch_px).any():
        raise ValueError("patches must lie on one grid")
    um_patch = l0_patch_px * l0_mpp
    repeat = 1 << max(0, math.ceil(math.log2(um_patch / COARSEST_MPP)))
    if any(corner % l0_patch_px for corner in plane.l0_xy):
        repeat = max(repeat, PX_PER_PATCH_OFF_GRID)
    longest = math.ceil(max(plane.l0_size_px) / l0_patch_px)
    while longest * repeat <= MOST_IN_ONE_TILE_PX:
        repeat *= 2
    # the grid of patches on level 0, and a last row and column of none
    last = (l0_coords // l0_patch_px).max(axis=0, initial=0) + 1
    grid = np.full((last[1] + 1, last[0] + 1), NO_PATCH, np.uint8)
    places = l0_coords // l0_patch_px
    grid[places[:, 1], places[:, 0]] = np.round(levels.clip(0.0, 1.0) * (LEVELS - 1)).astype(np.uint8)
    columns, rows = (_patches(plane, axis, l0_patch_px, repeat, int(last[axis])) for axis in (0, 1))
    values = grid[np.ix_(rows, columns)]
    palette = np.full((256, 3), 255, np.uint8)
    palette[:LEVELS] = attention_colours(np.linspace(0.0, 1.0, LEVELS))
    write_mask_pyramid(
        path,
        lambda x, y, width, height: values[y : y + height, x : x + width],
        (values.shape[1], values.shape[0]),
        um_patch / repeat,
        plane=plane,
        scratch=scratch,
        colours=palette,
    )
    return um_patch / repeat


def _patches(plane: Plane, axis: int, l0_patch_px: int, repeat: int, none: int) -> NDArray[np.int64]:
    """Return along an axis of the plane which patch holds each pixel's middle; ``none`` beyond the last."""
    count = max(1, math.ceil(plane.l0_size_px[axis] / l0_patch_px)) * repeat
    l0_middles = plane.l0_xy[axis] + (np.arange(count) + 0.5) * (l0_patch_px / repeat)
    found = np.floor(l0_middles / l0_patch_px).astype(np.int64)
    return np.where((found < 0) | (found > none), none, found)
