"""``histoflare job``: variants of jobs, and what FLARE would refuse."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from histoflare.bags.task import BagTask
from histoflare.cli import app
from histoflare.commands import job as job_command
from histoflare.commands.plain_progress import PlainProgress
from histoflare.errors import HistoflareError, JobError
from histoflare.flare import admin as admin_module
from histoflare.flare.admin import Admin
from histoflare.flare.job import read_job
from histoflare.flare.job_variant import try_variant, write_variant
from histoflare.model_file import describe_model, read_model_file, save_model, write_model_file
from histoflare.privacy.protocol import hash_protocol
from histoflare.rounds.state import hash_state, model_state
from tests.refusals import raises_reason


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_variant_for_some_sites(tmp_path: Path, repository: Path) -> None:
    job = repository / "jobs" / "mem_fedavg"
    run("job", "make", job, "--out", tmp_path / "job", "--set", "seed=9", "--sites", "b, a")
    assert read_job(tmp_path / "job").seed == 9
    meta = json.loads((tmp_path / "job" / "meta.json").read_text())
    assert meta["deploy_map"] == {"app": ["server", "b", "a"]}


@pytest.mark.parametrize(
    ("options", "reason", "says"),
    [
        (["--sites", ","], "JOB_INVALID", "--sites"),
        (["--sites", "a b,c"], "JOB_INVALID", "'a b,c'"),
        (["--sites", "../x,c"], "JOB_INVALID", "'../x,c'"),
        (["--sites", "a,a"], "JOB_INVALID", "'a,a'"),
        (["--sites", "server,a"], "JOB_INVALID", "'server,a'"),
        (["--sites", "a"], "JOB_INVALID", "least_sites"),
        (["--set", "purpose.x=1"], "JOB_INVALID", "purpose.x"),
        (["--set", "protocol=5"], "JOB_INVALID", "protocol: "),
        (["--model", "nowhere.safetensors"], "MODEL_FILE_MISSING", "nowhere.safetensors"),
    ],
)
def test_what_flare_would_refuse_is_refused_before(
    tmp_path: Path, repository: Path, options: list[str], reason: str, says: str
) -> None:
    with raises_reason(reason, says):
        run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "job", *options)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_job_is_not_made_inside_another(tmp_path: Path, repository: Path) -> None:
    run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "job")
    before = sorted(tmp_path.rglob("*"))
    with raises_reason("JOB_INVALID", tmp_path / "job" / "app" / "inside"):
        run("job", "make", tmp_path / "job", "--out", tmp_path / "job" / "app" / "inside")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_folder_is_kept(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "mine").mkdir()
    with raises_reason("JOB_INVALID", tmp_path / "mine"):
        run("job", "make", repository / "jobs" / "mem_fedavg", "--out", tmp_path / "mine")


TINY = {"task.model.memories": 2, "task.model.dim": 8, "task.model.hidden": 8, "seed": 3}


def test_a_job_starts_from_a_model_file_or_a_run_s_folder(tmp_path: Path, repository: Path) -> None:
    """The model of a run, or the one that a consortium's server wrote; its task comes with it."""
    task = try_variant(repository / "jobs" / "mem_fedavg", TINY).task
    state = model_state(task.build_model())
    save_model(tmp_path / "run" / "model.safetensors", state, task, mosaic=task.mosaic)
    facts = describe_model(task, mosaic=task.mosaic, run="run-1", round_index=2)
    write_model_file(tmp_path / "result" / "workspace" / "global_model.safetensors", state, facts)
    for place in ("run", "run/model.safetensors", "result", "result/workspace"):
        out = tmp_path / "jobs" / place.replace("/", "-")
        options = ("--model", tmp_path / place, "--sites", "a,b", "--out", out)
        run("job", "make", repository / "jobs" / "mem_evaluate", *options)
        made = read_job(out)
        assert (made.task.model.memories, made.task.model.hidden) == (2, 8)
        start = read_model_file(out / "app_server" / "config" / "start_model.safetensors", BagTask)
        assert hash_state(start.state) == hash_state(state)


