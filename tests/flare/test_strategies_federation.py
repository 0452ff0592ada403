"""One federation of real FLARE processes runs every strategy in turn: the bytes of the in-process runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kits import Agreement
from histoflare.flare.poc import COMPLETED, Federation
from histoflare.flare.result import read_result
from histoflare.rounds.registry import find_class
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state
from histoflare.rounds.strategies import STRATEGIES
from histoflare.rounds.strategies.hub import NamedHub

from .bags_on_disk import write_site
from .test_federation import load

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-a", "clinic-b", "clinic-c")
ELSEWHERE = {"fedavg", "fedsgd", "cyclic"}
"""Strategies that have a federation of their own."""

FIELDS: dict[str, dict[str, Any]] = {"fedrep": {"share": ["blocks"]}, "krum": {"faulty": 0}}
SMALL = {
    "rounds": 2,
    "evaluate": None,
    "least_sites": 3,
    "task.model.memories": 2,
    "task.model.dim": 8,
    "task.model.hidden": 8,
}


def test_every_strategy_ends_with_the_bytes_of_the_in_process_runner(
    tmp_path: Path, repository: Path
) -> None:
    original = repository / "jobs" / "mem_fedavg"
    sites = {site: write_site(tmp_path / "sites", site) for site in SITES}
    jobs = {}
    for name in sorted(set(STRATEGIES) - ELSEWHERE):
        named = {"sites": list(SITES)} if issubclass(find_class(STRATEGIES[name]), NamedHub) else {}
        table = {"name": name, **FIELDS.get(name, {}), **named}
        jobs[name] = write_variant(original, tmp_path / "jobs" / name, {**SMALL, "strategy": table})
    agreed = next(iter(jobs.values()))
    with Federation.prepare(tmp_path / "run", sites, Agreement(agreed)) as federation:
        federation.start()
        running = {name: federation.admin.submit(job) for name, job in jobs.items()}
        for name, job_id in running.items():
            assert federation.follow(job_id, timeout_s=300) == COMPLETED, name
            folder = federation.admin.download(job_id, tmp_path / "results") / "workspace"
            result, job = read_result(folder), read_job(jobs[name])
            assert [row["taking_part"] for row in result.rounds] == [list(SITES)] * 2
            cohorts = {site: load(job.task, site, where) for site, where in sites.items()}
            run = run_in_process(job.task, cohorts, job.strategy, job.rounds, job.seed)
            assert hash_state(result.state or {}) == hash_state(run.handed_out), name
            for row, notes in zip(result.rounds, run.notes, strict=True):
                assert {key: row[key] for key in notes} == notes, name
