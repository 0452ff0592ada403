"""The job through real FLARE server and site processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from histoflare.bags.cohort import load_cohort
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.simulator import run_simulation
from histoflare.rounds.runner import RunResult, run_in_process
from histoflare.rounds.state import hash_state
from histoflare.site.configuration import SiteConfiguration
from histoflare.slides.manifest import read_manifest
from tests.refusals import raises_reason

from .bags_on_disk import LABELS, write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]

SITES = ("clinic-b", "clinic-a", "clinic-c")


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, SiteConfiguration]:
    return {site: write_site(tmp_path / "sites of ours", site) for site in SITES}


def variant(repository: Path, tmp_path: Path, name: str = "mem_fedavg", **changes: object) -> Job:
    return read_job(write_variant(repository / "jobs" / name, tmp_path / "job", changes))


MARK = "HISTOFLARE_TEST_SIMULATION"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[int]]:
    """What runs of all that the test has started, and whatever that has started; other tests may run too."""
    monkeypatch.setenv(MARK, str(tmp_path))

    def running() -> set[int]:
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(MARK) == str(tmp_path):
                    found.add(process.pid)
        return found

    return running


def in_process(job: Job, sites: dict[str, SiteConfiguration]) -> RunResult:
    cohorts = {
        site: load_cohort(
            site,
            read_manifest(where.files["manifest"], LABELS, False),
            where.files["bags"],
            job.task.target,
            job.task.encoder,
        )
        for site, where in sorted(sites.items())
    }
    return run_in_process(job.task, cohorts, job.strategy, job.rounds, job.seed)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mem_fedavg", {"strategy.share": ["head"]}),
        ("mem_cwt", {}),
    ],
    ids=["shared head", "cyclic"],
)
def test_flare_ends_with_the_weights_of_the_in_process_runner(
    repository: Path,
    tmp_path: Path,
    sites: dict[str, SiteConfiguration],
    started: Callable[[], set[int]],
    name: str,
    changes: dict[str, Any],
) -> None:
    """Same job, same data, same global weights, to the last bit; also when only one site is asked."""
    job = variant(repository, tmp_path, name, rounds=3, **changes)
    seen: list[tuple[int, float | None]] = []
    run = run_simulation(job, sites, on_round=lambda *state: seen.append(state))
    other = in_process(job, sites)
    result = run.training
    assert hash_state(result.state) == hash_state(other.state)
    assert {site: hash_state(state) for site, state in run.site_states.items()} == {
        site: hash_state(other.site_states.get(site, {})) for site in sites
    }, "what each site keeps for itself"
    expected = [
        list(job.strategy.topology.plan(index, sorted(SITES), job.seed).trainers) for index in range(3)
    ]
    assert [row["taking_part"] for row in result.rounds] == expected
    rounds, loss = seen[-1]
    assert rounds == 3 and loss is not None and 0 < loss < 10, (
        "the losses that the sites noted for who watches"
    )
    assert not started(), "nothing is left running"


def test_a_site_that_cannot_take_part_sends_a_code_and_the_others_go_on(
    repository: Path, tmp_path: Path, sites: dict[str, SiteConfiguration]
) -> None:
    """Those end with the weights of the in-process runner of two, all of them shared."""
    sites["clinic-b"] = write_site(tmp_path / "other encoder", "clinic-b", encoder="imported:other")
    job = variant(repository, tmp_path, rounds=2, least_sites=2)
    result = run_simulation(job, sites).training
    others = {site: where for site, where in sites.items() if site != "clinic-b"}
    assert hash_state(result.state) == hash_state(in_process(job, others).state)
    assert [row["taking_part"] for row in result.rounds] == [["clinic-a", "clinic-c"]] * 2
    assert [row["refused"] for row in result.rounds] == [{"clinic-b": "COHORT_INVALID"}] * 2


def test_a_job_that_stops_is_an_error_with_its_log(
    repository: Path, tmp_path: Path, sites: dict[str, SiteConfiguration]
) -> None:
    job = variant(repository, tmp_path, rounds=2, least_sites=3)
    sites["clinic-b"] = SiteConfiguration(
        {"manifest": tmp_path / "nowhere.csv", "bags": tmp_path / "nowhere"}
    )
    with raises_reason("JOB_FAILED", "0 of 2 rounds"):
        run_simulation(job, sites)


def test_ctrl_c_leaves_nothing_running(
    repository: Path, tmp_path: Path, sites: dict[str, SiteConfiguration], started: Callable[[], set[int]]
) -> None:
    job = variant(repository, tmp_path, rounds=500)
    listed = [(name, str(where.files["manifest"]), str(where.files["bags"])) for name, where in sites.items()]
    code = f"""
import os, psutil, signal
from pathlib import Path
from typing import Any
from histoflare.flare.job import read_job
from histoflare.flare.simulator import run_simulation
from histoflare.site.configuration import SiteConfiguration
sites = {{name: SiteConfiguration({{"manifest": Path(m), "bags": Path(b)}}) for name, m, b in {listed!r}}}
def on_round(done, loss):
    if done >= 1:
        children = psutil.Process().children(recursive=True)
        print(sum(child.environ().get({MARK!r}) == {str(tmp_path)!r} for child in children), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
run_simulation(read_job(Path({str(job.folder)!r})), sites, on_round=on_round)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert int(ended.stdout.split()[-1]) > len(SITES)  # there was something to end
    assert not started()
