"""What a secure sum costs one site: ``masked_sum`` beside ``float32``.

    python -m tests.benchmarks.bench_secure_sum [--repeats 5] [--threads 1] [--only 1000:4 55412026:4]

For each number of weights and of sites: seconds between the end of training and the vector that leaves
(median of the repeats; of the clock, and of a CPU, which a busy machine changes less), bytes sent, and the
most memory that the process takes beyond what it had with the update in it. Both end with the SHA-256 of what
leaves, which a site books. ``masked_sum`` also makes the site's keys and hello, looks at the hellos of all
others (Ed25519), derives a pad for each and adds it. Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from histoflare.privacy.secure_sum.hello import Hello, RoundKeys, Transcript, check_hellos
from histoflare.privacy.secure_sum.identity import Identity, verify
from histoflare.rounds.state import State, hash_state, n_bytes
from histoflare.rounds.transports.float32 import PLAIN
from histoflare.rounds.transports.masked_sum import MaskedSum
from tests.benchmarks.bench_update_noise import peak_kib, update

CASES = ("float32", "masked_sum")
SIZES = ((1_000, 4), (1_000, 16), (1_000_000, 4), (1_000_000, 16), (55_412_026, 4))
MINE = "site_0"


def say_hello(site: str) -> tuple[RoundKeys, Hello]:
    keys, identity = RoundKeys.new(site, "run", 0, 0), Identity()
    return keys, keys.hello(identity.certificate, identity.sign)


def masked(tensors: State, others: list[Hello]) -> State:
    keys, hello = say_hello(MINE)
    hellos = (hello, *others)
    check_hellos(hellos, keys, verify)
    pads = keys.pads(Transcript("job", "run", 0, 0, "model", hellos))
    return pads.add_to(MaskedSum().pack(tensors))


def measure(case: str, weights: int, sites: int, repeats: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    tensors = update(weights)
    others = [say_hello(f"site_{index}")[1] for index in range(1, sites)]
    runs: dict[str, Callable[[], State]] = {
        "float32": lambda: PLAIN.pack(tensors),
        "masked_sum": lambda: masked(tensors, others),
    }
    masked(update(10), others)  # what is loaded at first use
    before = peak_kib(reset=True)
    seconds, cpu, sent = [], [], 0
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        leaving = runs[case]()
        hash_state(leaving)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
        sent = n_bytes(leaving)
        del leaving
    more = (peak_kib() - before) / 1024
    medians = {"seconds": statistics.median(seconds), "cpu": statistics.median(cpu)}
    return {**medians, "bytes": sent, "mib": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="weights:sites")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SIZES
    if arguments.only:
        sizes = tuple((int(w), int(n)) for w, _, n in (each.partition(":") for each in arguments.only))
    if arguments.case:
        print(json.dumps(measure(arguments.case, *sizes[0], arguments.repeats, arguments.threads)))
        return
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, load {load:.1f}")
    for weights, sites in sizes:
        print(f"{weights:,} weights, {sites} sites; as float32 {4 * weights / 2**20:,.1f} MiB")
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--only", f"{weights}:{sites}"]
            command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"  {case:10}  {found['seconds']:9.4f} s  {found['cpu']:9.4f} s of a CPU  "
                f"{found['bytes']:13,} bytes  {found['mib']:8.1f} MiB more"
            )


if __name__ == "__main__":
    main()
