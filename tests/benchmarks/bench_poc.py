"""Seconds per round beyond training, and memory over many rounds: four sites, real FLARE processes.

    .venv/bin/python -m tests.benchmarks.bench_poc                    # 1k, 1M and 55M parameters
    .venv/bin/python -m tests.benchmarks.bench_poc --memory           # 50 rounds at 1M
    .venv/bin/python -m tests.benchmarks.bench_poc --dhunet           # 20 rounds of DHUnet, twice
    .venv/bin/python -m tests.benchmarks.bench_poc --sum 1k:4,1M:16   # a secure sum, parameters:sites

The sites answer with an update of zeros; everything else is as in production: mTLS, admission, the trainer's
process, gate, guard, our aggregator, a checkpoint every round. Beside it, in the same run, FLARE's own
ScatterAndGather, executor API and aggregator with the same polling, without any of that and without writing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from histoflare.commands.console import make_table, out
from histoflare.flare import processes
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kit_scripts import ARENAS, FLAT, START_SCRIPT
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import read_rounds
from histoflare.rounds.state import model_state
from histoflare.site.configuration import SiteConfiguration
from histoflare.storage import write_json

REPOSITORY = Path(__file__).resolve().parents[2]
IDLE = Path(__file__).resolve().parent / "idle"
SITES = [f"site-{index:02}" for index in range(1, 5)]
SIZES = {
    "1k": {"features": 32, "model.memories": 1, "model.dim": 8, "model.hidden": 8},
    "1M": {"features": 1024, "model.memories": 4, "model.dim": 128, "model.hidden": 192},
    "55M": {"features": 1024, "model.memories": 10, "model.dim": 5200, "model.hidden": 256},
}
LAUNCHERS = "nvflare.app_common.job_launcher"
PARTS = {
    "server": "nvflare.private.fed.app.server.server_train",
    "server's job": "nvflare.private.fed.app.server.runner_process",
    "site": "nvflare.private.fed.app.client.client_train",
    "site's job": "nvflare.private.fed.app.client.worker_process",
    "site's trainer": "histoflare.site.child",
}


def write_stock_job(folder: Path, ours: Path, rounds: int, n_sites: int) -> Path:
    """Write a job of FLARE's own parts with the tensors and the polling of ``ours``."""
    shapes = {name: list(t.shape) for name, t in model_state(read_job(ours).task.build_model()).items()}
    common = "nvflare.app_common"
    server = {
        "format_version": 2,
        "server": {"heart_beat_timeout": 600, "task_request_interval": 0.1},
        "workflows": [
            {
                "id": "sag",
                "path": f"{common}.workflows.scatter_and_gather.ScatterAndGather",
                "args": {
                    "min_clients": n_sites,
                    "num_rounds": rounds,
                    "wait_time_after_min_received": 0,
                    "task_check_period": 0.05,
                    "snapshot_every_n_rounds": 0,
                    "persistor_id": "persistor",
                    "aggregator_id": "aggregator",
                    "shareable_generator_id": "generator",
                },
            }
        ],
        "components": [
            {"id": "persistor", "path": "idle_flare.IdlePersistor", "args": {"shapes": shapes}},
            {
                "id": "generator",
                "path": f"{common}.shareablegenerators.full_model_shareable_generator."
                "FullModelShareableGenerator",
            },
            {
                "id": "aggregator",
                "path": f"{common}.aggregators.intime_accumulate_model_aggregator."
                "InTimeAccumulateWeightedAggregator",
                "args": {"expected_data_kind": "WEIGHT_DIFF"},
            },
        ],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["train"], "executor": {"path": "idle_flare.IdleExecutor"}}],
    }
    write_json(folder / "app" / "config" / "config_fed_server.json", server)
    write_json(folder / "app" / "config" / "config_fed_client.json", client)
    meta = {"name": "stock", "min_clients": n_sites, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}}
    write_json(folder / "meta.json", meta)
    return folder


