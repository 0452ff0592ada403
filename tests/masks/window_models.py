"""Models without a network, whose answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class ByDarkness:
    """Three classes by a pixel's mean brightness; each pixel of the answer sees its own block alone."""

    labels: Sequence[str] = ("light", "middle", "dark")
    background: str | None = None
    mpp: float | None = 0.5
    window_px: int = 64
    stride_px: int = 32
    patch_px: int = 64
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.shapes.append(windows.shape)
        return np.stack([darkness(block_means(each, self.patch_px)) for each in windows])


@dataclass
class Slanted(ByDarkness):
    """As before, but the answer also depends on where in the window a pixel lies."""

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = super().probabilities(windows)
        slope = np.linspace(0.5, 1.5, self.patch_px, dtype=np.float32)
        found[:, 1] *= slope
        found[:, 2] *= slope[::-1, None]
        return found / found.sum(axis=1, keepdims=True)


def block_means(rgb: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Return the mean brightness (side, side) of the blocks of a square image."""
    step = rgb.shape[0] // side
    means: NDArray[np.float64] = rgb.astype(np.float64).mean(axis=2)
    return means[: side * step, : side * step].reshape(side, step, side, step).mean(axis=(1, 3))


def darkness(brightness: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the probabilities (3, h, w) of brightnesses (h, w): by the distance to 230, 175 and 110."""
    distance = np.stack([np.abs(brightness - middle) for middle in (230.0, 175.0, 110.0)])
    weight = np.exp(-distance / 20)
    return (weight / weight.sum(axis=0)).astype(np.float32)