def test_an_evaluation_of_a_download_has_the_protocol_that_its_model_was_trained_under(
    tmp_path: Path, repository: Path
) -> None:
    """Nothing is copied by hand; without the job beside it the command says that sites will refuse."""
    changes = {**TINY, "rounds": 7, "protocol.split.test_fraction": 0.3}
    trained = write_variant(repository / "jobs" / "mem_fedavg", tmp_path / "result" / "job", changes)
    job = read_job(trained)
    task, state = job.task, model_state(job.task.build_model())
    facts = describe_model(
        task, mosaic=task.mosaic, protocol_sha256=hash_protocol(job.protocol), run="run-1", round_index=6
    )
    write_model_file(tmp_path / "result" / "workspace" / "global_model.safetensors", state, facts)
    options = ("job", "make", repository / "jobs" / "mem_evaluate", "--sites", "a,b")
    said = run(*options, "--model", tmp_path / "result", "--out", tmp_path / "ask")
    made = read_job(tmp_path / "ask")
    assert (made.protocol, made.run) == (job.protocol, "run-1") and "PROTOCOL_MISMATCH" not in said
    copy = shutil.copy(tmp_path / "result" / "workspace" / "global_model.safetensors", tmp_path)
    said = run(*options, "--model", copy, "--out", tmp_path / "alone")
    assert "PROTOCOL_MISMATCH" in said and read_job(tmp_path / "alone").protocol != job.protocol


def test_a_model_of_another_kind_or_of_nobody_s_is_refused(tmp_path: Path, repository: Path) -> None:
    task = try_variant(repository / "jobs" / "mem_fedavg", TINY).task
    state = model_state(task.build_model())
    save_model(tmp_path / "model.safetensors", state, task)
    save_file(state, tmp_path / "bare.safetensors")
    for job, model, says in (
        ("dhunet_evaluate", "model.safetensors", "histoflare classify"),
        ("mem_evaluate", "bare.safetensors", "bare.safetensors"),
    ):
        options = ("--model", tmp_path / model, "--sites", "a,b", "--out", tmp_path / "job")
        with raises_reason("MODEL_FILE_INVALID", tmp_path / model, says):
            run("job", "make", repository / "jobs" / job, *options)
    assert not (tmp_path / "job").exists()


def test_a_scope_that_no_kit_has_is_said(tmp_path: Path, repository: Path) -> None:
    options = ("job", "make", repository / "jobs" / "mem_fedavg", "--out")
    said = run(*options, tmp_path / "wrong", "--scope", "nosuch")
    assert "SCOPE_UNKNOWN" in said and "dp-patient" in said
    assert "SCOPE_UNKNOWN" not in run(*options, tmp_path / "right", "--scope", "trusted-server")


