"""``histoflare poc start`` agrees on a job that its sites' bags fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from histoflare.commands.poc import _write_job
from histoflare.flare.job import read_job
from tests.flare.bags_on_disk import relabel, write_site
from tests.refusals import raises_reason


def test_the_job_that_fits_is_in_the_workspace(tmp_path: Path, repository: Path) -> None:
    shipped = repository / "jobs" / "mem_dpsgd"
    site = relabel(write_site(tmp_path, "a", encoder="imported:uni", features=16), "LUAD", "LUSC")
    sites = {"a": site, "external": replace(write_site(tmp_path, "external"), evaluation_only=True)}
    agreed = _write_job(tmp_path / "poc-run", shipped, None, sites, "bags")
    assert agreed == tmp_path / "poc-run" / "job" / "mem_dpsgd"
    task = read_job(agreed).task
    assert (task.labels, task.encoder, task.features) == (("LUAD", "LUSC"), "imported:uni", 16)
    with raises_reason("JOB_INVALID", agreed):
        _write_job(tmp_path / "poc-run", agreed, None, sites, "bags")
    # another start with sites that the shipped job fits leaves no earlier one to be submitted by mistake
    two = {site: write_site(tmp_path, site) for site in ("b", "c")}  # as many as the job wants at least
    assert _write_job(tmp_path / "poc-run", shipped, None, two, "bags") == shipped
    assert not (tmp_path / "poc-run" / "job").exists()
    preset = _write_job(tmp_path / "poc-run", shipped, "adnan", sites, "bags")
    assert read_job(preset).rounds == 116
