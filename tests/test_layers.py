"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from histoflare.site.kinds import KINDS

ROOMS = (
    *("slides", "bags", "masks", "synthetic", "privacy", "rounds", "report", "site", "flare"),
    *("lab", "commands"),
)
GROUND = {
    *("errors", "extras", "checks", "ranges", "reasons", "storage", "seeds"),
    *("ensemble", "model_file", "optimizers", "shipped", "figure", "noised_ratio", "tally_form"),
}
ALLOWED = {
    "slides": set(),
    "bags": {"slides"},
    "masks": {"slides"},
    "synthetic": {"slides", "bags", "masks"},  # nothing that runs at a hospital imports it
    "privacy": set(),
    "rounds": {"privacy"},
    "report": {"rounds", "privacy"},
    "site": {"slides", "bags", "masks", "privacy", "rounds", "report"},
    "flare": {"slides", "bags", "masks", "privacy", "rounds", "report", "site"},
    "lab": {*ROOMS} - {"commands"},
    "commands": {*ROOMS},
}
LIBRARY_HOME = {
    "openslide": {"slides"},
    "nvflare": {"flare"},
    "typer": {"commands", "cli"},
    "rich": {"report", "commands"},
}
FORBIDDEN_IN_PRIVACY = {"nvflare", "openslide", "monai"}


def imports(source: str) -> set[str]:
    """Return the dotted names that ``source`` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def faults(room: str, names: set[str]) -> list[str]:
    """Return what a file in ``room`` imports against the rules."""
    found = []
    for name in sorted(names):
        parts = name.split(".")
        if parts[0] == "histoflare":
            target = parts[1] if len(parts) > 1 else ""
            if target in ROOMS and target != room and target not in ALLOWED.get(room, set(ROOMS)):
                found.append(f"{room} imports {name}")
        elif parts[0] in LIBRARY_HOME and room not in LIBRARY_HOME[parts[0]]:
            found.append(f"{room} imports {name}")
        elif room == "privacy" and parts[0] in FORBIDDEN_IN_PRIVACY:
            found.append(f"privacy imports {name}")
    return found


def test_every_import_goes_downward(repository: Path) -> None:
    package = repository / "custom" / "histoflare"
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        room = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        found += [f"{inside}: {fault}" for fault in faults(room, imports(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("slides", "from histoflare.bags.bag import Bag"),
        ("bags", "import nvflare.apis.executor"),
        ("rounds", "from histoflare import flare"),
        ("bags", "import openslide"),
        ("bags", "from histoflare.synthetic.slides import reference_patches"),
        ("site", "from histoflare import synthetic"),
        ("site", "from histoflare.flare.job import read_job"),
        ("flare", "from histoflare.lab.run import run_watched"),
        ("lab", "from histoflare.commands.console import say"),
        ("lab", "from rich.progress import Progress"),
        ("privacy", "from histoflare.bags import mem"),
    ],
)
def test_the_rule_sees_a_breach(room: str, line: str) -> None:
    assert faults(room, imports(line))


def test_top_level_modules_import_no_room(repository: Path) -> None:
    for name in GROUND:
        source = (repository / "custom" / "histoflare" / f"{name}.py").read_text()
        assert not {line for line in imports(source) if line.split(".")[1:2] and line.split(".")[1] in ROOMS}


def circle(imported: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle; none if there is no circle.

    Args:
        imported: Module → the modules that it imports.
    """
    left = dict(imported)
    while True:
        needed = {each for name, names in left.items() for each in names - {name}}
        kept = {
            name: names for name, names in left.items() if name in needed and names & left.keys() - {name}
        }
        if len(kept) == len(left):
            return sorted(left)
        left = kept


def test_no_modules_import_each_other_in_a_circle(repository: Path) -> None:
    """Imports inside functions and those for types alone count too: they hide a circle, and end none."""
    root = repository / "custom"
    sources = {}
    for path in (root / "histoflare").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    imported = {}
    for name, source in sources.items():
        names = imports(source)
        imported[name] = {each if each in sources else each.rpartition(".")[0] for each in names}
    assert circle(imported) == []


def test_a_circle_is_seen() -> None:
    through = {"a": {"b"}, "b": {"c", "os"}, "c": {"a", "f"}, "d": {"a"}, "e": {"d"}, "f": set()}
    assert circle(through) == ["a", "b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": {"os"}})


def kind_comparisons(source: str, kinds: Collection[str]) -> list[int]:
    """Return the lines on which something is compared with the name of a kind of data, or its constant."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            compared = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        else:
            continue
        constants = {part.value for part in compared if isinstance(part, ast.Constant)}
        names = {part.id.lower() for part in compared if isinstance(part, ast.Name) and part.id.isupper()}
        if (constants | names) & set(kinds):
            lines.append(node.lineno if isinstance(node, ast.Compare) else node.value.lineno)
    return lines


def test_nobody_asks_what_kind_of_data_there_is(repository: Path) -> None:
    """A kind brings what it needs (``site.kinds``): nothing outside it decides by a kind's name."""
    package = repository / "custom" / "histoflare"
    found = [
        f"{path.relative_to(package)}, line {line}"
        for path in sorted(package.rglob("*.py"))
        if not path.is_relative_to(package / "site" / "kinds")
        for line in kind_comparisons(path.read_text(), KINDS)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'task.data == "images"',
        '"bags" != data',
        'data in ("films", "images")',
        "content['data'] == IMAGES",
        "kind is not BAGS",
        'match data:\n    case "bags": pass',
    ],
)
def test_a_comparison_with_a_kind_is_seen(line: str) -> None:
    assert kind_comparisons(line, KINDS)


@pytest.mark.parametrize("line", ['counts = {"images": 3}', "kind_of(data) is kind_of(other)", "BAGS.load()"])
def test_what_is_no_comparison_with_a_kind_is_none(line: str) -> None:
    assert not kind_comparisons(line, KINDS)


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        (("closed_commands", "kit_check"), ("torch", "monai", "scipy", "opacus", "tomlkit", "pyhocon")),
        (("admission", "executor", "gate", "guard"), ("monai", "opacus", "tomlkit", "pyhocon", "rich")),
    ],
    ids=["FLARE's client process", "a job's process at a site"],
)
def test_what_a_site_s_processes_do_not_load(modules: tuple[str, ...], without: tuple[str, ...]) -> None:
    """Memory, and nothing that reads another format than JSON and TOML."""
    code = "".join(f"import histoflare.flare.{name}\n" for name in modules)
    code += f"import sys; print(*(name for name in {without!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
