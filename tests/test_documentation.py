"""What the documents say can be done as it stands there: commands, links, files and tests that they name.

A command line of a document is taken as it stands. What cannot stand there as such is a placeholder (a word
in capitals), and :data:`PLACEHOLDERS` says what a reader would put in its place. docs/adding.md's code is
run by ``test_documented_code.py``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from histoflare.cli import app
from histoflare.flare.job import read_job
from histoflare.flare.job_choice import choose_job
from histoflare.model_file import save_model
from histoflare.reasons import REASONS
from histoflare.shipped import JOBS, job_names
from tests.flare.bags_on_disk import relabel, write_site
from tests.masks.made import make_site as make_image_site

UsageError: type[Any] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer has a click of its own
ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "poc/*.md", "provisioning/*.md", "custom/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n?)+", re.MULTILINE)
INLINE = re.compile(r"`(histoflare [^`]+)`")
TABLE_CHOICE = re.compile(r"(\S+)((?: \\\| \S+)+)")

PLACEHOLDERS = {
    "SLIDE": "a.svs",
    "RUN": "a-run",
    "DIR": "a-folder",
    "BAGS": "a-folder",
    "H5DIR": "a-folder",
    "NAME": "uni2",
    "MANIFEST": "manifest.csv",
    "MANIFEST…": "manifest.csv",
    "M": "0.5",
    "N": "4",
    "GDC_MANIFEST": "gdc.txt",
    "FOLDER": "a-folder",
    "CSV": "results.csv",
    "QUPATH.geojson": "a.geojson",
    "MASK": "mask.tiff",
    "JOB": "mem_fedavg",
    "KIT": "a-kit",
    "FILE": "a-file",
    "JOB_ID": "0",
    "$LEAD": "a-kit",
    "<hash>": "0" * 64,
    "…": "a-file",
}
PROGRAM = re.compile(r"((\.\./)?\.venv/bin/)?histoflare|make")
SENTENCES = ("histoflare --debug …", "histoflare masks import", "histoflare ledger", "histoflare report")
"""What names a group of commands, or any of them."""


def join_lines(block: str) -> list[str]:
    """Return the lines of a block, those that go on with a backslash as one, without comments."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [re.sub(r"\s#\s.*$", "", line).strip() for line in lines]


def commands_of(lines: list[str]) -> list[str]:
    """Return the command lines of histoflare and make among some lines."""
    found = []
    for line in lines:
        for part in re.split(r"\s*(?:&&|;|\(|\))\s*", line):
            words = part.split()
            while words and re.fullmatch(r"[A-Z]+=\S*", words[0]):
                words = words[1:]
            if words and PROGRAM.fullmatch(words[0]) and " ".join(words) not in SENTENCES:
                found.append(" ".join(words))
    return list(dict.fromkeys(found))


def block_commands(text: str) -> list[str]:
    """Return the commands of a document's blocks, fenced or indented: those that a reader copies."""
    blocks = [*BLOCK.findall(text), *INDENTED.findall(BLOCK.sub("", text))]
    return commands_of([line for block in blocks for line in join_lines(block)])


def all_commands(text: str) -> list[str]:
    """Return the commands of a document's blocks, tables and sentences."""
    spoken = [line for row in INLINE.findall(text) for line in spread(row)]
    return list(dict.fromkeys([*block_commands(text), *commands_of(spoken)]))


def spread(text: str) -> list[str]:
    """Return a command for each of the alternatives of a table's cell: ``report page \\| site`` is two."""
    match = TABLE_CHOICE.search(text)
    if match is None:
        return [text]
    words = [match[1], *match[2].replace("\\|", " ").split()]
    return [text[: match.start()] + word + text[match.end() :] for word in words]


LINES = [
    pytest.param(path, line, id=f"{path.relative_to(ROOT)}: {line}"[:110])
    for path in DOCUMENTS
    for line in all_commands(path.read_text())
]
BLOCK_LINES = [line for path in DOCUMENTS for line in block_commands(path.read_text()) if line[:4] != "make"]


def arguments_of(line: str) -> list[str]:
    """Return what follows the program's name, placeholders filled in."""
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)  # [--mpp M]: with the option
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
    return [word.replace("$KITS", "kits").replace("JOB_ID", "0") for word in words if word]


