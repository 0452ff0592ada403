"""What ``import histoflare`` offers: names that are typed, loaded late, each with an example that works."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import histoflare
from histoflare.slides.pyramid import write_pyramid
from tests.flare.bags_on_disk import write_site


def typed_names() -> dict[str, str]:
    """Return name → module as type checkers see them: the imports for types alone."""
    source = ast.parse(Path(histoflare.__file__).read_text())
    (block,) = [node for node in source.body if isinstance(node, ast.If)]
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in found for alias in node.names), "else mypy hides it"
    return {alias.name: str(node.module) for node in found for alias in node.names}


HOMES = typed_names()


def docstring(name: str) -> str:
    """Return what stands below a public constant, class or function where it is made."""
    value = getattr(histoflare, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return inspect.getdoc(value) or ""
    body = ast.parse(inspect.getsource(importlib.import_module(HOMES[name]))).body
    for node, following in itertools.pairwise(body):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in {getattr(target, "id", None) for target in targets}:
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), name
            return inspect.cleandoc(str(following.value.value))
    raise AssertionError(f"{name} is not made in {HOMES[name]}")


def test_what_type_checkers_see_is_what_there_is() -> None:
    assert set(histoflare.__all__) == set(HOMES) and len(histoflare.__all__) == len(HOMES)
    for name, module in HOMES.items():
        assert getattr(histoflare, name) is getattr(importlib.import_module(module), name)
    assert set(HOMES) <= set(dir(histoflare))


def test_no_other_name_is_made_up() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        histoflare.no_such_name  # noqa: B018 (asking is the test)
    from histoflare import ranges  # a module of the package is still found

    assert inspect.ismodule(ranges)


def test_the_import_loads_nothing_else() -> None:
    """FLARE's processes import it, and so does every command."""
    code = "import sys; before = {*sys.modules}; import histoflare; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert loaded == {"histoflare"}
    assert [name for name in done.stdout.split() if name.startswith("histoflare.")] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples are run: a slide, and two sites with bags."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    rgb = rng.normal((190, 110, 160), 12, (512, 512, 3)).clip(0, 255).astype(np.uint8)  # (h, w, 3) tissue
    write_pyramid(folder / "slide.tif", rgb, 0.5)
    for site in ("clinic-a", "clinic-b"):
        write_site(folder, site, slides=20)
    return folder


@pytest.mark.parametrize("name", sorted(HOMES))
def test_its_example_works(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    example = doctest.DocTestParser().get_doctest(docstring(name), {}, name, None, None)
    assert example.docstring and not example.docstring.startswith(">>>"), f"{name}: says nothing"
    assert name in "".join(each.source for each in example.examples), f"{name}: its example does without it"
    failed, tried = doctest.DocTestRunner().run(example)
    assert tried and not failed, capsys.readouterr().out
