"""``histoflare prepare`` end to end: seconds a slide, and where they go.

    python -m tests.benchmarks.bench_prepare [--quick] [--slides N] [--patch-px P]

Generated slides, the encoder of the demo. Mosaic, reading and encoding are timed one after the other on the
same slides; what ``prepare`` takes less than their sum is what overlaps. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from histoflare.bags.encoder import Encoder, load_encoder
from histoflare.bags.patches import MosaicPatchDataset, iterate_batches
from histoflare.bags.prepare import prepare
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters, build_mosaic
from histoflare.slides.reader import Slide
from histoflare.synthetic.slides import SyntheticCohort, make_slides


def time_phases(
    paths: list[Path], parameters: MosaicParameters, encoder: Encoder, workers: int
) -> dict[str, float]:
    """Return the seconds that mosaics, reading and encoding take, each on its own; and the patches."""
    seconds = {"mosaic": 0.0, "read": 0.0, "encode": 0.0}
    patches = 0
    for path in paths:
        with Slide(path) as slide:
            started = time.perf_counter()
            mosaic = build_mosaic(slide, parameters, workers)
            seconds["mosaic"] += time.perf_counter() - started
            started = time.perf_counter()
            batches = list(iterate_batches(MosaicPatchDataset(slide, mosaic), 64, workers))
            seconds["read"] += time.perf_counter() - started
        started = time.perf_counter()
        for batch in batches:
            encoder.encode(batch)
        seconds["encode"] += time.perf_counter() - started
        patches += len(mosaic.chosen)
    return {**seconds, "patches": patches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two slides")
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--patch-px", type=int, default=224)
    parser.add_argument("--um-field", type=float, default=1800.0)
    options = parser.parse_args()
    count = 2 if options.quick else options.slides
    workers = len(os.sched_getaffinity(0))
    parameters = MosaicParameters(patch_px=options.patch_px)
    encoder = load_encoder("densenet121-random")
    with tempfile.TemporaryDirectory() as folder:
        cohort = SyntheticCohort(
            hospitals=1, external=0, slides_per_hospital=count, um_field=options.um_field
        )
        (manifest_path,) = make_slides(Path(folder), cohort).values()
        manifest = read_manifest(manifest_path)
        encoder.encode(torch.zeros(2, 3, options.patch_px, options.patch_px, dtype=torch.uint8))  # warm up
        phases = time_phases([row.slide for row in manifest.rows], parameters, encoder, workers)
        started = time.perf_counter()
        report = prepare(manifest, Path(folder) / "bags", encoder, parameters, workers)
        whole = time.perf_counter() - started
        started = time.perf_counter()
        again = prepare(manifest, Path(folder) / "bags", encoder, parameters, workers)
        up_to_date = time.perf_counter() - started
    if report.count("made") != count or again.count("kept") != count:
        sys.exit("the slides were not prepared as expected")
    print(
        json.dumps(
            {
                "slides": count,
                "patch_px": options.patch_px,
                "patches": phases["patches"],
                "workers": workers,
                "torch_threads": torch.get_num_threads(),
                "device": getattr(encoder, "device", torch.device("cpu")).type,
                "prepare_s_per_slide": round(whole / count, 3),
                "mosaic_s_per_slide": round(phases["mosaic"] / count, 3),
                "read_s_per_slide": round(phases["read"] / count, 3),
                "encode_s_per_slide": round(phases["encode"] / count, 3),
                "up_to_date_ms_per_slide": round(1000 * up_to_date / count, 2),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
