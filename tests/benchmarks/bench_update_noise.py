"""Clip and noise on a whole update: ``privacy.mechanism`` beside the drawing of that much noise alone.

    python -m tests.benchmarks.bench_update_noise [--parameters 55412026] [--repeats 5] [--threads 1]

Each figure comes from a process of its own: seconds (median of the repeats) and the growth of the process's
peak memory, both for one call. The update is float32, of about the shapes of a network. ``naive`` is what
is often written in its place: ``torch.cat`` of all tensors, ``norm``, ``torch.randn``; its noise comes from a
generator that can be predicted, so it is a measure of speed only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from histoflare.privacy.mechanism import release_update
from histoflare.privacy.noise import SecureNoise

CLIP_NORM, NOISE_MULTIPLIER = 0.5, 1.0
CASES = ("noise alone", "release_update", "naive torch")


def update(parameters: int) -> dict[str, Tensor]:
    """Return an update in tensors of 768 x 3072, as they are in a transformer, and a rest."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(parameters, generator=generator) * 1e-3
    return {f"layer_{index}": part.clone() for index, part in enumerate(flat.split(768 * 3072))}


def naive(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    flat = flat * min(1.0, CLIP_NORM / float(flat.norm()))
    flat = flat + torch.randn(flat.shape) * NOISE_MULTIPLIER * CLIP_NORM
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def peak_kib(*, reset: bool = False) -> int:
    """Return the most resident memory since the last reset, in KiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(case: str, parameters: int, repeats: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    tensors, noise = update(parameters), SecureNoise()
    runs: dict[str, Callable[[], object]] = {
        "noise alone": lambda: {
            name: noise.normal(tensor.shape, NOISE_MULTIPLIER * CLIP_NORM, torch.float32)
            for name, tensor in tensors.items()
        },
        "release_update": lambda: release_update(
            tensors, clip_norm=CLIP_NORM, noise_multiplier=NOISE_MULTIPLIER, noise=noise
        ),
        "naive torch": lambda: naive(tensors),
    }
    noise.normal((1000,), 1.0)
    before = peak_kib(reset=True)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        kept = runs[case]()
        seconds.append(time.perf_counter() - started)
        del kept
    return {"seconds": statistics.median(seconds), "mib": (peak_kib() - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=55_412_026)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.parameters, options.repeats, options.threads)))
        return
    print(
        f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{options.threads} thread(s), {options.parameters:,} float32, "
        f"{options.parameters * 4 / 2**20:.0f} MiB"
    )
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        found[case] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    floor = found["noise alone"]["seconds"]
    print(f"{'':>16} {'seconds':>9} {'÷ noise alone':>14} {'peak, MiB':>10}")
    for case, figures in found.items():
        seconds, mib = figures["seconds"], figures["mib"]
        print(f"{case:>16} {seconds:>9.3f} {seconds / floor:>14.2f} {mib:>10.0f}")


if __name__ == "__main__":
    main()
