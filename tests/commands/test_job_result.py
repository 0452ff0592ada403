"""``histoflare job result`` on made downloads: what happened in words, and the two files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from histoflare.count_form import name_of
from histoflare.errors import JobError
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import write_variant
from histoflare.model_file import describe_model, write_model_file
from histoflare.report.page import write_page
from histoflare.report.report_file import read_report
from histoflare.rounds.state import hash_state, model_state
from histoflare.storage import write_json
from tests.commands.test_job import run
from tests.refusals import raises_reason

TINY = {"task.model.memories": 2, "task.model.dim": 8, "task.model.hidden": 8}
SITES = ["a", "b", "c"]


def row(index: int, **changes: Any) -> dict[str, Any]:
    """A round: b refuses, c is late."""
    said = {"validation/balanced_accuracy": 0.5 + 0.125 * index}
    return {
        "round": index,
        "sites": SITES,
        "asked": SITES,
        "taking_part": ["a"],
        "refused": {"b": "PURPOSE_NOT_ALLOWED"},
        "no_answer": ["c"],
        "absent": [],
        "metrics": {"a": said},
        "validation": 0.5 + 0.125 * index,
        "bytes_up": 10,
        "bytes_down": 30,
    } | changes


@pytest.fixture
def result(tmp_path: Path, repository: Path) -> Path:
    folder = tmp_path / "result"
    changes = {**TINY, "rounds": 2, "least_sites": 1}
    write_variant(repository / "jobs" / "mem_fedavg", folder / "job", changes, sites=SITES)
    job = read_job(folder / "job")
    facts = describe_model(job.task, run="run-1", round_index=1)
    write_model_file(
        folder / "workspace" / "global_model.safetensors", model_state(job.task.build_model()), facts
    )
    write_json(folder / "workspace" / "rounds.json", [row(0), row(1)])
    write_json(folder / "workspace" / "sites.json", {"a": "river"})
    return folder


@pytest.fixture
def evaluation(tmp_path: Path, repository: Path, result: Path) -> Path:
    """What came back of the job that asked about the result's model."""
    folder = tmp_path / "evaluation"
    model = result / "workspace" / "global_model.safetensors"
    job = repository / "jobs" / "mem_evaluate"
    run("job", "make", job, "--model", model, "--sites", "a,b,c", "--out", folder / "job")
    workspace = folder / "workspace"
    shutil.copytree(folder / "job" / "app_server", workspace / "app_server")
    shutil.copy(folder / "job" / "meta.json", workspace)
    shutil.rmtree(folder / "job")
    write_json(workspace / "rounds.json", [row(0, taking_part=["a", "c"], no_answer=[])])
    write_json(workspace / "evaluation.json", {"a": {"balanced_accuracy": 0.75}, "c": {"auc": 0.5}})
    return folder


def test_who_took_part_refused_or_was_late_and_how_to_ask(result: Path) -> None:
    said = run("job", "result", result)
    assert "river" in said and "PURPOSE_NOT_ALLOWED" in said and "c was late in rounds 1–2" in said
    assert "0.500 in round 1 and 0.625 in round 2" in said
    assert "--sites a,b,c --scope open --set protocol.stop.rounds=2" in " ".join(said.split())
    report = read_report(result / "report.json")
    assert report["model_sha256"] == hash_state(model_state(read_job(result / "job").task.build_model()))
    assert {name for each in report["participation"] for name in each["taking_part"]} == {"river"}
    assert report["evaluated_at_sites"] is None and report["sites"] == {}
    page = (result / "report.html").read_text()
    assert "Balanced accuracy on validation patients" in page, "the learning curve"
    write_page(report, result / "again.html")
    assert (result / "again.html").read_text() == page, "one page, whoever reads the report"


