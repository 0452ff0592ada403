"""Images with masks on disk, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def rgb(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_palette(path: Path, indices: NDArray[np.uint8], palette: Mapping[int, tuple[int, int, int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(indices)
    channels = [0] * 768
    for index, colour in palette.items():
        channels[3 * index : 3 * index + 3] = colour
    image.putpalette(channels)
    image.save(path)
    return path


def write_cohort(folder: Path, count: int = 4, side: int = 48, classes: int = 2, split: bool = True) -> Path:
    """Write ``count`` images of one patient each; every fourth is for testing."""
    lines = ["image,mask,patient,sex" + (",split" if split else "")]
    for index in range(count):
        save(folder / f"i{index}.png", rgb(side, side, index))
        mask = np.random.default_rng(100 + index).integers(0, classes, (side, side), np.uint8)
        save(folder / f"m{index}.png", mask)
        part = ("," + ("test" if index % 4 == 3 else "train")) if split else ""
        lines.append(f"i{index}.png,m{index}.png,p{index},{'FM'[index % 2]}{part}")
    path = folder / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