class TestSubmit:
    def test_only_with_an_administrator_s_kit(self, tmp_path: Path, repository: Path) -> None:
        with raises_reason("FEDERATION_FAILED", tmp_path, "fed_admin.json"):
            run("job", "submit", repository / "jobs" / "mem_fedavg", "--kit", tmp_path)

    def test_only_a_job(self, tmp_path: Path) -> None:
        with pytest.raises(JobError):
            run("job", "submit", tmp_path, "--kit", tmp_path)

    def test_a_link_is_not_followed_to_what_it_leads_to(self, tmp_path: Path) -> None:
        (tmp_path / "job").mkdir()
        (tmp_path / "secret").write_text("key")
        (tmp_path / "job" / "notes.txt").symlink_to(tmp_path / "secret")
        admin = Admin("lead", tmp_path)
        with pytest.raises(HistoflareError) as caught:
            admin.submit(tmp_path / "job")
        assert caught.value.reason == "JOB_REFUSED"

    def test_waits_until_it_has_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A question that the server does not answer is asked again, for a while."""
        said = iter(["SUBMITTED", None, "RUNNING", "FINISHED:COMPLETED"])

        def status(self: Admin, job_id: str) -> str:
            word = next(said, None)
            if word is None:
                raise HistoflareError("no answer", reason="FEDERATION_STOPPED")
            return word

        monkeypatch.setattr(Admin, "status", status)
        monkeypatch.setattr(admin_module, "STATUS_SECONDS", 0.0)
        seen: list[str] = []
        assert Admin("lead", tmp_path).wait("job", 60.0, seen.append) == "FINISHED:COMPLETED"
        assert seen == ["SUBMITTED", "RUNNING", "FINISHED:COMPLETED"]
        monkeypatch.setattr(admin_module, "LOST_SECONDS", 0.0)
        with raises_reason("FEDERATION_STOPPED"):
            Admin("lead", tmp_path).wait("job", 60.0)

    def test_a_preset_is_submitted_and_a_failure_says_who_refused_and_what_to_do(
        self, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def download(self: Admin, job_id: str, target: Path) -> Path:
            (target / job_id / "workspace").mkdir(parents=True)
            row = {
                "round": 0,
                "taking_part": [],
                "refused": {"b": "PROTOCOL_MISMATCH", "a": "COHORT_INVALID"},
                "finished": False,
            }
            (target / job_id / "workspace" / "rounds.json").write_text(json.dumps([row]))
            return target / job_id

        def wait(self: Admin, job_id: str, longest_seconds: float, on_status: Callable[[str], None]) -> str:
            on_status("RUNNING")
            return "FINISHED:EXECUTION_EXCEPTION"

        lines: list[str] = []
        clock = itertools.count(0, 11)  # each look at it is 11 s later
        bars = PlainProgress(lines.append, lambda: float(next(clock)))
        monkeypatch.setattr(job_command, "progress", lambda: bars)
        monkeypatch.setattr(admin_module, "read_administrator", lambda kit: "lead")
        monkeypatch.setattr(Admin, "submit", lambda self, folder: seen.append(read_job(folder)) or "1")
        monkeypatch.setattr(Admin, "wait", wait)
        monkeypatch.setattr(Admin, "download", download)
        monkeypatch.setattr(Admin, "deployment", lambda *_: ["server: OK", "a: OK", "c: JOB_VERSION"])
        folder = repository / "jobs" / "mem_dpsgd"
        with raises_reason("JOB_FAILED", "FINISHED:EXECUTION_EXCEPTION") as caught:
            run("job", "submit", folder, "--kit", tmp_path, "--preset", "adnan", "--wait")
        assert [job.rounds for job in seen] == [116]
        assert any("RUNNING" in line for line in lines), "a pipe is told, too"
        lines = str(caught.value).splitlines()
        assert [line.split(": ")[:2] for line in lines[1:3]] == [
            ["  a", "COHORT_INVALID"],
            ["  b", "PROTOCOL_MISMATCH"],
        ]
        assert lines[3].startswith("  c: did not take the job: JOB_VERSION")
        assert "histoflare poc start --sites" in str(caught.value) and "every kit" in str(caught.value)


def test_show_says_how_the_sites_work_together_and_who_is_asked(tmp_path: Path, repository: Path) -> None:
    job = repository / "jobs" / "mem_fedavg"
    settings = ("strategy.clients_per_round=3", "transport.name=float16", 'evaluation_only=["external"]')
    options = [part for each in settings for part in ("--set", each)]
    run("job", "make", job, "--out", tmp_path / "job", *options)
    shown = json.loads(run("job", "show", tmp_path / "job", "--json"))
    assert shown["strategy"]["name"] == "fedavg" and shown["strategy"]["clients_per_round"] == 3
    assert shown["transport"]["name"] == "float16"
    assert shown["evaluate"] is True and shown["evaluation_only"] == ["external"]


@pytest.mark.parametrize("job", ["mem_dpsgd", "linear_shared"])
def test_show_says_what_the_evaluation_costs_those_asked_about(repository: Path, job: str) -> None:
    shown = json.loads(run("job", "show", repository / "jobs" / job, "--json"))
    cost = shown["evaluation_cost"]
    assert cost["share"] == pytest.approx(0.25, rel=1e-3) and cost["delta"] == 1e-5
    assert cost["epsilon"] == pytest.approx(4.45, abs=0.05) and cost["seeded_noise"] is False
    unprotected = json.loads(run("job", "show", repository / "jobs" / "mem_fedavg", "--json"))
    assert "evaluation_cost" not in unprotected


def test_show_takes_a_preset(repository: Path) -> None:
    shown = json.loads(run("job", "show", repository / "jobs" / "mem_dpsgd", "--preset", "adnan", "--json"))
    assert shown["rounds"] == 116 and shown["privacy"]["noise_multiplier"] == 4.0
    with raises_reason("JOB_INVALID", "'none'", "adnan, per-site"):
        run("job", "show", repository / "jobs" / "mem_dpsgd", "--preset", "none")
