"""A job that cannot be done: one message says who refused and why, and nothing is left running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from histoflare.errors import JobError
from histoflare.flare import processes
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.flare.poc import STATE_FILE, Federation
from histoflare.flare.workstation import federation_up

from .bags_on_disk import write_site

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def test_a_job_that_the_sites_refuse(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {site: write_site(tmp_path, site, encoder="imported:other") for site in ("clinic-a", "clinic-b")}
    job = read_job(write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "job", {"rounds": 2}))
    phases, names = [], []
    stop = Federation.stop

    def stopped(federation: Federation) -> None:
        if (federation.workspace / STATE_FILE).is_file():
            names.append(json.loads((federation.workspace / STATE_FILE).read_text())["name"])
        stop(federation)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    monkeypatch.setattr(Federation, "stop", stopped)
    up = federation_up([job], sites, {}, tmp_path / "run", phase)
    with pytest.raises(JobError) as caught, up as running:
        running.run(job)
    assert caught.value.reason == "JOB_FAILED"
    assert "0 of 2 rounds" in str(caught.value)
    # FLARE ends the job as soon as one refusal makes least_sites unreachable.
    assert "at least 2 must take part" in str(caught.value)
    assert "clinic-" in str(caught.value)
    assert ": COHORT_INVALID: " in str(caught.value)
    assert phases == ["provision", "start", "federated rounds"]
    assert names and not processes.find(names[0])