class Memory:
    """Samples the resident memory of a federation's processes."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._stop = threading.Event()
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            found: dict[str, list[float]] = {}
            for process in processes.find(self._federation.kits.name):
                try:
                    command, size = process.cmdline(), process.memory_info().rss / 2**20
                except psutil.Error:
                    continue
                for part, module in PARTS.items():
                    if module in command:
                        found.setdefault(part, []).append(size)
            self.samples.append((time.time(), {part: max(sizes) for part, sizes in found.items()}))

    def between(self, start: float, end: float, part: str) -> str:
        """Return the mean and the most MiB of a part (its largest process) between two times."""
        known = [row[part] for when, row in self.samples if start <= when <= end and part in row]
        return f"{statistics.fmean(known):.0f}, {max(known):.0f}"


def measure(
    size: str, rounds: int, folder: Path, stock: bool, n_sites: int = 4, transport: str = "float32"
) -> tuple[list[dict[str, Any]] | list[float], Memory]:
    """Run a job that does nothing; return its rows (ours) or seconds per round (FLARE's own), and memory."""
    from tests.flare.bags_on_disk import write_site

    width, names = SIZES[size], [f"site-{index:02}" for index in range(1, n_sites + 1)]
    changes = {"rounds": rounds, "least_sites": n_sites, "evaluate": False, "transport.name": transport}
    changes |= {f"task.{n}": v for n, v in width.items()}
    job = write_variant(REPOSITORY / "jobs" / "mem_fedavg", folder / "job", changes)
    sites = {site: write_site(folder / "sites", site, features=width["features"]) for site in names}
    return run_idle(job, sites, rounds, folder, stock)


def measure_dhunet(
    rounds: int, transfer: str, folder: Path
) -> tuple[list[dict[str, Any]] | list[float], Memory]:
    """Run rounds of DHUnet at full size that train nothing, with two sites."""
    from tests.masks.made import LABELS, make_site

    changes = {
        "rounds": rounds,
        "transport.name": transfer,
        "task.labels": list(LABELS),
        "task.background": LABELS[0],
        "task.window_px": 224,
        "task.stride_px": 224,
    }
    job = write_variant(REPOSITORY / "jobs" / "dhunet_fedavg", folder / "job", changes)
    sites = {
        site: SiteConfiguration({"images": make_site(folder / "sites" / site, seed, side_px=224)})
        for seed, site in enumerate(SITES[:2])
    }
    return run_idle(job, sites, rounds, folder, stock=False)


def run_idle(
    job: Path, sites: dict[str, SiteConfiguration], rounds: int, folder: Path, stock: bool
) -> tuple[list[dict[str, Any]] | list[float], Memory]:
    """Run a job whose sites train nothing."""
    with Federation.prepare(folder / "run", sites, Agreement(job)) as federation:
        environment = {"PYTHONPATH": str(IDLE)}
        if stock:
            job = write_stock_job(folder / "stock", job, rounds, len(sites))
            for name in ("server", *sites):
                local = federation.kits.kit(name) / "local"
                (local / "privacy.json").unlink(missing_ok=True)
                script = federation.kits.kit(name) / "startup" / START_SCRIPT
                script.write_text(script.read_text().replace(FLAT, ARENAS))
                resources = json.loads((local / "resources.json.default").read_text())
                resources["class_allow_list"] = ["nvflare.", "idle_flare."]
                for part in resources["components"]:
                    if part["id"] == "process_launcher":
                        side = "Server" if name == "server" else "Client"
                        module = f"{LAUNCHERS}.{side.lower()}_process_launcher"
                        part["path"] = f"{module}.{side}ProcessJobLauncher"
                    if part["id"] == "job_manager":  # FLARE's own, which takes any job
                        part["path"] = "nvflare.apis.impl.job_def_manager.SimpleJobDefManager"
                        part["args"]["uri_root"] = str(folder / "jobs")
                resources["components"] = [
                    part for part in resources["components"] if not part["path"].startswith("histoflare.")
                ]
                write_json(local / "resources.json.default", resources)
                federation.kits.sign(name)
        federation.start(environment=environment)
        with Memory(federation) as memory:
            job_id = federation.admin.submit(job)
            status = federation.follow(job_id, timeout_s=1800)
            if status != COMPLETED:
                raise SystemExit(f"{status}\n{processes.tail(federation.log('server'), 30)}")
            result = federation.admin.download(job_id, folder / "result") / "workspace"
        return (stock_times(result / "log.txt") if stock else read_rounds(result)), memory


def stock_times(log: Path) -> list[float]:
    """Return when each round ended, from the server's log."""
    stamps = [line[:23] for line in log.read_text().splitlines() if " finished." in line and "Round " in line]
    return [
        time.mktime(time.strptime(stamp[:19], "%Y-%m-%d %H:%M:%S")) + int(stamp[20:]) / 1000
        for stamp in stamps
    ]


def per_round(ends: list[float]) -> float:
    """Return the median seconds of a round; the first, which starts processes, left out."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--sizes", default="1k,1M,55M")
    arguments.add_argument("--rounds", type=int, default=12)
    arguments.add_argument(
        "--memory", type=int, nargs="?", const=50, help="so many rounds at 1M: memory over time"
    )
    arguments.add_argument(
        "--dhunet",
        type=int,
        nargs="?",
        const=20,
        help="so many rounds of DHUnet at full size: time and memory",
    )
    arguments.add_argument("--sum", help="a secure sum beside float32 and FLARE's own: 1k:4,1M:16, …")
    given = arguments.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if given.sum:
        show_sum(given.sum.split(","), given.rounds)
        return
    if given.dhunet:
        show_dhunet(given.dhunet)
        return
    if given.memory:
        show_memory(given.memory)
        return
    table = make_table(
        "parameters", "s per round", "FLARE's own", "ratio", "server's job MiB", "site's job MiB"
    )
    for size in given.sizes.split(","):
        rounds = given.rounds if size != "55M" else max(4, given.rounds // 3)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            rows, memory = measure(size, rounds, Path(one), stock=False)
            ends, _ = measure(size, rounds, Path(other), stock=True)
            parameters = sum(
                tensor.numel()
                for tensor in model_state(read_job(Path(one) / "job").task.build_model()).values()
            )
        ours, theirs = per_round([row["unix_time"] for row in rows]), per_round(ends)
        peak = {part: max(row.get(part, 0.0) for _, row in memory.samples) for part in PARTS}
        table.add_row(
            f"{parameters:,}",
            f"{ours:.2f}",
            f"{theirs:.2f}",
            f"{ours / theirs:.2f}",
            str(round(peak["server's job"])),
            str(round(peak["site's job"])),
        )
    out.print(table)


def show_sum(asked: list[str], rounds: int) -> None:
    """Print seconds and bytes of a round under a secure sum, in float32 and with FLARE's own parts."""
    table = make_table(
        *("parameters", "sites", "secure sum, s", "float32, s", "FLARE's own, s", "sum ÷ FLARE's"),
        *("MB up, sum", "MB up, float32"),
    )
    for each in asked:
        size, _, n_sites = each.partition(":")
        turns = rounds if size != "55M" else max(4, rounds // 3)
        found: dict[str, tuple[float, float]] = {}
        for transport in ("masked_sum", "float32", "stock"):
            with tempfile.TemporaryDirectory() as folder:
                is_stock = transport == "stock"
                kind = "float32" if is_stock else transport
                rows, _ = measure(size, turns, Path(folder), is_stock, int(n_sites), kind)
            ends = rows if is_stock else [row["unix_time"] for row in rows]
            found[transport] = per_round(ends), 0.0 if is_stock else rows[-1]["bytes_up"] / 1e6
        table.add_row(
            size,
            n_sites,
            *(f"{found[name][0]:.2f}" for name in ("masked_sum", "float32", "stock")),
            f"{found['masked_sum'][0] / found['stock'][0]:.2f}",
            *(f"{found[name][1]:.1f}" for name in ("masked_sum", "float32")),
        )
        out.print(table)


def show_memory(rounds: int) -> None:
    """Print the memory of each kind of process in five parts of a run."""
    with tempfile.TemporaryDirectory() as folder:
        rows, memory = measure("1M", rounds, Path(folder), stock=False)
    show_parts(rows, memory, rounds)


def show_dhunet(rounds: int) -> None:
    """Print time, bytes and memory of DHUnet's rounds, for either precision of transfer."""
    for transfer in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            rows, memory = measure_dhunet(rounds, transfer, Path(folder))
        seconds = per_round([row["unix_time"] for row in rows])
        out.print(
            f"{transfer}: {seconds:.1f} s a round, {rows[-1]['bytes_up'] / 2e6:.0f} MB up from each site"
        )
        show_parts(rows, memory, rounds)


def show_parts(rows: list[dict[str, Any]], memory: Memory, rounds: int) -> None:
    """Print memory by parts of the run."""
    ends = [row["unix_time"] for row in rows]
    step = rounds // 5
    table = make_table("MiB: mean, most", *(f"rounds {i + 1}–{i + step}" for i in range(0, rounds, step)))
    for part in PARTS:
        parts = [(ends[i], ends[min(i + step, rounds) - 1]) for i in range(0, rounds, step)]
        table.add_row(part, *(memory.between(*times, part) for times in parts))
    out.print(table)


if __name__ == "__main__":
    main()
