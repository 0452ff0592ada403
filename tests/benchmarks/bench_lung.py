"""Slides assembled from real lung tiles: every hospital alone, federated, pooled, over several assemblies.

Each seed assembles the slides anew (which tiles, hospitals, patients, which of them are for testing) and
trains anew, so the spread is over data and training. Needs the tiles of LC25000 (HISTOFLARE_TEST_DATA).

The features are EfficientNet-Lite0's where the extra ``demo`` is installed, else random ones. ``--protected``
trains the job of the second chapter, beside its bounds without noise: with so few patients no noise that
protects them leaves anything, but without it the settings must learn.

    python -m tests.benchmarks.bench_lung [--seeds 11,12,13,14,15] [--protected]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from histoflare.bags.encoder import load_encoder
from histoflare.bags.encoder_names import EFFICIENTNET, find_packaged_weights
from histoflare.bags.prepare import prepare
from histoflare.commands.console import progress, watch_on
from histoflare.commands.run import show_summary
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.lab.experiment import Experiment, Runtime
from histoflare.lab.run import run_watched
from histoflare.lab.sites import find_sites
from histoflare.lab.summary import summarise
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.assemble import LUNG_LABELS, AssemblyParameters, assemble
from histoflare.slides.manifest import read_manifest
from histoflare.slides.mosaic import MosaicParameters

REPOSITORY = Path(__file__).resolve().parents[2]


def run_seed(
    seed: int, index: Path, folder: Path, job_name: str = "mem_fedavg", rounds: int | None = None
) -> dict:
    """Assemble, prepare and compare for one seed; return the report. ``rounds``: instead of the job's."""
    assemble(index, folder / "slides", AssemblyParameters(seed=seed), LUNG_LABELS)
    encoder = load_encoder(EFFICIENTNET if find_packaged_weights() else "densenet121-random")
    changes = {"seed": seed, "task.labels": sorted(LUNG_LABELS.values())}
    changes |= {"protocol.encoder": encoder.id, "task.features": encoder.features}
    changes |= {} if rounds is None else {"rounds": rounds}
    job = read_job(write_variant(REPOSITORY / "jobs" / job_name, folder / "job", changes))
    found = find_sites(folder / "slides")
    where = {}
    for name, path in (found.sites | found.external).items():
        where[name] = SiteConfiguration({"manifest": path, "bags": folder / "bags" / name})
        parameters = MosaicParameters(mpp=job.task.mpp, patch_px=job.task.patch_px)
        prepare(read_manifest(path, labels=job.task.labels), where[name].files["bags"], encoder, parameters)
    experiment = Experiment(
        job=job,
        sites={name: where[name] for name in found.sites},
        external={name: where[name] for name in found.external},
        runtime=Runtime.INPROCESS,
    )
    with progress() as bars:
        return run_watched(experiment, folder / "run", watch_on(bars), ()).report


def measure(seeds: list[int], index: Path, job_name: str = "mem_fedavg", rounds: int | None = None) -> dict:
    """Return the summary over ``seeds``."""
    reports = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            reports.append(run_seed(seed, index, Path(folder), job_name, rounds))
    return summarise(reports)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", default="11,12,13,14,15")
    arguments.add_argument("--protected", action="store_true")
    chosen = arguments.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    job_name = "mem_dpsgd" if chosen.protected else "mem_fedavg"
    data = Path(os.environ.get("HISTOFLARE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    index = data / "cls_lc25000_lung" / "index.csv"
    if not index.is_file():
        sys.exit(f"skipped: no {index}; set HISTOFLARE_TEST_DATA")
    started = time.monotonic()
    Console(width=100).print(show_summary(measure(seeds, index, job_name)))
    print(f"{time.monotonic() - started:.0f} s for {len(seeds)} seeds")


if __name__ == "__main__":
    main()
