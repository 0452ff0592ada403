"""The questions of ``bench_private``: real features in made-up patients, and drawn ones.

    tiles   texture features of 5,000 real tiles of colorectal tissue in eight classes (Kather 2016), each
            tile a patient; 1,000 other tiles to test on
    fives   the same, a patient has a bag of five tiles of one class; tested on such bags, too
    wide    the same tiles, one a patient, on 1,024 random directions: 23 times the weights
    lung    features of 297 real tiles of two lung cancers (LC25000), each tile a patient; tested on the rest
    drawn   bags of eight patches with 128 features that are drawn (``drawn_bags``), two classes

Tiles have no patients: that each is one, or five are, is made up. What scales features is public: a thousand
colorectal tiles that are used for nothing else, and the tiles of healthy lung.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from histoflare.bags.encoder import load_encoder
from histoflare.bags.models.linear import LinearSettings
from histoflare.bags.task import BagTask
from histoflare.slides.assemble import read_tiles
from tests.benchmarks.bags_in_memory import Bags, Slide
from tests.benchmarks.drawn_bags import Drawn

PUBLIC, TEST = 1000, 1000
FIVE, WIDE = 5, 1024
DRAWN = (128, 8, 1.3, 0.4)
"""Features, patches, separation and how much of it a patch shows."""


@dataclass(frozen=True)
class Split:
    """Site → its patients, all to train on; the patients to test on; the task."""

    sites: dict[str, Bags]
    test: Bags
    task: BagTask


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        title: In a heading.
        classes: How many; guessing is right once in so many.
        split: (sites, patients of each, seed, batch size) → a split by chance.
    """

    title: str
    classes: int
    split: Callable[[int, int, int, int], Split]


def data_folder() -> Path:
    """Return the folder of real data."""
    return Path(os.environ.get("HISTOFLARE_TEST_DATA", ""))


@lru_cache(maxsize=1)
def read_crc() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the features (5000, 43) and classes (5000,) of the colorectal tiles."""
    with np.load(data_folder() / "feat_crc5000" / "crc5000_best2.npz", allow_pickle=False) as held:
        arrays = [held[name] for name in held.files]
    x = next(value for value in arrays if value.ndim == 2 and value.shape[1] == 43)
    y = next(value for value in arrays if value.ndim == 1 and len(value) == len(x))
    return x.astype(np.float64), np.unique(y, return_inverse=True)[1].astype(np.int64)


@lru_cache(maxsize=1)
def encode_lung() -> list[NDArray[np.float64]]:
    """Return the encoder's features (n, f) of healthy lung and of each of the two cancers."""
    index = data_folder() / "cls_lc25000_lung" / "index.csv"
    encoder = load_encoder("efficientnet-lite0")
    found = []
    for label in ("lung_n", "lung_aca", "lung_scc"):
        tiles = read_tiles(index, {label: label})
        pixels = np.stack(
            [np.asarray(Image.open(tile.path).convert("RGB")) for tile in tiles]
        )  # (n, h, w, 3)
        found.append(encoder.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).double().numpy())
    return found


