"""A step of DP-SGD on MEM beside a plain step: time and memory of each way to its clipped gradients.

    python -m tests.benchmarks.bench_dp_step [--patches 50 200] [--steps 15] [--threads 1]

MEM is the job's (features 1024, memories 10, dim 128, hidden 256; 1.6 million parameters), a step is eight
records of one slide each, then Adam. ``plain`` has them in one batch and no protection. ``one by one`` is
what training under protection does. The others take the eight in one batch, for comparison: they are no
protection against who chose the model (see ``gradient_engines``). All have the same secure noise.
Time: all take a step in turn in one process, so that a busy machine is busy for all; the fastest. Memory: a
process for each; by how much its peak grows in three steps over what it holds with model and batch loaded.
``noise`` is the time of drawing a step's noise alone, and ``- noise`` the time of the rest of the step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from histoflare.bags.patients import collate_patients
from histoflare.bags.task import collate
from histoflare.privacy.dpsgd import private_gradient
from histoflare.privacy.mechanism import add_noise
from histoflare.privacy.noise import SecureNoise

from ..mem import make_mem_task
from .gradient_engines import ENGINES, sum_of_clipped_gradients

TASK = make_mem_task(["a", "b"], "encoder", max_patches=None)
RECORDS = 8
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Lets glibc give a freed tensor back at once: the peak is then what was in use, not what was kept."""

CASES = ("plain", "one by one", *ENGINES)


def bags(patches: int) -> tuple[list[Tensor], list[int]]:
    """Return bags with features of about an encoder's size: not negative, root mean square near 0.6."""
    generator = torch.Generator().manual_seed(0)
    drawn = [0.6 * torch.randn((patches, 1024), generator=generator).abs() for _ in range(RECORDS)]
    return drawn, [index % 2 for index in range(RECORDS)]


def step_of(case: str, patches: int) -> Callable[[], None]:
    """Return a function that takes one step of a model of its own."""
    model = TASK.build_model()
    optimizer = TASK.build_optimizer(model)
    features, labels = bags(patches)
    noise = SecureNoise()
    plain = collate(features, labels)
    by_patient = collate_patients([[bag] for bag in features], [[label] for label in labels])
    singles = [collate_patients([[bag]], [[label]]) for bag, label in zip(features, labels, strict=True)]

    def plain_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        TASK.loss(model, plain).backward()
        optimizer.step()

    def one_by_one() -> dict[str, Tensor]:
        return private_gradient(
            model,
            TASK.record_losses,
            singles,
            clip_norm=1.0,
            noise_multiplier=1.0,
            batch_size=RECORDS,
            noise=noise,
        ).tensors

    def batched() -> dict[str, Tensor]:
        clipped = sum_of_clipped_gradients(model, TASK.record_losses, by_patient, 1.0, case)
        noised = add_noise(clipped.tensors, std=1.0, noise=noise)
        return {name: tensor.div_(RECORDS) for name, tensor in noised.items()}

    def private_step() -> None:
        gradient = one_by_one() if case == "one by one" else batched()
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name]
        del gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return plain_step if case == "plain" else private_step


def noise_step() -> Callable[[], None]:
    noise, shapes = SecureNoise(), [p.shape for p in TASK.build_model().parameters()]
    return lambda: [noise.normal(shape, 1.0, torch.float32) for shape in shapes] and None


def memory_kib(field: str) -> int:
    """Return VmRSS or VmHWM of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_mib(case: str, patches: int) -> float:
    warm = step_of(case, 2)
    warm()  # the libraries, the engine's included, are loaded
    del warm
    step = step_of(case, patches)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it is not used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_kib("VmRSS")
    for _ in range(3):
        step()
    return (memory_kib("VmHWM") - before) / 1024


def fastest(patches: int, steps: int) -> dict[str, float]:
    runs = {case: step_of(case, patches) for case in CASES} | {"noise": noise_step()}
    seconds: dict[str, list[float]] = {case: [] for case in runs}
    for turn in range(steps + 1):
        for case, step in runs.items():
            started = time.perf_counter()
            step()
            if turn:
                seconds[case].append(time.perf_counter() - started)
    return {case: 1000 * min(times) for case, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_mib(options.memory_of, options.patches[0])))
        return
    print(
        f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{options.threads} thread(s); {RECORDS} records, fastest of {options.steps} steps"
    )
    for patches in options.patches:
        times = fastest(patches, options.steps)
        memory = {}
        for case in CASES:
            command = [sys.executable, "-m", "tests.benchmarks.bench_dp_step", "--memory-of", case]
            command += ["--patches", str(patches), "--threads", str(options.threads)]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | RETURN_FREED)
            memory[case] = json.loads(found.stdout)
        print(f"\n{patches} patches a bag; the noise of a step takes {times['noise']:.1f} ms")
        print(f"{'':>12} {'ms':>8} {'÷ plain':>8} {'- noise':>8} {'÷ plain':>8} {'MiB':>8} {'÷ plain':>8}")
        for case in CASES:
            rest = times[case] - (times["noise"] if case != "plain" else 0.0)
            print(
                f"{case:>12} {times[case]:>8.1f} {times[case] / times['plain']:>8.2f} "
                f"{rest:>8.1f} {rest / times['plain']:>8.2f} "
                f"{memory[case]:>8.0f} {memory[case] / memory['plain']:>8.2f}"
            )


if __name__ == "__main__":
    main()
