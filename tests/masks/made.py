"""Images with masks that a small network can learn: dark discs on a pale ground."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from histoflare.masks.task import MaskTask

LABELS = ("background", "nucleus")
TASK = MaskTask(
    LABELS,
    background="background",
    width=24,
    patch_px=64,
    window_px=64,
    stride_px=64,
    batch_size=4,
    local_epochs=None,
    local_steps=2,
    learning_rate=0.05,
)


def make_image(seed: int, side_px: int = 96, discs: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return an image uint8 (h, w, 3) and its mask uint8 (h, w)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side_px, :side_px]
    mask = np.zeros((side_px, side_px), bool)
    for _ in range(discs):
        cx, cy = rng.uniform(0, side_px, 2)
        mask |= (x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(5, 12) ** 2
    ground = np.where(mask[..., None], [90, 50, 130], [230, 180, 210])
    image = np.clip(ground + rng.normal(0, 12, ground.shape), 0, 255).astype(np.uint8)
    return image, mask.astype(np.uint8)


def make_site(folder: Path, seed: int = 0, patients: int = 6, side_px: int = 96) -> Path:
    """Write a site's images, one a patient, of all three splits; return their CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(patients):
        image, mask = make_image(seed * 1000 + index, side_px)
        Image.fromarray(image).save(folder / f"image{index}.png")
        Image.fromarray(mask).save(folder / f"mask{index}.png")
        split = ("train", "train", "test", "train", "validation", "test")[index % 6]
        rows.append(
            [f"image{index}.png", f"mask{index}.png", f"{folder.name}-p{index}", split, "FM"[index % 2]]
        )
    path = folder / "images.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "mask", "patient", "split", "sex"])
        table.writerows(rows)
    return path