def test_an_evaluation_of_the_same_model(result: Path, evaluation: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("job", "result", result, evaluation, "--out", out, "--json")
    report = json.loads(said[said.index("{") :])
    assert report == json.loads((out / "report.json").read_text())
    assert report["evaluated_at_sites"] == {"river": {"balanced_accuracy": 0.75}, "c": {"auc": 0.5}}
    assert report["evaluation_refused"] == {"b": "PURPOSE_NOT_ALLOWED"}
    assert not (result / "report.json").exists()
    assert "minimum_patients" in run("job", "result", result, evaluation, "--out", out), "c's is not let out"


def test_an_evaluation_at_the_end_of_the_training_job(result: Path) -> None:
    workspace = result / "workspace"
    write_json(workspace / "evaluation.json", {"a": {"balanced_accuracy": 0.75}})
    write_json(workspace / "evaluation_round.json", row(2, refused={"b": "EVALUATION_NOT_ALLOWED"}))
    best = row(3, refused={"a": "EVALUATIONS_EXHAUSTED"})
    write_json(workspace / "best_evaluation_round.json", best)
    said = run("job", "result", result)
    assert "minimum_patients" not in said
    assert "Ask the sites" not in said and "Best model: river" in said and "EVALUATIONS_EXHAUSTED" in said
    report = read_report(result / "report.json")
    assert report["evaluated_at_sites"] == {"river": {"balanced_accuracy": 0.75}}
    assert report["evaluation_refused"] == {"b": "EVALUATION_NOT_ALLOWED"}


def test_what_does_not_belong_together_is_refused(result: Path, evaluation: Path) -> None:
    with raises_reason("JOB_INVALID", evaluation, "histoflare job result RESULT"):
        run("job", "result", evaluation)
    with raises_reason("JOB_INVALID", result, "'mem_fedavg'"):
        run("job", "result", result, result)
    job = read_job(result / "job")
    other = {name: tensor + 1 for name, tensor in model_state(job.task.build_model()).items()}
    facts = describe_model(job.task, run="run-1", round_index=1)
    write_model_file(result / "workspace" / "global_model.safetensors", other, facts)
    with raises_reason("JOB_INVALID", evaluation, result):
        run("job", "result", result, evaluation)
    write_json(result / "workspace" / "rounds.json", [{"round": 0}])
    with raises_reason("JOB_INVALID", result / "workspace", "'taking_part'"):
        run("job", "result", result)
    (result / "workspace" / "rounds.json").unlink()
    with raises_reason("JOB_INVALID", "rounds.json"):
        run("job", "result", result)
    assert not (result / "report.json").exists()


def test_show_says_where_a_resumed_job_starts(result: Path, tmp_path: Path, repository: Path) -> None:
    facts = describe_model(read_job(result / "job").task, run="run-1", round_index=0)
    model = model_state(read_job(result / "job").task.build_model())
    write_model_file(result / "workspace" / "global_model.safetensors", model, facts)
    run("resume", result, "--out", tmp_path / "resumed")
    shown = json.loads(run("job", "show", tmp_path / "resumed", "--json"))
    assert shown["starts"].startswith("round 2 of 2; rounds 1 to 1 are done")
    assert "of round 1 of the run run-1" in shown["starts"]


def test_show_says_the_cost_beside_what_policies_allow(repository: Path) -> None:
    job, place = repository / "jobs" / "mem_dpsgd", repository / "provisioning"
    shown = json.loads(run("job", "show", job, "--policies", place, "--json"))
    (found,) = shown["allowed"]
    assert found["epsilon_allowed"] == 8.0 and found["problem"] is None
    assert shown["cost"]["pld"]["epsilon"] < shown["cost"]["rdp"]["epsilon"] <= found["job"]["epsilon"] <= 8.0
    with pytest.raises(JobError) as caught:
        run("job", "show", job, "--policies", repository / "docs")
    assert caught.value.reason == "SCOPE_UNKNOWN"


def test_make_says_a_changed_protocol(tmp_path: Path, repository: Path) -> None:
    job = repository / "jobs" / "mem_fedavg"
    after = run("job", "make", job, "--set", "rounds=7", "--out", tmp_path / "one")
    digest_of = json.loads(run("job", "show", tmp_path / "one", "--json"))["protocol_sha256"]
    assert digest_of in after and "stop.rounds: 30 → 7" in after and "PROTOCOL_MISMATCH" in after
    assert "PROTOCOL_MISMATCH" not in run("job", "make", job, "--set", "seed=7", "--out", tmp_path / "two")


def test_counts_of_cohorts(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "counts"
    write_variant(repository / "jobs" / "cohort_statistics", folder / "job", {})
    label = {name_of("label", "glandular"): 30.0, name_of("label", "solid"): 12.0, "n_patients": 42.0}
    write_json(folder / "workspace" / "rounds.json", [row(0, taking_part=["a", "c"], no_answer=[])])
    write_json(folder / "workspace" / "evaluation.json", {"a": label, "c": label})
    write_json(folder / "workspace" / "sites.json", {"a": "river"})
    said = " ".join(run("job", "result", folder, "--least", "30", "--epsilon", "8").split())
    assert "river" in said and "PURPOSE_NOT_ALLOWED" in said and "At ε = 8 about" in said
    assert "At least 30 patients of glandular: yes." in said and "of solid: no." in said
    assert not (folder / "report.html").exists()
    found = json.loads(run("job", "result", folder, "--json"))
    assert found[0]["counts"] == {"river": [30.0] * 3, "c": [30.0] * 3, "together": [60.0] * 3}
