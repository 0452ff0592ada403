"""Small slides and an encoder without a network: what these tests are about is neither."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from histoflare.slides.manifest import Manifest, read_manifest
from histoflare.slides.mosaic import MosaicParameters
from histoflare.slides.pyramid import write_pyramid


class MeanColour:
    """Three features: a patch's mean red, green and blue. A closed form, so bags can be checked by hand."""

    id = "mean-colour"
    features = 3
    preprocessing = None

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        self.encoded += len(patches)
        return patches.double().mean(dim=(2, 3)).float()


def paint_slide(seed: int, size_px: tuple[int, int] = (640, 512), tissue: bool = True) -> np.ndarray:
    """Return uint8 (h, w, 3): white glass with an island of speckled pink and violet."""
    rng = np.random.default_rng(seed)
    width, height = size_px
    rgb = rng.normal(242, 1.5, (height, width, 3))
    if tissue:
        y, x = np.mgrid[:height, :width]
        inside = ((x / width - 0.5) / 0.45) ** 2 + ((y / height - 0.5) / 0.45) ** 2 < 1
        nuclei = np.repeat(np.repeat(rng.random((height // 8 + 1, width // 8 + 1)) < 0.3, 8, 0), 8, 1)
        colour = np.where(nuclei[:height, :width, None], (110, 70, 150), (220, 150, 190))
        rgb[inside] = (colour + rng.normal(0, 6, rgb.shape))[inside]
    return np.clip(rgb, 0, 255).astype(np.uint8)


@pytest.fixture
def encoder() -> MeanColour:
    return MeanColour()


@pytest.fixture
def parameters() -> MosaicParameters:
    return MosaicParameters(patch_px=64, fraction=0.5, clusters=3)


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    """One slide at 0.5 µm/px."""
    path = tmp_path / "slides" / "one.tif"
    write_pyramid(path, paint_slide(1), 0.5)
    return path


MakeManifest = Callable[..., Manifest]


@pytest.fixture
def make_manifest(tmp_path: Path) -> MakeManifest:
    """Return a function that writes ``count`` slides and a manifest; ``extra`` adds rows without slides."""

    def make(count: int, extra: Sequence[dict[str, str]] = (), **columns: Sequence[str]) -> Manifest:
        rows = []
        for index in range(count):
            written = f"slides/s{index}.tif"
            path = tmp_path / written
            if not path.exists():
                write_pyramid(path, paint_slide(index), 0.5)
            rows.append({"slide": written, "patient": f"p{index}", "label": "ab"[index % 2]})
            rows[-1] |= {name: values[index] for name, values in columns.items()}
        return write_rows(tmp_path / "manifest.csv", [*rows, *extra])

    return make


def write_rows(path: Path, rows: Sequence[dict[str, str]], labels: Sequence[str] = ("a", "b")) -> Manifest:
    """Write a manifest of ``rows`` and read it back; its slides need not exist."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return read_manifest(path, labels=labels, check_files=False)