def read_lung() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the features (297, f) of the cancers' tiles, scaled by healthy lung's, and classes (297,)."""
    healthy, *cancers = encode_lung()
    x = (np.vstack(cancers) - healthy.mean(axis=0)) / (healthy.std(axis=0) + 1e-6)
    return np.clip(x, -3, 3), np.repeat([0, 1], [len(cancer) for cancer in cancers])


def split_crc(
    sites: int, patients: int, seed: int, batch_size: int, tiles: int = 1, directions: int = 0
) -> Split:
    """Return a split of the colorectal tiles, ``tiles`` of one class a patient."""
    x, y = read_crc()
    order = np.random.default_rng([seed, sites, patients, tiles]).permutation(len(x))
    public, test, rest = np.split(order, [PUBLIC, PUBLIC + TEST])
    x = np.clip((x - x[public].mean(axis=0)) / x[public].std(axis=0), -3, 3)
    rng = np.random.default_rng([seed, 1])
    stock = _Stock(x, y, rest, rng)
    made = {f"site-{site:02}": stock.deal(f"{site}", patients, tiles) for site in range(sites)}
    asked = _Stock(x, y, test, rng)
    return Split(made, asked.deal_all("t", tiles), _task(8, 43, directions, tiles, seed, batch_size))


def split_fives(sites: int, patients: int, seed: int, batch_size: int) -> Split:
    """Return a split in which a patient has five tiles."""
    return split_crc(sites, patients, seed, batch_size, FIVE)


def split_wide(sites: int, patients: int, seed: int, batch_size: int) -> Split:
    """Return a split with many weights."""
    return split_crc(sites, patients, seed, batch_size, directions=WIDE)


def split_lung(sites: int, patients: int, seed: int, batch_size: int) -> Split:
    """Return a split of the lung tiles."""
    x, y = read_lung()
    rng = np.random.default_rng([seed, sites, patients])
    order = rng.permutation(len(x))
    train, test = np.split(order, [sites * patients])
    made = {
        f"site-{site:02}": _bags(f"{site}", x, y, chosen[:, None], "train")
        for site, chosen in enumerate(train.reshape(sites, patients))
    }
    return Split(made, _bags("t", x, y, test[:, None], "test"), _task(2, x.shape[1], 64, 1, seed, batch_size))


def split_drawn(sites: int, patients: int, seed: int, batch_size: int) -> Split:
    """Return drawn bags; a thousand patients of all sites together to test on."""
    drawn = Drawn(*DRAWN, seed)
    made = drawn.sites([patients] * sites, TEST // sites)
    asked = [record for each in made.values() for record in each.records if record.split == "test"]
    every = {name: bag for each in made.values() for name, bag in each.bags.items()}
    task = _task(2, drawn.features, 0, drawn.patches, seed, batch_size)
    return Split({site: Bags(each.train, each.bags) for site, each in made.items()}, Bags(asked, every), task)


QUESTIONS = {
    "tiles": Question("colorectal tiles, one a patient", 8, split_crc),
    "wide": Question("colorectal tiles, many weights", 8, split_wide),
    "fives": Question("colorectal tiles, five a patient", 8, split_fives),
    "lung": Question("lung tiles, one a patient", 2, split_lung),
    "drawn": Question("drawn bags", 2, split_drawn),
}


class _Stock:
    """Tiles of which patients are made; none is in two."""

    def __init__(
        self, x: NDArray[np.float64], y: NDArray[np.int64], which: Sequence[int], rng: np.random.Generator
    ) -> None:
        self.x, self.y, self.rng = x, y, rng
        self.left = [[int(index) for index in which if y[index] == label] for label in range(y.max() + 1)]

    def deal(self, name: str, patients: int, tiles: int, split: str = "train") -> Bags:
        """Return so many patients, of a class by chance."""
        chosen = []
        for _ in range(patients):
            label = int(self.rng.integers(len(self.left)))
            while len(self.left[label]) < tiles:
                label = int(self.rng.integers(len(self.left)))
            chosen.append([self.left[label].pop() for _ in range(tiles)])
        return _bags(name, self.x, self.y, np.array(chosen), split)

    def deal_all(self, name: str, tiles: int) -> Bags:
        """Return as many patients as all tiles make, to test on."""
        chosen = [
            left[start : start + tiles]
            for left in self.left
            for start in range(0, len(left) - tiles + 1, tiles)
        ]
        return _bags(name, self.x, self.y, np.array(chosen), "test")


def _bags(
    name: str, x: NDArray[np.float64], y: NDArray[np.int64], chosen: NDArray[np.int64], split: str
) -> Bags:
    """Return a patient for each row of ``chosen`` (patients, tiles)."""
    slides = [
        Slide(f"{name}-{number}", f"{name}-{number}", int(y[row[0]]), split, len(row))
        for number, row in enumerate(chosen)
    ]
    bags = {f"{name}-{n}": torch.tensor(x[row], dtype=torch.float32) for n, row in enumerate(chosen)}
    return Bags(slides, bags)


def _task(classes: int, features: int, directions: int, patches: int, seed: int, batch_size: int) -> BagTask:
    return BagTask(
        [f"class-{number}" for number in range(classes)],
        "made up",
        LinearSettings(directions=directions),
        mpp=None,
        patch_px=None,
        features=features,
        optimizer="sgd",
        batch_size=batch_size,
        max_patches=patches,
        seed=seed,
    )
