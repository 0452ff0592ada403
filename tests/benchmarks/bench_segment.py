"""``histoflare segment``: windows a second beside the bare network's, and memory on slides of two sizes.

    python -m tests.benchmarks.bench_segment [--quick] [--memory]

Speed: a synthetic slide of 20,000 x 20,000 px with tissue on a part of it, the small DHUnet. Compared are
the whole of ``segment_slide``, the network alone on windows of it in memory, and MONAI's SlidingWindowInferer
on a region of the same pixels in memory. ``--memory``: the largest memory of a process that segments slides
of 20,000 and 60,000 px a side with a model that costs nothing. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

TILE_PX = 256
L0_MPP = 0.5


def write_slide(path: Path, side_px: int, *, cells: int, cell_tiles: int) -> None:
    """Write a slide of two levels whose first ``cells`` squares on the diagonal are tissue.

    A square has ``cell_tiles`` tiles a side, and the second level is that many times smaller than the first.
    A handful of JPEG tiles is encoded once and used again and again: 60,000 x 60,000 px take a second.
    """
    rng = np.random.default_rng(0)
    glass = _jpeg(np.full((TILE_PX, TILE_PX, 3), 244, np.uint8))
    tissue = [_jpeg(_texture(rng)) for _ in range(8)]
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for factor in (1, cell_tiles):
            side = -(-side_px // factor)
            tiles = -(-side // TILE_PX)
            per_cell = cell_tiles // factor

            def content(tiles: int = tiles, per_cell: int = per_cell):  # type: ignore[no-untyped-def]
                for y in range(tiles):
                    for x in range(tiles):
                        here = x // per_cell == y // per_cell < cells
                        yield tissue[(3 * x + 5 * y) % len(tissue)] if here else glass

            tiff.write(
                content(),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                subfiletype=0 if factor == 1 else 1,
                resolution=(1e4 / (L0_MPP * factor),) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _texture(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a tile of pink with violet spots."""
    spots = ndimage.gaussian_filter(rng.normal(size=(TILE_PX, TILE_PX)), 4, mode="wrap") > 0.05
    rgb = np.where(spots[..., None], (120, 70, 155), (222, 150, 190)) + rng.normal(
        0, 7, (TILE_PX, TILE_PX, 3)
    )
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    # the ordinary three channels of JPEG; each tile has its own tables
    Image.fromarray(rgb).save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


@dataclass
class Brightness:
    """A model that costs nothing: two classes by brightness."""

    labels: tuple[str, ...] = ("light", "dark")
    background: str | None = None
    mpp: float | None = L0_MPP
    window_px: int = 512
    stride_px: int = 256
    patch_px: int = 512

    def probabilities(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the share of light and of dark."""
        light = windows[..., 1].astype(np.float32) / 255
        return np.stack([light, 1 - light], axis=1)


def measure_speed(folder: Path, batch: int, *, quick: bool) -> dict[str, float | int | str]:
    """Return windows a second of us, of the bare network, and of MONAI's inferer."""
    import torch
    from monai.inferers import SlidingWindowInferer

    from histoflare.masks.segmenter import segment_slide
    from histoflare.masks.slide_grid import TissueMap, plan_grid, read_windows
    from histoflare.masks.task import MaskTask
    from histoflare.masks.task_model import TaskModel
    from histoflare.slides.reader import Slide

    task = MaskTask(
        labels=("light", "dark"), width=24, mpp=L0_MPP, window_px=224, stride_px=112, patch_px=224
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = task.build_model().eval().to(device)
    model = TaskModel(task, network)
    path = folder / "speed.tif"
    write_slide(path, 8_000 if quick else 20_000, cells=4, cell_tiles=8)
    with Slide(path) as slide:
        grid = plan_grid(slide, window_px=224, stride_px=112, patch_px=224, mpp=L0_MPP)
        tissue = TissueMap(slide, grid)
        columns = tissue.columns(8)[:16]
        windows = np.concatenate([read_windows(slide, grid, row, columns) for row in (8, 9)])
        region = slide.read((0, 0), (784, 784), L0_MPP)  # 36 windows
        model.probabilities(windows[:batch])  # warm up
        bare, bare_cpu = [], []

        def measure_bare() -> None:
            started, started_cpu = time.perf_counter(), time.process_time()
            for start in range(0, len(windows), batch):
                model.probabilities(windows[start : start + batch])
            bare.append(len(windows) / (time.perf_counter() - started))
            bare_cpu.append(len(windows) / (time.process_time() - started_cpu))

        measure_bare()
        started, started_cpu = time.perf_counter(), time.process_time()
        result = segment_slide(slide, model, folder / "mask.tiff", model_id="bench", batch=batch)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        measure_bare()
    inferer = SlidingWindowInferer((224, 224), sw_batch_size=batch, overlap=0.5, mode="gaussian")
    asked = 0

    def ask(images: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += len(images)
        return network(images).softmax(dim=1)  # type: ignore[no-any-return]

    with torch.no_grad():
        image = torch.from_numpy(region.copy()).permute(2, 0, 1)[None].float().to(device) / 255
        started = time.perf_counter()
        inferer(image, ask)
        monai = asked / (time.perf_counter() - started)
    alone = float(np.mean(bare))
    return {
        "device": device.type,
        "torch_threads": torch.get_num_threads(),
        "batch": batch,
        "windows": result.windows,
        "seconds": round(seconds, 1),
        "windows_per_s": round(result.windows / seconds, 2),
        "bare_network_windows_per_s": round(alone, 2),
        "ratio": round(result.windows / seconds / alone, 3),
        # the same by processor time, which other processes on the machine disturb less
        "cpu_time_ratio": round(result.windows / cpu_seconds / float(np.mean(bare_cpu)), 3),
        "monai_in_memory_windows_per_s": round(monai, 2),
    }


def segment_for_memory(folder: Path, side_px: int) -> None:
    """Segment a slide, and print what it took; run in a process of its own."""
    from histoflare.masks.segmenter import segment_slide
    from histoflare.slides.reader import Slide

    path = folder / f"{side_px}.tif"
    write_slide(path, side_px, cells=2, cell_tiles=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with Slide(path) as slide:
        result = segment_slide(
            slide, Brightness(), folder / f"{side_px}.mask.tiff", model_id="bench", batch=4
        )
    print(
        json.dumps(
            {
                "side_px": side_px,
                "windows": result.windows,
                "seconds": round(time.perf_counter() - started, 1),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "before_mb": before // 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller slide")
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--torch-threads", type=int, help="threads of the network; by default PyTorch's")
    parser.add_argument("--segment", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.segment:
            segment_for_memory(Path(name), options.segment)
        elif options.memory:
            sides = (4_000, 12_000) if options.quick else (20_000, 60_000)
            command = [sys.executable, __file__, "--segment"]
            found = [
                json.loads(subprocess.run([*command, str(side)], check=True, capture_output=True).stdout)
                for side in sides
            ]
            print(json.dumps(found, indent=2))
        else:
            if options.torch_threads:
                import torch

                torch.set_num_threads(options.torch_threads)
            print(json.dumps(measure_speed(Path(name), options.batch, quick=options.quick), indent=2))


if __name__ == "__main__":
    main()
