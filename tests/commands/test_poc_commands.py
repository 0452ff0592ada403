"""What ``histoflare poc`` prints to be pasted."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from histoflare.commands.poc import _facts
from histoflare.errors import HistoflareError
from histoflare.flare import poc
from histoflare.flare.kits import Agreement, Kits
from histoflare.flare.poc import STATE_FILE, Federation, refuse_running
from histoflare.shipped import JOBS
from histoflare.storage import write_json
from tests.refusals import raises_reason

FOLDERS = ("run", "my run", "it's", 'a"b', "klinik-zürich", "a&b;$c", "x/../up")


@pytest.fixture(params=FOLDERS)
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder: Path = tmp_path / request.param
    folder.mkdir(parents=True)
    kits = Kits("none-of-this-name", str(folder / "kits"), "server", "lead@x.example", ("clinic-a",), 1)
    write_json(folder / STATE_FILE, asdict(kits))
    return folder


def test_commands_can_be_pasted(workspace: Path) -> None:
    federation = Federation.open(workspace)
    assert ".." not in str(federation.workspace)
    commands = _facts(federation)["commands"]
    kit = str(federation.kits.kit("lead@x.example"))
    assert shlex.split(commands["console"])[1:] == [f"{kit}/startup/fl_admin.sh"]
    assert shlex.split(commands["submit a job"])[1:] == ["job", "submit", "JOB", "--kit", kit]
    stop = shlex.split(commands["stop"])[1:]
    assert stop == ["poc", "stop", "--workspace", str(workspace.resolve())]


@pytest.mark.parametrize(
    ("protocol", "named"),
    [(str(JOBS / "linear_shared"), "linear_shared"), ("/elsewhere/my job", "/elsewhere/my job")],
)
def test_a_job_that_fits_as_it_is_is_the_one_to_submit(workspace: Path, protocol: str, named: str) -> None:
    federation = Federation.open(workspace)
    federation.kits = replace(federation.kits, protocol=protocol)
    assert shlex.split(_facts(federation)["commands"]["submit a job"])[3] == named
    (federation.workspace / "job" / "fitted").mkdir(parents=True)
    written = shlex.split(_facts(federation)["commands"]["submit a job"])[3]
    assert written == str(federation.workspace / "job" / "fitted"), "one that was fitted comes first"


def test_so_can_that_of_a_refusal(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poc.processes, "find", lambda name, *_: [name])
    with pytest.raises(HistoflareError) as caught:
        refuse_running(workspace)
    command = str(caught.value).partition("Stop it first: ")[2]
    assert shlex.split(command) == ["histoflare", "poc", "stop", "--workspace", str(workspace)]


def test_a_workspace_in_which_results_would_be_lost_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with raises_reason("FEDERATION_FAILED", tmp_path / "a\\b"):
        Federation.prepare(tmp_path / "a\\b", {}, Agreement(JOBS / "mem_fedavg"))
    assert not list(tmp_path.iterdir())
