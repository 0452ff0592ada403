"""Seconds of a whole mosaic (tissue, candidates, colours, clusters, choice), beside one candidate at a time.

    .venv/bin/python -m tests.benchmarks.bench_mosaic [--mpp 0.25] [--threads 2] [--turns 3]

Slides of 82,000 x 61,000 px are made in a temporary folder: tiled JPEG (256 px, 4:2:0), level 0 at 0.25 µm/px
as a 40x scan has, one with levels of 1, 2, 4, 8 ... and one with 1, 4, 16 as Aperio's; the tissue holds some
13,650 patches of 224 px at 20x (0.5 µm/px). Each turn builds the mosaic as the package does, with
``--threads``, and then with a read of its own for every candidate's colour, in one thread, as the definition
says; shown are the medians, their ratio, the largest memory of the first, and whether the two JSON texts are
the same bytes. Seconds on a busy machine say little: there, compare the processor's (CPU s).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

TILE_PX = 256
FINEST_READ = 4
"""Levels finer than this are not read by the mosaic: a few tiles, used over and over, stand for them."""

LEVELS = {"halving": (1, 2, 4, 8, 16, 32, 64), "1, 4, 16": (1, 4, 16)}
PATCH_PX = 224


def tissue_tile(l0_x: int, l0_y: int, downsample: int, size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the tile of a level that begins at (l0_x, l0_y): an ellipse of stained tissue on glass."""
    coarse_px = 8
    steps = np.arange(TILE_PX // coarse_px) * coarse_px * downsample
    x = ((l0_x + steps) / size_px[0])[None, :]
    y = ((l0_y + steps) / size_px[1])[:, None]
    inside = ((x - 0.5) / 0.455) ** 2 + ((y - 0.5) / 0.386) ** 2 < 1
    nuclei = 0.5 + 0.5 * np.sin(9 * x + 4 * np.sin(7 * y)) * np.cos(11 * y - 3 * x)
    fibres = 0.5 + 0.5 * np.sin(23 * y + 5 * x) * np.cos(17 * x)
    haematoxylin, eosin, pale = np.array([(110, 60, 150), (215, 110, 165), (235, 190, 215)])
    stained = nuclei[..., None] * haematoxylin + (1 - nuclei[..., None]) * eosin
    colour = 0.6 * stained + 0.4 * (fibres[..., None] * stained + (1 - fibres[..., None]) * pale)
    colour = np.where(inside[..., None], colour, 244.0)
    generator = np.random.default_rng((l0_x, l0_y, downsample))
    blobs = generator.normal(0, 14, inside.shape) * inside
    shade = (colour + blobs[..., None]).repeat(coarse_px, 0).repeat(coarse_px, 1)
    grain = generator.normal(0, 5, (TILE_PX, TILE_PX, 1))
    return np.clip(shade + grain, 0, 255).astype(np.uint8)


def encoded_tiles(size_px: tuple[int, int], downsample: int) -> Iterator[bytes]:
    """Yield the JPEG tiles of a level, row by row."""
    columns, rows = (math.ceil(side / downsample / TILE_PX) for side in size_px)
    known: dict[tuple[int, int], bytes] = {}
    for row in range(rows):
        for column in range(columns):
            place = (column, row) if downsample >= FINEST_READ else (column % 4, row % 4)
            if place not in known or downsample >= FINEST_READ:
                l0_x, l0_y = (each * TILE_PX * downsample for each in place)
                tile = tissue_tile(l0_x, l0_y, downsample, size_px)
                known[place] = bytes(imagecodecs.jpeg8_encode(tile, level=80, subsampling="420"))
            yield known[place]


def write_slide(path: Path, size_px: tuple[int, int], mpp: float, downsamples: tuple[int, ...]) -> None:
    """Write a pyramid of ``size_px`` (width, height) at ``mpp``."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for downsample in downsamples:
            per_cm = 1e4 / (mpp * downsample)
            writer.write(
                encoded_tiles(size_px, downsample),
                shape=(size_px[1] // downsample, size_px[0] // downsample, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=int(downsample > 1),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
            )


def build(path: Path, threads: int, alone: bool) -> dict[str, Any]:
    """Return seconds, peak memory and the outcome of one mosaic; to be called in a process of its own."""
    import resource

    import sklearn.cluster  # noqa: F401  its import is no part of a mosaic

    from histoflare.slides import colours, mosaic
    from histoflare.slides.reader import Slide

    if alone:
        colours.GridColours.add = lambda grid, block: None  # type: ignore[method-assign]
        mosaic.read_mean_colours = colours_one_by_one  # type: ignore[attr-defined]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Slide(path) as slide:
        started, cpu_started = time.perf_counter(), time.process_time()
        built = mosaic.build_mosaic(slide, mosaic.MosaicParameters(patch_px=PATCH_PX), threads)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024,
        "candidates": len(built.candidates),
        "chosen": len(built.chosen),
        "sha256": hashlib.sha256(json.dumps(built.to_json()).encode()).hexdigest(),
    }


def colours_one_by_one(
    slide: Any, l0_patch_px: int, mpp: float, l0_xy: NDArray[np.int64], threads: int
) -> NDArray[np.float64]:
    """Return the candidates' mean colours (n, 3), each read on its own."""
    side = max(1, round(l0_patch_px / slide.l0_per_px(mpp)))
    corners = l0_xy.tolist()
    return np.array([slide.read((x, y), (side, side), mpp).reshape(-1, 3).mean(axis=0) for x, y in corners])


def build_apart(path: Path, threads: int, alone: bool) -> dict[str, Any]:
    """Return what :func:`build` returns in a new process."""
    command = [sys.executable, __file__, "--one", str(path), "--threads", str(threads), *["--alone"] * alone]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def compare(path: Path, threads: int, turns: int) -> dict[str, Any]:
    """Return the medians of both ways over ``turns``, and whether all came out the same."""
    ours, others = [], []
    for _ in range(turns):
        ours.append(build_apart(path, threads, alone=False))
        others.append(build_apart(path, 1, alone=True))
    ratios = [other["seconds"] / own["seconds"] for own, other in zip(ours, others, strict=True)]

    def median(results: list[dict[str, Any]], what: str) -> float:
        return round(statistics.median(each[what] for each in results), 2)

    return {
        "candidates": ours[0]["candidates"],
        "chosen": ours[0]["chosen"],
        "mosaic (s, CPU s)": [median(ours, "seconds"), median(ours, "cpu_seconds")],
        "one candidate at a time (s, CPU s)": [median(others, "seconds"), median(others, "cpu_seconds")],
        "ratio": round(statistics.median(ratios), 2),
        "most memory (MiB)": round(max(each["mib"] for each in ours)),
        "same bytes": len({each["sha256"] for each in ours + others}) == 1,
    }


def main() -> None:
    """Make the slides, measure, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="82000x61000", help="of level 0 in pixels, WIDTHxHEIGHT")
    parser.add_argument("--mpp", type=float, default=0.25, help="of level 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(build(options.one, options.threads, options.alone)))
        return
    width_px, height_px = map(int, options.size.split("x"))
    results: dict[str, Any] = {"size_px": options.size, "mpp": options.mpp, "threads": options.threads}
    results["processors"] = len(os.sched_getaffinity(0))
    for name, downsamples in LEVELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.tif"
            write_slide(path, (width_px, height_px), options.mpp, downsamples)
            results[f"levels {name}"] = compare(path, options.threads, options.turns)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