def parse(arguments: list[str]) -> dict[str, Any]:
    """Return what a command would be called with: parsed as the program does, and not run.

    Raises:
        UsageError: No such command or option, a value is of another type, or something is missing.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("histoflare", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return {name: value for name, value in context.params.items() if value is not None}


def is_bare(arguments: list[str]) -> bool:
    """Return whether a line only names a command, as a sentence does, and is none to be typed."""
    return not any(word.startswith("-") for word in arguments)


def test_the_documents_have_commands() -> None:
    assert len(LINES) > 60
    pages = {path.name for path, _ in (param.values for param in LINES)}
    assert pages >= {"README.md", "researcher.md", "lead.md", "steward.md", "measured.md", "privacy.md"}


@pytest.mark.parametrize(("path", "line"), LINES)
def test_a_command_can_be_typed(path: Path, line: str) -> None:
    if line.startswith("make"):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wanted = [word for word in line.split()[1:] if "=" not in word]
        assert set(wanted) <= set(targets), line
        return
    arguments = arguments_of(line)
    try:
        values = parse(arguments)
    except UsageError as error:
        missing = type(error).__name__ == "MissingParameter"
        if missing and ("`" + line in path.read_text() or is_bare(arguments)):
            return  # named in a sentence, and not to be typed
        raise AssertionError(f"{line}\n{error.format_message()}") from None
    except typer.Exit:
        return  # --help
    job = values.get("job") or None
    if job is not None and str(job) in job_names():
        settings = values.get("setting") or []
        choose_job(JOBS / job, values.get("preset"), settings)  # the job, its preset, its variables
    elif job is not None:
        assert f"--out {job}" in path.read_text(), f"{line}: nothing makes {job}"
    for word in arguments:
        if re.match(r"(jobs|provisioning|poc|docs|custom|tests)/", word):
            assert (ROOT / word).exists(), f"{line}: there is no {word}"


# Links, and what is named.

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py)(?:::(\w+))?`")
MOST_README_LINES = 120


def prose(text: str) -> str:
    """Return a document without its blocks of code."""
    return BLOCK.sub("", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower().strip() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def leads_nowhere(path: Path, target: str) -> str:
    """Return what is wrong with a link in a document; empty if nothing."""
    if re.match(r"https?:", target):
        return "an address of the network: whoever reads this may have none"
    file, _, anchor = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    if not there.exists():
        return "there is no such file"
    if not there.is_relative_to(ROOT):
        return "it leads out of the repository"
    return "" if not anchor or anchor in anchors(there) else "there is no such heading"


LINKS = [
    pytest.param(path, target, id=f"{path.relative_to(ROOT)}: {target}")
    for path in DOCUMENTS
    for target in dict.fromkeys(LINK.findall(prose(path.read_text())))
]


@pytest.mark.parametrize(("path", "target"), LINKS)
def test_a_link_leads_somewhere(path: Path, target: str) -> None:
    assert leads_nowhere(path, target) == ""


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    readme = ROOT / "README.md"
    for target in ("docs/nothing.md", "docs/jobs.md#nothing", "https://example.org", "../outside.md"):
        assert leads_nowhere(readme, target) != ""
    assert leads_nowhere(readme, "docs/jobs.md#protocoltoml") == ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_or_test_that_is_named_exists(path: Path) -> None:
    code = ROOT / "custom" / "histoflare"
    for name, function in NAMED.findall(path.read_text()):
        places = [place / name for place in (ROOT, path.parent, code, ROOT / "tests" / "benchmarks")]
        found = [place for place in places if place.exists()]
        assert found, f"there is no {name}"
        assert not function or f"def {function}(" in found[0].read_text(), f"{name} has no {function}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_the_readme_leads_to_every_page() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_the_site_has_every_document() -> None:
    """mkdocs is an extra, so the two files are only read."""
    pages = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    beside = dict(re.findall(r'"([\w./-]+\.md)": "([\w-]+\.md)"', (ROOT / "docs" / "hooks.py").read_text()))
    assert {f"{path.relative_to(ROOT)}" for path in DOCUMENTS} | {"CHANGELOG.md"} == {
        *beside,
        *(f"docs/{page}" for page in pages if page not in beside.values()),
    }
    assert set(beside.values()) <= set(pages)


ADVISED = sorted(
    {
        line
        for text in (text for reason in REASONS.values() for text in (reason.lead, reason.site))
        for line in re.findall(r"'(histoflare [^']+)'", text)
    }
)


@pytest.mark.parametrize("line", ADVISED)
def test_a_command_that_a_refusal_advises_can_be_typed(line: str) -> None:
    try:
        parse(arguments_of(line))
    except typer.Exit:
        return  # --version
    except UsageError as error:
        missing = type(error).__name__ == "MissingParameter"
        assert missing and is_bare(arguments_of(line)), f"{line}\n{error.format_message()}"


@pytest.mark.parametrize(
    "line",
    [
        "histoflare run --sites a --out b --preset-of x",
        "histoflare rnu --sites a --out b",
        "histoflare job make mem_fedavg",
        "histoflare privacy calibrate --target-epsilon eight --sample-rate 0.1 --steps 5 --delta 1e-5",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(UsageError):
        parse(arguments_of(line))


# What follows runs them.

LUNG = ("LUAD", "LUSC")
QUICK = ["--set", "rounds=1"]
SLOW = "run --job dhunet_fedavg --preset small-nuclei"
RUNS: dict[str, list[str]] = {
    "run --sites lung --bags": QUICK,
    "run --job mem_dpsgd --sites my-sites": QUICK,
    "run --job mem_dpsgd --preset adnan": QUICK,
    "manifest partition my-sites --sites 4 --bags my-run/bags --out even": [],
    "manifest partition my-sites --sites 4 --bags my-run/bags --out uneven": [],
    "experiment strategies": [*QUICK, "--seeds", "1"],
    "experiment contribution": QUICK,
    "privacy calibrate": [],
    "privacy epsilon": [],
    "privacy advise": [],
    "synthetic images": ["--sites", "2", "--patients", "3", "--images-per-patient", "1", "--side-px", "256"],
    "masks check": [],
    SLOW: [*QUICK, "--set", "task.local_steps=1"],
    "job show": [],
    "job make mem_fedavg": [],
    "job make mem_dpsgd": [],
    "job make dhunet_fedavg": [],
    "job make mem_evaluate": [],
}
"""Command → what makes it quick. They run in this order, in one folder, as they stand."""

BEFORE = {SLOW: "synthetic images"}
"""Command → the one that makes what it reads: the slow tests run by themselves."""

NOT_RUN = {
    "demo ": "minutes; test_demo.py runs it",
    "synthetic assemble": "the tiles are not in the repository; test_assemble.py makes slides of others",
    "masks import": "the data sets are not in the repository; test_importers_*.py bring their own",
    "segment": "needs a slide; test_segment.py brings one",
    "classify": "needs a slide; test_classify.py brings one",
    "poc start": "processes; test_console.py starts them",
    "job submit": "a server; test_console.py has one",
    "resume": "a run that was lost; test_resume.py has one",
    "ledger": "a kit; test_ledger.py makes its ledgers",
    "kit": "a kit; test_kit.py makes one",
}
"""Command → why no test runs it as it stands."""


def subcommand(line: str) -> str:
    return line.partition("histoflare ")[2]


def test_every_command_runs_or_says_why_not() -> None:
    known = (*RUNS, *NOT_RUN)
    assert [line for line in BLOCK_LINES if not subcommand(line).startswith(known)] == []
    for start in known:
        assert any(subcommand(line).startswith(start) for line in BLOCK_LINES), f"{start}: in no document"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who follows the documents with data of another kind than shipped jobs name."""
    folder = tmp_path_factory.mktemp("reader")
    for sites, bags in (("my-sites", "my-run/bags"), ("lung", "lung-run/bags")):
        for name in ("clinic-a", "clinic-b", "external"):
            site = relabel(write_site(folder / sites, name, encoder="imported:uni", features=16), *LUNG)
            (folder / bags).mkdir(parents=True, exist_ok=True)
            site.files["bags"].rename(folder / bags / name)
    make_image_site(folder / "my-images" / "clinic-a", 0, patients=3, side_px=64)
    model = folder / "result" / "JOB_ID" / "workspace" / "global_model.safetensors"
    task = read_job(JOBS / "mem_fedavg").task
    model.parent.mkdir(parents=True)
    save_model(model, task.build_model().state_dict(), task, mosaic=None, training={})
    return folder


@pytest.mark.parametrize(
    "start", [pytest.param(one, marks=[pytest.mark.slow] if one == SLOW else []) for one in RUNS]
)
def test_a_command_does_what_the_document_says(
    start: str, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reader)
    for one in (BEFORE[start], start) if start in BEFORE else (start,):
        line = next(line for line in BLOCK_LINES if subcommand(line).startswith(one))
        ended = CliRunner().invoke(app, [*shlex.split(line)[1:], *RUNS[one]])
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        assert ended.exit_code == 0, ended.output


def test_the_code_for_a_researcher_does_what_the_document_says(
    reader: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reader)
    page = ROOT / "docs" / "researcher.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    known: dict[str, Any] = {"__name__": "tried"}
    exec(compile(code, str(page), "exec", dont_inherit=True), known)
    assert known["outcome"].report["rounds"] == 5
    assert ": 5 of 5" in capsys.readouterr().out
    assert {"report.json", "report.html"} <= {path.name for path in Path("my-run/from-python").iterdir()}
