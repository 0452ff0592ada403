"""The installed command as a shell sees it: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from histoflare import cli

COMMAND = Path(sys.executable).parent / "histoflare"


def histoflare(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    command = [str(COMMAND), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    # Unbuffered output would hide what only comes up when it is flushed at the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, text=True, timeout=120, check=False, env=environment, **streams)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "north.csv"
    path.write_text("slide,patient,label\na.svs,1,x\nb.svs,2,y\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["slide", "nonsense"], "No such command"),
        (["--nonsense"], "No such option"),
        (["slide", "info"], "Missing argument"),
        (["mosaic", "a.svs", "--out", "o", "--patch-px", "many"], "Invalid value"),
        (["demo", "--runtime", "moon"], "'moon' is not one of"),
        (["run", "--sites", "s", "--bags", "b", "--out", "o", "--runtime", "moon"], "'moon' is not one of"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = histoflare(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_debug_shows_where(tmp_path: Path) -> None:
    done = histoflare("slide", "info", tmp_path / "a :x: [b].svs", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/a :x: [b].svs: no such slide")
    debugged = histoflare("--debug", "slide", "info", tmp_path / "a.svs")
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr


def test_a_full_disk_behind_stdout_is_no_success(manifest: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = histoflare("manifest", "check", manifest, "--no-files", "--json", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_a_reader_that_has_enough_is_no_fault(manifest: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = histoflare("manifest", "check", manifest, "--no-files", "--json", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_output_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    done = histoflare(
        *("synthetic", "slides", "--hospitals", "1", "--no-external", "--slides-per-hospital", "2"),
        *("--um-field", "200", "--out", tmp_path / "taken"),
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/taken/hospital-1") and "Not a directory" in last
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_one_message_and_code_130(tmp_path: Path) -> None:
    slides = tmp_path / "hospital-1" / "slides"
    arguments = ["synthetic", "slides", "--out", str(tmp_path), "--slides-per-hospital", "500"]
    process = subprocess.Popen([COMMAND, *arguments, "--um-field", "200"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not slides.is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped"
    assert errors.count("stopped") == 1 and "Traceback" not in errors


def test_what_is_said_of_a_stopped_command_is_true_of_it() -> None:
    known = {command.name for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    assert set(cli.AFTER_STOP) <= known
    says = cli._describe_stop
    assert "anew" in says(["--debug", "run", "--sites", "x"]) and "goes on" in says(["segment", "a.svs"])
    assert "anew" in says(["demo"]) and says(["ledger", "show"]) == says([]) == "stopped"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("x"), "error: unexpected KeyError: 'x'"),
        (MemoryError(), "error: there is not enough memory"),
        (OSError(28, "No space left on device", "/b/a.h5"), "error: /b/a.h5: No space left on device"),
    ],
)
def test_what_nobody_foresaw_is_one_message_too(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["histoflare", "demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(says) and len(printed.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["histoflare", "--debug", "demo"])
    with pytest.raises(type(error)):
        cli.main()


def test_every_command_has_an_example_and_every_option_is_described() -> None:
    def commands(command: Any, name: str) -> list[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        if below is None:
            return [(name, command)]
        return [each for word, one in below.items() for each in commands(one, f"{name} {word}")]

    found = commands(typer.main.get_command(cli.app), "histoflare")
    assert len(found) >= 12
    for name, command in found:
        assert f"Example: {name} " in (command.help or ""), name
        assert not [option.name for option in command.params if not option.help], name
        assert "\n" not in (command.help or "").replace("\n\n", ""), (
            f"{name}: a line ends before the terminal's"
        )


def test_tables_without_a_terminal_cut_nothing_off(tmp_path: Path) -> None:
    labels = ["a-long-name-of-a-class-[b]-" * 3 + end for end in "xy"]
    path = tmp_path / "a-manifest-whose-name-is-long.csv"
    path.write_text("slide,patient,label\n" + "".join(f"{label}.svs,{label},{label}\n" for label in labels))
    done = histoflare("manifest", "check", path, "--no-files")
    assert done.returncode == 0 and "…" not in done.stdout and "[b]" in done.stdout
    about = json.loads(histoflare("manifest", "check", path, "--no-files", "--json").stdout)
    assert about["labels"] == dict.fromkeys(labels, 1)


@pytest.mark.slow
def test_a_demo_that_left_a_slide_out_says_so_and_ends_with_3(tmp_path: Path, repository: Path) -> None:
    made = histoflare(
        *("synthetic", "slides", "--out", tmp_path / "s", "--hospitals", "2", "--no-external"),
        *("--slides-per-hospital", "4", "--um-field", "200"),
    )
    assert made.returncode == 0, made.stderr
    manifest = tmp_path / "s" / "hospital-1" / "manifest.csv"
    (manifest.parent / "slides" / "[b]roken.svs").write_bytes(b"no slide")
    with manifest.open("a") as rows:
        rows.write("slides/[b]roken.svs,x,solid,train,hospital-1,F,50-59,none\n")
    done = histoflare(
        *("demo", "--slides", tmp_path / "s", "--out", tmp_path / "my run [b]", "--json"),
        *("--job", repository / "jobs" / "mem_fedavg", "--runtime", "inprocess"),
        *("--rounds", "1", "--patch-px", "32"),
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "my run [b]" / "report.json").read_text())
    (line,) = [line for line in done.stderr.splitlines() if "roken.svs left out: " in line]
    assert line.startswith("hospital-1: slides/[b]roken.svs left out: ") and "not a slide" in line
    assert done.stderr.splitlines()[-1].startswith("1 slide was left out"), "why it ends with 3"
    assert len(list((tmp_path / "my run [b]" / "bags" / "hospital-1").glob("*.h5"))) == 4


def test_every_command_takes_a_short_h_and_a_shell_completes(tmp_path: Path) -> None:
    for arguments in ([], ["classify"], ["masks", "import", "binary"]):
        done = histoflare(*arguments, "-h")
        assert done.returncode == 0 and "Usage: histoflare" in done.stdout
    environment = {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}"}
    command = ["env", "_HISTOFLARE_COMPLETE=source_bash", str(COMMAND)]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = (
        f"{script}\nCOMP_WORDS=(histoflare masks import b); COMP_CWORD=3\n"
        '_histoflare_completion histoflare; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "binary", done.stderr
