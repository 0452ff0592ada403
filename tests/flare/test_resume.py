"""A job from where another one stopped, and what cannot be gone on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from histoflare.errors import JobError
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.resume import job_name, read_run, write_resumed
from histoflare.model_file import ENTRY, describe_model
from histoflare.rounds.state import State, model_state
from histoflare.storage import write_json
from tests.refusals import raises_reason

NOT_A_NUMBER = torch.tensor([0.0, float("nan")])


def write_model(path: Path, state: State, facts: Any) -> None:
    path.write_bytes(save(state, metadata={ENTRY: json.dumps(facts)}))


@pytest.fixture
def stopped(tmp_path: Path, repository: Path) -> Path:
    """A download of a job that stopped after three rounds of thirty."""
    folder = tmp_path / "download"
    write_variant(repository / "jobs" / "mem_fedavg", folder / "job", {"task.model.memories": 2})
    workspace = folder / "workspace"
    workspace.mkdir()
    job = read_job(folder / "job")
    facts = describe_model(job.task, run="run-1", round_index=2)
    write_model(workspace / "global_model.safetensors", model_state(job.task.build_model()), facts)
    rows = [{"round": index, "sites": ["a", "b"], "taking_part": ["a", "b"]} for index in range(4)]
    write_json(workspace / "rounds.json", rows)
    return folder


def resume(stopped: Path, target: Path) -> Path:
    return write_resumed(read_run(stopped), target)


def test_it_goes_on_with_the_next_round_for_the_same_sites(stopped: Path, tmp_path: Path) -> None:
    job = resume(stopped, tmp_path / "resumed")
    read = read_job(job)
    assert (read.run, read.start_round) == ("run-1", 3)
    meta = json.loads((job / "meta.json").read_text())
    assert meta["deploy_map"] == {"app_server": ["server"], "app": ["a", "b"]}
    only_the_server_s = {path.name for path in (job / "app_server" / "config").iterdir()} - {
        path.name for path in (job / CONFIG_FOLDER).iterdir()
    }
    assert only_the_server_s == {"start_model.safetensors", "earlier_rounds.json"}, (
        "no site is told who took part, or sent the model twice"
    )
    rows = json.loads((job / "app_server" / "config" / "earlier_rounds.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2], "the round that was broken off is run again"


def test_a_job_that_goes_on_can_be_gone_on_from(stopped: Path, tmp_path: Path) -> None:
    shutil.rmtree(stopped / "job")
    resume(_copy(stopped, tmp_path, with_job=True), tmp_path / "one").rename(stopped / "job")
    job = resume(stopped, tmp_path / "two")
    meta = json.loads((job / "meta.json").read_text())
    assert set(meta["deploy_map"]) == {"app_server", "app"}
    assert read_job(job).task.model.memories == 2


def _copy(stopped: Path, tmp_path: Path, with_job: bool) -> Path:
    copy = shutil.copytree(stopped, tmp_path / "copy")
    if with_job:
        repository = Path(__file__).resolve().parents[2]
        write_variant(repository / "jobs" / "mem_fedavg", copy / "job", {"task.model.memories": 2})
    return copy


def change_model(change: Callable[[State, dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        job = read_job(folder / "job")
        state = model_state(job.task.build_model())
        facts: Any = describe_model(job.task, run="run-1", round_index=2)
        replaced = change(state, facts)
        write_model(
            folder / "workspace" / "global_model.safetensors", state, facts if replaced is None else replaced
        )

    return apply


def spoil(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "reason", "says"),
    [
        (
            lambda folder: (folder / "workspace" / "global_model.safetensors").unlink(),
            "MODEL_FILE_MISSING",
            "global_model.safetensors",
        ),
        (
            spoil("workspace/global_model.safetensors", "short"),
            "MODEL_FILE_INVALID",
            "global_model.safetensors",
        ),
        (change_model(lambda state, facts: [1]), "MODEL_FILE_INVALID", "JSON"),
        (change_model(lambda state, facts: facts.update(round=-7)), "MODEL_FILE_INVALID", "round"),
        (change_model(lambda state, facts: facts.update(round="abc")), "MODEL_FILE_INVALID", "round"),
        (change_model(lambda state, facts: facts.update(run="../../x")), "MODEL_FILE_INVALID", "run"),
        (change_model(lambda state, facts: facts.pop("task") and None), "MODEL_FILE_INVALID", "task"),
        (change_model(lambda state, facts: facts.update(round=None)), "MODEL_FILE_INVALID", "run"),
        (
            change_model(lambda state, facts: state.update({"head.bias": NOT_A_NUMBER})),
            "STATE_INVALID",
            "head.bias",
        ),
        (change_model(lambda state, facts: state.update(a=torch.zeros(3))), "STATE_INVALID", ": a "),
        (
            change_model(lambda state, facts: facts.update(round=29)),
            "JOB_INVALID",
            "job make mem_evaluate --model",
        ),
        (spoil("workspace/rounds.json", "["), "JOB_INVALID", "rounds.json: "),
        (spoil("workspace/rounds.json", "null"), "JOB_INVALID", "rounds.json: "),
        (spoil("workspace/rounds.json", '[{"round": "a"}]'), "JOB_INVALID", "rounds.json: "),
        (spoil("job/meta.json", "null"), "JOB_INVALID", "job/meta.json: "),
        (lambda folder: (folder / "job" / "meta.json").unlink(), "JOB_INVALID", "meta.json"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_clear_error(
    stopped: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str, says: str
) -> None:
    damage(stopped)
    with raises_reason(reason, says):
        resume(stopped, tmp_path / "resumed")
    assert not [path for path in tmp_path.iterdir() if path != stopped], "nothing half-written"


@pytest.mark.parametrize("name", ["mem_fedavg", "a", "A-1_b.c", "x" * 64, "-"])
def test_a_name_that_is_one(name: str) -> None:
    assert job_name({"name": name}) == name
    assert job_name({}) == "job"


OUTSIDE = [
    "../x",
    "/tmp/x",
    "..",
    ".",
    ".hidden",
    "",
    "a/b",
    "a\\b",
    "a\n",
    "a\0",
    "é",
    "x" * 65,
    None,
    7,
    ["a"],
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_elsewhere_is_refused(name: Any) -> None:
    with pytest.raises(JobError) as caught:
        job_name({"name": name})
    assert caught.value.reason == "JOB_INVALID"


def test_nothing_is_written_where_a_name_leads(stopped: Path, tmp_path: Path) -> None:
    meta = json.loads((stopped / "job" / "meta.json").read_text())
    (stopped / "job" / "meta.json").write_text(json.dumps({**meta, "name": str(tmp_path / "elsewhere")}))
    with pytest.raises(JobError) as caught:
        resume(stopped, tmp_path / "resumed")
    assert caught.value.reason == "JOB_INVALID"
    assert not [path for path in tmp_path.iterdir() if path != stopped]


@pytest.mark.parametrize(
    "place",
    [
        "job",
        "job/app",
        "job/app/config",
        "job/app/config/protocol.toml",
        "job/meta.json",
        "workspace",
        "workspace/rounds.json",
        "workspace/global_model.safetensors",
    ],
)
def test_a_link_in_a_download_is_followed_nowhere(stopped: Path, tmp_path: Path, place: str) -> None:
    """The same content behind a link: only the link is wrong with it."""
    path, moved = stopped / place, tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    else:
        moved.write_text("of this machine")
    path.symlink_to(moved)
    with pytest.raises(JobError) as caught:
        resume(stopped, tmp_path / "resumed")
    assert caught.value.reason == "JOB_INVALID" and str(path) in str(caught.value)
    assert not (tmp_path / "resumed").exists()
