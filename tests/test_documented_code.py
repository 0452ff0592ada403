"""The code of docs/adding.md: files are loaded, lines registered, trials run, and contract suites on them.

A block says by its first line what it is: ``# custom/…`` is a file, ``# in MODULE: REGISTRY`` are lines of a
registry, ``# try it`` is run.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from histoflare.bags.models import MODELS, build_model
from histoflare.rounds.strategies import make_strategy
from histoflare.rounds.topologies import make_topology
from tests.bags import test_model_contract
from tests.masks.networks import test_networks
from tests.rounds import test_strategy_contract, test_topology_contract

PAGE = Path(__file__).parents[1] / "docs" / "adding.md"
FILE = re.compile(r"# custom/(\S+)\.py")
LINES = re.compile(r"# in (\S+): (\S+)")


def sections() -> dict[str, list[str]]:
    """Return the Python blocks of each section of the page."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {title: blocks.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def load(name: str, code: str) -> ModuleType:
    """Return the module that ``code`` is, as if it lay where the page says."""
    module = ModuleType(name)
    module.__file__ = f"{PAGE}: {name}"
    sys.modules[name] = module
    exec(compile(code, module.__file__, "exec", dont_inherit=True), module.__dict__)
    return module


def register(module: ModuleType, registry: str, lines: str, patch: pytest.MonkeyPatch) -> None:
    """Put the lines of a block into a registry: its imports are run, the rest is of a dictionary."""
    imports, entries = [], []
    for line in lines.splitlines()[1:]:
        (imports if line.startswith(("from ", "import ")) else entries).append(line)
    known = dict(module.__dict__)
    exec("\n".join(imports), known)
    for name, value in eval("{" + "\n".join(entries) + "}", known).items():
        patch.setitem(getattr(module, registry), name, value)


@pytest.fixture
def try_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Does all that a section says; returns the names that it registered."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def do(title: str) -> list[str]:
        names = []
        for block in sections()[title]:
            if found := FILE.match(block):
                load(found[1].replace("/", "."), block)
            elif found := LINES.match(block):
                registry = getattr(module := importlib.import_module(found[1]), found[2])
                known = set(registry)
                register(module, found[2], block, monkeypatch)
                names += sorted(set(registry) - known)
            else:
                assert block.startswith("# try it"), block
                exec(compile(block, f"{PAGE}: {title}", "exec", dont_inherit=True), {"__name__": "tried"})
        return names

    yield do
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == f"{PAGE}: {name}":
            del sys.modules[name]


@pytest.mark.parametrize("title", sections())
def test_what_a_section_says_works(title: str, try_section: Callable[[str], list[str]]) -> None:
    assert any(block.startswith("# try it") for block in sections()[title])
    try_section(title)


def values_of(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """Yield what a test is parametrized with, one set of arguments after the other."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for chosen in itertools.product(*(mark.args[1] for mark in marks)):
        arguments: dict[str, Any] = {}
        for mark, value in zip(marks, chosen, strict=True):
            names = mark.args[0] if isinstance(mark.args[0], tuple) else (mark.args[0],)
            arguments.update(zip(names, value if len(names) > 1 else (value,), strict=True))
        yield arguments


def keep_contract(suite: ModuleType, **given: Any) -> int:
    """Run the tests of a suite that ask for what is given and for no other fixture; return how many."""
    kept = 0
    for name, test in vars(suite).items():
        if not (name.startswith("test_") and inspect.isfunction(test)):
            continue
        wanted = set(inspect.signature(test).parameters)
        for values in values_of(test):
            if wanted & set(given) and wanted <= {*given, *values} and not set(given) & set(values):
                test(**{name: {**given, **values}[name] for name in wanted})
                kept += 1
    return kept


def test_the_strategy_keeps_the_contract(try_section: Callable[[str], list[str]]) -> None:
    (name,) = try_section("A strategy")
    assert keep_contract(test_strategy_contract, strategy=make_strategy(name)) > 10
    linear = test_strategy_contract.keeps_equal_weights(make_strategy(name))
    assert keep_contract(test_strategy_contract, linear=linear) == 2


def test_the_topology_keeps_the_contract(try_section: Callable[[str], list[str]]) -> None:
    topology, strategy = try_section("A topology")
    assert keep_contract(test_topology_contract, topology=make_topology(topology)) >= 5
    assert keep_contract(test_strategy_contract, strategy=make_strategy(strategy)) > 10


def test_the_model_on_bags_keeps_the_contract(try_section: Callable[[str], list[str]]) -> None:
    (name,) = try_section("A model on bags")
    settings = MODELS[name]()
    model = build_model(settings, test_model_contract.F_IN, test_model_contract.OUTPUTS, seed=1).eval()
    with torch.no_grad():
        assert keep_contract(test_model_contract, model=model) >= 6
    assert keep_contract(test_model_contract, name=name, settings=settings) >= 6


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_network_keeps_the_contract(
    norm: str, try_section: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = try_section("A segmentation network")
    monkeypatch.setitem(test_networks.PARAMETERS, name, 17_092)
    assert keep_contract(test_networks, name=name, norm=norm) >= 7


def test_code_that_does_not_work_is_noticed(
    try_section: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {
        "A part": ["# custom/histoflare/broken.py\nX = 1\n", "# try it\nfrom histoflare.broken import Y\n"]
    }
    monkeypatch.setitem(globals(), "sections", lambda: broken)
    with pytest.raises(ImportError):
        try_section("A part")
