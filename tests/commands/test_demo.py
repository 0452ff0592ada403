"""From slides to a report, as a user does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = ["--hospitals", "2", "--slides-per-hospital", "6", "--rounds", "3", "--patch-px", "112"]


def histoflare(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("histoflare")), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == code, ended.stderr
    return ended


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A demo of two small hospitals, in this process's runtime."""
    out = tmp_path_factory.mktemp("demo")
    job = repository / "jobs" / "mem_fedavg"
    histoflare("demo", "--out", out, "--job", job, "--runtime", "inprocess", *SMALL)
    return out


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def times(folder: Path) -> dict[str, int]:
    """Return when each slide and bag was written."""
    made = [*folder.glob("slides/*/slides/*.tif"), *folder.glob("bags/*/*.h5")]
    return {str(path): path.stat().st_mtime_ns for path in made}


def test_the_report_compares_all_models(run_folder: Path) -> None:
    found = report(run_folder)
    assert set(found["sites"]) == {"hospital-1", "hospital-2"}
    assert found["external"]["n_slides"] > 0
    assert found["encoder"] == "densenet121-random:v1"
    assert "no clipping" in found["privacy"]
    text = json.dumps(found)
    assert str(run_folder) not in text
    assert "-p001" not in text, "no patient or slide is named"


def test_the_same_demo_gives_the_same_bytes_through_flare(
    run_folder: Path, tmp_path: Path, repository: Path
) -> None:
    """FLARE's own processes end with the model of the first run, and nothing is made again."""
    (tmp_path / "slides").symlink_to(run_folder / "slides")
    (tmp_path / "bags").symlink_to(run_folder / "bags")
    job, before = repository / "jobs" / "mem_fedavg", times(run_folder)
    histoflare("demo", "--out", tmp_path, "--job", job, "--runtime", "simulator", *SMALL)
    one, other = report(run_folder), report(tmp_path)
    assert other["runtime"] == "simulator"
    assert one["model_sha256"] == other["model_sha256"]
    assert one["sites"] == other["sites"]
    assert times(run_folder) == before, "slides and bags were kept as they are"


def test_a_job_runs_over_the_bags_for_several_seeds(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--sites", run_folder / "slides", "--bags", run_folder / "bags", "--out", tmp_path]
    job = run_folder / "job" / "mem_fedavg"
    ended = histoflare("run", "--job", job, *arguments, "--seeds", "1,2", "--set", "rounds=2", "--json")
    summary = json.loads(ended.stdout)
    assert summary["seeds"] == [1, 2]
    models = [report(tmp_path / f"seed-{seed}")["model_sha256"] for seed in (1, 2)]
    assert models[0] != models[1]
    values = [report(tmp_path / f"seed-{seed}")["federated"]["accuracy"] for seed in (1, 2)]
    assert summary["cohorts"]["all sites"]["federated"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)


def test_the_model_answers_for_one_slide(run_folder: Path) -> None:
    slide = sorted((run_folder / "slides" / "external" / "slides").glob("*.tif"))[0]
    ended = histoflare("predict", run_folder / "model.safetensors", slide, "--json")
    answer = json.loads(ended.stdout)["probabilities"]
    assert set(answer) == {"glandular", "solid"}
    assert sum(answer.values()) == pytest.approx(1)


def test_a_real_slide_goes_from_its_file_to_the_models_answer(run_folder: Path, test_data: Path) -> None:
    slide = test_data / "wsi" / "CMU-1-Small-Region.svs"
    answer = json.loads(histoflare("predict", run_folder / "model.safetensors", slide, "--json").stdout)
    assert answer["patches"] >= 9
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_on_real_tiles_federated_beats_the_mean_of_local(test_data: Path) -> None:
    """Over three assemblies: on the test patients of all sites and on the external cohort."""
    from tests.benchmarks.bench_lung import measure

    cohorts = measure([11, 12, 13], test_data / "cls_lc25000_lung" / "index.csv")["cohorts"]
    for cohort in ("all sites", "external"):
        mean = {model: cohorts[cohort][model]["accuracy"]["mean"] for model in ("local", "federated")}
        assert mean["federated"] > mean["local"], cohort
