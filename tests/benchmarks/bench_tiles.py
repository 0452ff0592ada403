"""Tiles per second: ``Slide.read`` beside a raw OpenSlide loop over the same coordinates and threads.

    .venv/bin/python -m tests.benchmarks.bench_tiles [--quick] [--json FILE]

A tiled JPEG pyramid is made in a temporary folder (16384 x 16384 px at 0.25 µm/px, tiles of 256 px) and tiles
of it read at level 0. Each reader and the raw loop alternate every 50 tiles, several times over with freshly
opened slides (cold tile cache, warm file cache); shown is the median over these turns of the rate and of the
ratio to the raw loop in the same turn. Others' readers are measured where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from histoflare.slides.reader import Slide

TILE_PX = 256
MPP = 0.25
CHUNK = 50
Corner = tuple[int, int]
Read = Callable[[Corner], Any]


def synthetic_tile(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return a tile that compresses about as tissue does: smooth colour, blobs, a little noise."""
    coarse = generator.normal(0, 25, (TILE_PX // 8, TILE_PX // 8, 1)).repeat(8, 0).repeat(8, 1)
    fine = generator.normal(0, 6, (TILE_PX, TILE_PX, 1))
    return np.clip(np.array([205, 140, 185]) + coarse + fine, 0, 255).astype(np.uint8)


def write_slide(path: Path, side_px: int) -> None:
    """Write a pyramid of ``side_px`` (levels 1, 4, 16) from a few tiles used over and over."""
    generator = np.random.default_rng(0)
    tiles = [synthetic_tile(generator) for _ in range(32)]

    def endless(count: int) -> Iterator[NDArray[np.uint8]]:
        for index in range(count):
            yield tiles[(index * 7919) % len(tiles)]

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, downsample in enumerate((1, 4, 16)):
            side = side_px // downsample
            per_cm = 1e4 / (MPP * downsample)
            writer.write(
                endless((-(-side // TILE_PX)) ** 2),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                maxworkers=1,
            )


@contextmanager
def open_raw(path: Path) -> Iterator[Read]:
    """OpenSlide as its documentation shows it."""
    with openslide.OpenSlide(path) as slide:
        yield lambda corner: np.asarray(slide.read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB"))


@contextmanager
def open_ours(path: Path) -> Iterator[Read]:
    with Slide(path) as slide:
        yield lambda corner: slide.read(corner, (TILE_PX, TILE_PX), MPP)


@contextmanager
def open_tiatoolbox(path: Path) -> Iterator[Read]:
    reader = importlib.import_module("tiatoolbox.wsicore.wsireader").OpenSlideWSIReader(path)
    yield lambda corner: reader.read_rect(corner, (TILE_PX, TILE_PX), resolution=0, units="level")


@contextmanager
def open_lazyslide(path: Path) -> Iterator[Read]:
    opened = importlib.import_module("wsidata").open_wsi(path)
    yield lambda corner: opened.read_region(*corner, TILE_PX, TILE_PX, level=0)


def others() -> Iterator[tuple[str, str, Any]]:
    """Yield (name, module it needs, how it opens) of the other readers."""
    yield "TIAToolbox OpenSlideWSIReader", "tiatoolbox", open_tiatoolbox
    yield "LazySlide (wsidata)", "wsidata", open_lazyslide


def measure(read: Read, corners: Sequence[Corner], pool: ThreadPoolExecutor | None) -> float:
    """Return the seconds that reading ``corners`` takes, in the pool's threads or in this one."""
    started = time.perf_counter()
    if pool is None:
        for corner in corners:
            read(corner)
    else:
        for _ in pool.map(read, corners):
            pass
    return time.perf_counter() - started


def patch_dataset_rows(path: Path, corners: Sequence[Corner], turns: int) -> list[dict[str, Any]]:
    """Return the rates of the MONAI dataset beside the raw loop, or why there is none."""
    name = "histoflare MosaicPatchDataset"
    try:
        from histoflare.bags.patches import MosaicPatchDataset
        from histoflare.slides.mosaic import Mosaic, MosaicParameters, Patch
    except ImportError as error:
        return [{"reader": name, "skipped": str(error)}]

    patches = tuple(Patch(x, y, 0, 1.0) for x, y in corners)
    parameters = MosaicParameters(mpp=MPP, patch_px=TILE_PX)
    mosaic = Mosaic(parameters, TILE_PX, patches, tuple(range(len(patches))))

    @contextmanager
    def open_dataset(slide_path: Path) -> Iterator[Read]:
        with Slide(slide_path) as slide:
            dataset = MosaicPatchDataset(slide, mosaic)
            index_of = {corner: index for index, corner in enumerate(corners)}
            yield lambda corner: dataset[index_of[corner]]

    @contextmanager
    def open_images(slide_path: Path) -> Iterator[Read]:
        with Slide(slide_path) as slide:
            dataset = MosaicPatchDataset(slide, mosaic)
            index_of = {corner: index for index, corner in enumerate(corners)}
            yield lambda corner: dataset.read_image(index_of[corner])

    return [
        row(f"{name} items", open_dataset, path, corners, 1, turns),
        row("  its images, as prepare reads", open_images, path, corners, 1, turns),
        row("  its images, as prepare reads", open_images, path, corners, 2, turns),
    ]


def row(
    name: str, open_reader: Any, path: Path, corners: Sequence[Corner], threads: int, turns: int
) -> dict[str, Any]:
    """Return the medians over ``turns`` of a reader and the raw loop, each on its own freshly opened slide.

    Within a turn they alternate every ``CHUNK`` tiles, so that a busy machine slows both alike.
    """
    raw_rates, own_rates = [], []
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    for turn in range(turns):
        with open_raw(path) as raw, open_reader(path) as own:
            seconds = {"raw": 0.0, "own": 0.0}
            for start in range(0, len(corners), CHUNK):
                order = [("raw", raw), ("own", own)]
                for key, read in order if (turn + start // CHUNK) % 2 == 0 else order[::-1]:
                    seconds[key] += measure(read, corners[start : start + CHUNK], pool)
        raw_rates.append(len(corners) / seconds["raw"])
        own_rates.append(len(corners) / seconds["own"])
    if pool is not None:
        pool.shutdown()
    ratios = [own / raw for own, raw in zip(own_rates, raw_rates, strict=True)]
    return {
        "reader": name,
        "threads": threads,
        "tiles_per_s": round(statistics.median(own_rates), 1),
        "raw_tiles_per_s": round(statistics.median(raw_rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def run(quick: bool) -> list[dict[str, Any]]:
    """Return a row for every reader and number of threads."""
    side_px, tiles, turns = (2048, 60, 3) if quick else (16384, 1000, 7)
    generator = np.random.default_rng(1)
    per_side = side_px // TILE_PX
    flat = generator.choice(per_side**2, min(tiles, per_side**2), replace=False)
    corners = [(int(each % per_side) * TILE_PX, int(each // per_side) * TILE_PX) for each in flat]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.tif"
        write_slide(path, side_px)
        for threads in (1, 2):
            results.append(row("histoflare Slide.read", open_ours, path, corners, threads, turns))
        results += patch_dataset_rows(path, corners, turns)
        for name, module, opener in others():
            if importlib.util.find_spec(module) is None:
                results.append({"reader": name, "skipped": f"{module} is not installed"})
                continue
            for threads in (1, 2):
                results.append(row(name, opener, path, corners, threads, turns))
    return results


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small slide, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    results = run(options.quick)
    print(
        f"{TILE_PX} px tiles at level 0; {os.cpu_count()} CPUs, Python {platform.python_version()}, ", end=""
    )
    print(f"OpenSlide {openslide.__library_version__}")
    print(f"{'reader':32} {'threads':>7} {'tiles/s':>9} {'raw':>9} {'ratio':>6}  (lowest, highest)")
    for each in results:
        if "skipped" in each:
            print(f"{each['reader']:32} skipped: {each['skipped']}")
            continue
        print(
            f"{each['reader']:32} {each['threads']:7d} {each['tiles_per_s']:9.1f} "
            f"{each['raw_tiles_per_s']:9.1f} {each['ratio']:6.3f}  "
            f"({each['ratio_low']}, {each['ratio_high']})"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
