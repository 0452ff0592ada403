"""From slides to a report, as a user does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from histoflare.bags.encoder_names import find_packaged_weights
from histoflare.cli import app
from histoflare.commands.demo import CHAPTER_SETTINGS
from histoflare.commands.options import DEMO_JOBS
from histoflare.flare import processes
from histoflare.flare.job_variant import write_variant
from histoflare.flare.poc import STATE_FILE
from histoflare.privacy.budget import Budget
from histoflare.privacy.ledger import Ledger
from histoflare.synthetic import slides as synthetic
from histoflare.synthetic.slides import SyntheticCohort

pytestmark = pytest.mark.slow

SMALL = ["--hospitals", "2", "--slides-per-hospital", "6", "--rounds", "3", "--patch-px", "112"]
SMALL += ["--patients-per-hospital", "6"]


def histoflare(*arguments: object) -> None:
    """Run a command in a process of its own, as a user does."""
    command = [str(Path(sys.executable).with_name("histoflare")), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr


def here(*arguments: object) -> Any:
    """Run a command in this process, where its process is not what is tested; return the JSON it prints."""
    ended = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert ended.exit_code == 0, ended.exception or ended.output
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The first chapter's job at two small hospitals, in this process's runtime.

    Its slides have a quarter of the usual area.
    """
    out = tmp_path_factory.mktemp("demo")
    settings = CHAPTER_SETTINGS["mem_fedavg"]  # as the first chapter runs it
    job = write_variant(
        repository / "jobs" / "mem_fedavg", tmp_path_factory.mktemp("jobs") / "mem_fedavg", settings
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(synthetic, "SyntheticCohort", partial(SyntheticCohort, um_field=448.0))
        here("demo", "--out", out, "--job", job, "--runtime", "inprocess", *SMALL)
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
    pretrained = find_packaged_weights() is not None
    assert found["encoder"] == ("efficientnet-lite0:579344248a93" if pretrained else "densenet121-random:v1")
    assert "no clipping" in found["privacy"]
    for text in (json.dumps(found), (run_folder / "report.html").read_text()):
        assert str(run_folder) not in text
        assert "-p001" not in text, "no patient or slide is named"
        assert "data:image" not in text, "no pixel of a slide"


def test_each_site_has_a_page_of_its_own(run_folder: Path) -> None:
    for site in ("hospital-1", "hospital-2", "external"):
        page = (run_folder / f"site-{site}.html").read_text()
        assert "data:image/jpeg" in page and f"{site}-p" in page
        others = {"hospital-1", "hospital-2", "external"} - {site}
        assert not [other for other in others if f"{other}-p" in page], "no other site's patients"


def test_both_chapters_run_in_one_federation_with_the_bytes_of_the_demo_without_flare(
    run_folder: Path, tmp_path: Path
) -> None:
    """As ``make demo`` runs them, with one further budget: the first chapter is the run of the fixture."""
    (tmp_path / "slides").symlink_to(run_folder / "slides")
    (tmp_path / "bags").symlink_to(run_folder / "bags")
    before = times(run_folder)
    histoflare("demo", "--out", tmp_path, "--runtime", "poc", "--epsilons", "1", *SMALL)
    one, found = report(run_folder), report(tmp_path)
    first = found["unprotected_run"]
    assert (first["job"], found["job"]) == ("mem_fedavg", "mem_dpsgd")
    assert first["guarantee"]["mechanism"] == "open"
    assert first["protocol"]["sha256"] == found["protocol"]["sha256"], "one question"
    assert first["runtime"] == found["runtime"] == "poc"
    assert first["model_sha256"] == one["model_sha256"], "FLARE's own processes end with the same model"
    assert first["sites"] == one["sites"]
    said = first["evaluated_at_sites"]
    assert set(said) == {*first["sites"], "external"}
    assert said["external"]["auc"] == first["external"]["auc"], "the site comes to the same figure"
    assert all(row["bytes_up"] > 0 for row in first["participation"])
    assert times(run_folder) == before, "slides and bags were kept as they are"
    assert (tmp_path / "unprotected" / "model.safetensors").is_file()
    cost = first["federated"]["accuracy"] - found["federated"]["accuracy"]
    assert found["cost_of_privacy"]["accuracy"] == pytest.approx(cost)
    noiseless = next(entry for entry in found["accuracy_against_epsilon"] if entry["epsilon"] is None)
    cost = noiseless["accuracy"] - found["federated"]["accuracy"]
    assert found["cost_of_noise"]["accuracy"] == pytest.approx(cost)
    for site, gain in first["gain_over_local"].items():
        own = first["local_on_all_sites"][site]["accuracy"]
        assert gain["accuracy"] == pytest.approx(first["federated"]["accuracy"] - own)
    check_protection(tmp_path, found)
    tried = [entry["epsilon"] for entry in found["accuracy_against_epsilon"]]
    assert len(tried) == 3 and None in tried, "the job's own, the further one, and without protection"
    page = (tmp_path / "report.html").read_text()
    assert page.count("Chapter 2") == 1
    assert "add or remove one" in page and "Balanced accuracy against ε" in page
    for figures in found["evaluated_at_sites"].values():
        assert not {"n_patients", "n_slides"} & set(figures), "counts stay"


def check_protection(folder: Path, found: dict[str, Any]) -> None:
    """Hold a report to what is booked at every site."""
    cost = found["guarantee"]
    assert cost["mechanism"] == "dp-sgd" and not cost["seeded_noise"]
    assert len(cost["sites"]) == 2
    for site in found["sites"]:
        assert cost["sites"][site]["updates"] == 3
        assert 0 < cost["sites"][site]["pld"]["epsilon"] <= cost["sites"][site]["rdp"]["epsilon"] <= 8.0
        key = folder / "ledger-keys" / site / "ledger.key"
        ledger = Ledger(folder / "ledgers" / site / "ledger.sqlite", key)
        runs = ledger.summary(Budget(8.0, 1e-5)).runs
        counted = [(run.rounds, run.booked, run.released) for run in runs]
        assert counted == [(3, 3, 3), (1, 1, 1)], "the rounds, and the evaluation of the model"


def test_the_demo_trains_one_protected_job_in_the_simulator(
    run_folder: Path, tmp_path: Path, repository: Path
) -> None:
    """The second chapter's job by itself: booked at every site, and the report says what it cost."""
    (tmp_path / "slides").symlink_to(run_folder / "slides")
    (tmp_path / "bags").symlink_to(run_folder / "bags")
    job = repository / "jobs" / "mem_dpsgd"
    assert job.name == str(DEMO_JOBS[1])
    histoflare("demo", "--out", tmp_path, "--job", job, "--runtime", "simulator", "--epsilons", "", *SMALL)
    found = report(tmp_path)
    check_protection(tmp_path, found)
    assert found["accuracy_against_epsilon"] == []


def test_ctrl_c_ends_everything_and_the_same_command_goes_on(
    run_folder: Path, tmp_path: Path, repository: Path
) -> None:
    """In the middle of the rounds: no process is left, nothing made is lost, the home is untouched."""
    (tmp_path / "slides").symlink_to(run_folder / "slides")
    (tmp_path / "bags").symlink_to(run_folder / "bags")
    home = tmp_path / "home"
    home.mkdir()
    before = times(run_folder)
    arguments = ["demo", "--out", tmp_path, "--job", repository / "jobs" / "mem_fedavg", *SMALL]
    arguments[arguments.index("--rounds") + 1] = "500"
    command = [str(Path(sys.executable).with_name("histoflare")), *map(str, arguments)]
    environment = {**os.environ, "HOME": str(home)}
    demo = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "federation" / STATE_FILE
    until = time.monotonic() + 120
    while not list(tmp_path.glob("federation/kits/*/prod_00/server/*/rounds.json")):
        assert demo.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    name = json.loads(state.read_text())["name"]
    assert len(processes.find(name)) >= 8, "a server and three sites, their jobs, two trainers"
    demo.send_signal(signal.SIGINT)
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "begins the rounds anew" in said
    assert not processes.find(name)
    assert not state.exists(), "the next run is not told that this one is up"
    assert times(run_folder) == before
    assert not list(home.rglob("*"))


def test_a_job_runs_over_the_bags_for_several_seeds(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["--sites", run_folder / "slides", "--bags", run_folder / "bags", "--out", tmp_path]
    job = run_folder / "job" / "mem_fedavg"
    summary = here("run", "--job", job, *arguments, "--seeds", "1,2", "--set", "rounds=2")
    assert summary["seeds"] == [1, 2]
    models = [report(tmp_path / f"seed-{seed}")["model_sha256"] for seed in (1, 2)]
    assert models[0] != models[1]
    values = [report(tmp_path / f"seed-{seed}")["federated"]["accuracy"] for seed in (1, 2)]
    assert summary["cohorts"]["all sites"]["federated"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)


def test_the_model_answers_for_one_slide(run_folder: Path) -> None:
    slide = sorted((run_folder / "slides" / "external" / "slides").glob("*.tif"))[0]
    answer = here("classify", slide, "--model", run_folder)["probabilities"]
    assert set(answer) == {"glandular", "solid"}
    assert sum(answer.values()) == pytest.approx(1)


def test_a_real_slide_goes_from_its_file_to_the_models_answer(run_folder: Path, test_data: Path) -> None:
    slide = test_data / "wsi" / "CMU-1-Small-Region.svs"
    answer = here("classify", slide, "--model", run_folder)
    assert answer["patches"] >= 9
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_on_real_tiles_federated_beats_the_mean_of_local(test_data: Path) -> None:
    """Over two assemblies and fewer rounds: on the test patients of all sites and on the external cohort."""
    from tests.benchmarks.bench_lung import measure

    cohorts = measure([11, 12], test_data / "cls_lc25000_lung" / "index.csv", rounds=12)["cohorts"]
    for cohort in ("all sites", "external"):
        mean = {model: cohorts[cohort][model]["accuracy"]["mean"] for model in ("local", "federated")}
        assert mean["federated"] > mean["local"], cohort
