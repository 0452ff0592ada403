"""The job that fits the sites of a workstation is the one that is agreed on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from histoflare.flare.job import read_job
from histoflare.lab.fitted_job import write_fitted
from histoflare.lab.watch import Watch
from histoflare.site.configuration import SiteConfiguration
from tests.flare.bags_on_disk import relabel, write_site
from tests.refusals import raises_reason


def write(
    jobs: Path,
    job: Path,
    sites: dict[str, SiteConfiguration],
    preset: str | None = None,
    heard: list[str] | None = None,
) -> Path:
    watch = Watch(on_warning=[].append if heard is None else heard.append)
    return write_fitted(job, preset, sites, "bags", jobs, watch, lambda choice: None)


def test_it_is_in_the_folder_for_it(tmp_path: Path, repository: Path) -> None:
    shipped, jobs = repository / "jobs" / "mem_dpsgd", tmp_path / "poc-run" / "job"
    site = relabel(write_site(tmp_path, "a", encoder="imported:uni", features=16), "LUAD", "LUSC")
    sites = {"a": site, "external": replace(write_site(tmp_path, "external"), evaluation_only=True)}
    agreed = write(jobs, shipped, sites)
    assert agreed == jobs / "mem_dpsgd"
    task = read_job(agreed).task
    assert (task.labels, task.encoder, task.features) == (("LUAD", "LUSC"), "imported:uni", 16)
    with raises_reason("JOB_INVALID", agreed):
        write(jobs, agreed, sites)
    # another start with sites that the shipped job fits leaves no earlier one to be submitted by mistake
    two = {site: write_site(tmp_path, site) for site in ("b", "c")}  # as many as the job wants at least
    assert write(jobs, shipped, two) == shipped
    assert not jobs.exists()
    assert read_job(write(jobs, shipped, sites, "adnan")).rounds == 116


def test_the_sites_that_are_there_can_run_it(repository: Path, tmp_path: Path) -> None:
    job, jobs = repository / "jobs" / "mem_fedavg", tmp_path / "job"
    sites = {name: write_site(tmp_path, name, slides=5) for name in ("a", "b")}
    assert read_job(write(jobs, job, sites)).least_sites == 2
    assert read_job(write(jobs, job, {"a": sites["a"]})).least_sites == 1
    faulty = sites["b"].files["manifest"]
    faulty.write_text(faulty.read_text().replace("train", "trian"))
    heard: list[str] = []
    assert read_job(write(jobs, job, sites, heard=heard)).least_sites == 1
    assert [text.partition(":")[0] for text in heard] == ["b will refuse the job (MANIFEST_INVALID)"]
    with raises_reason("MANIFEST_INVALID", "'trian'"):
        write(jobs, job, {"b": sites["b"]})


@pytest.mark.parametrize("job", ["mem_fedavg", "mem_dpsgd"])
def test_a_patient_at_two_sites_is_a_warning_unless_the_job_is_protected(
    repository: Path, tmp_path: Path, job: str
) -> None:
    sites = {name: write_site(tmp_path, name, slides=5) for name in ("a", "b")}
    manifest = sites["b"].files["manifest"]
    manifest.write_text(manifest.read_text().replace("b-p3", "a-p3"))
    heard: list[str] = []
    if job == "mem_dpsgd":
        with raises_reason("COHORT_INVALID", "patient a-p3"):
            write(tmp_path / "job", repository / "jobs" / job, sites)
    else:
        assert write(tmp_path / "job", repository / "jobs" / job, sites, heard=heard).name == job
        assert "patient a-p3" in heard[0]
