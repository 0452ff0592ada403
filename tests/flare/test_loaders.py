"""FLARE finds nothing that lies about in a kit or below the current folder, and parses JSON only."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvflare
import pytest
from nvflare.fuel.f3 import comm_config
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.utils import config_service
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory

from histoflare.errors import HistoflareError
from histoflare.flare import loaders
from histoflare.flare.loaders import PARSERS, ClosedLoaders, close_loaders, narrow_search

JOB = "0e7a1f0c-9d5f-4f0e-8a5c-3b1d2c4e5f60"
START = """
import sys
from nvflare.fuel.utils.config_service import ConfigService
from nvflare.fuel.f3 import communicator
from histoflare.flare.loaders import ClosedLoaders
if sys.argv[1] == "closed":
    ClosedLoaders()
"""
IN_A_KIT = """
ConfigService.initialize({"startup": "fed_client.json", "resources": "resources.json.default"}, [sys.argv[2]])
print("SECTION", ConfigService.get_section("resources"))
"""
CONNECT = "communicator.load_comm_drivers()\n"
"""What FLARE does before it connects: in each process of a kit, and for each session of an administrator."""


def write_kit(kit: Path) -> Path:
    for folder in ("startup", "local"):
        (kit / folder).mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text("{}")
    (kit / "local" / "resources.json.default").write_text('{"whose": "site"}')
    return kit


def write_junk(folder: Path) -> Path:
    """Write what an attacker would, and return what appears once its code has run."""
    folder.mkdir(parents=True, exist_ok=True)
    ran = folder / "ran"
    (folder / "comm_config.json").write_text(json.dumps({"comm_driver_path": str(folder)}))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (folder / "resources.json").write_text('{"whose": "job"}')
    return ran


def run(state: str, text: str, kit: Path, cwd: Path) -> str:
    command = [sys.executable, "-c", START + text, state, str(kit)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("state", ["open", "closed"])
def test_what_a_job_left_in_a_kit(tmp_path: Path, state: str) -> None:
    """FLARE as it comes runs it, and takes its section for the site's: else this shows nothing."""
    kit = write_kit(tmp_path / "clinic")
    ran = write_junk(kit / JOB / "app_clinic" / "config")
    said = run(state, IN_A_KIT + CONNECT, kit, kit)
    assert ran.exists() is (state == "open")
    assert f"SECTION {{'whose': '{'job' if state == 'open' else 'site'}'}}" in said


@pytest.mark.parametrize("state", ["open", "closed"])
def test_what_lies_below_the_current_folder(tmp_path: Path, state: str) -> None:
    ran = write_junk(tmp_path / "downloads" / "job")
    run(state, CONNECT, tmp_path, tmp_path)
    assert ran.exists() is (state == "open")


@pytest.mark.parametrize("where", ["", "local", "startup"])
def test_nor_from_where_files_are_signed(tmp_path: Path, where: str) -> None:
    """There is no comm_config in any kit."""
    kit = write_kit(tmp_path / "clinic")
    ran = write_junk(kit / where)
    run("closed", IN_A_KIT + CONNECT, kit, kit)
    assert not ran.exists()


def test_no_parser_is_imported_any_more(tmp_path: Path) -> None:
    text = (
        "import importlib.util\nfor name in sys.argv[2].split(','):\n    assert sys.modules[name] is None\n"
    )
    text += "try:\n    import pyhocon\nexcept ImportError:\n    print('none')\n"
    done = run("closed", text, Path(",".join(PARSERS)), tmp_path)
    assert "none" in done


@pytest.fixture
def flare() -> Iterator[None]:
    """FLARE as it was, afterwards."""
    kept = {
        (part, name): part.__dict__[name]
        for part, name in (
            (ConfigFactory, "_fmt2Loader"),
            (ConfigFactory, "search_config_format"),
            (CommConfigurator, "_config_loaded"),
            (CommConfigurator, "_configuration"),
            (config_service, "search_file"),
        )
    }
    modules = {name: sys.modules.get(name) for name in PARSERS}
    yield
    for (part, name), value in kept.items():
        setattr(part, name, value)
    for name, module in modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.mark.usefixtures("flare")
class TestClosed:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("config.conf", "a = 1"),
            ("config.conf.default", "a = 1"),
            ("config.yml", "a: 1"),
            ("config.yaml", "a: 1"),
            ("config.yaml.default", "a: 1"),
        ],
    )
    def test_json_alone_is_read(self, tmp_path: Path, name: str, text: str) -> None:
        close_loaders()
        (tmp_path / name).write_text(text)
        for asked in (str(tmp_path / name), str(tmp_path / "config.json")):
            assert ConfigFactory.load_config(asked) is None
            assert not ConfigFactory.has_config(asked)
        (tmp_path / "config.json").write_text('{"a": 2}')
        assert ConfigFactory.load_config(str(tmp_path / name)).to_dict() == {"a": 2}

    def test_it_may_be_closed_again(self) -> None:
        close_loaders()
        close_loaders()
        assert list(ConfigFactory._fmt2Loader) == [ConfigFormat.JSON]
        assert CommConfigurator().get_config() is None

    def test_a_file_of_another_kind_is_not_searched_for(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "rootCA.pem").write_text("")
        close_loaders()
        config_service.ConfigService.reset()
        config_service.ConfigService.initialize({}, [str(tmp_path)], argparse.Namespace())
        assert config_service.ConfigService.find_file("rootCA.pem") is None
        config_service.ConfigService.reset()


class TestSearch:
    def test_a_folder_and_not_what_is_below(self, tmp_path: Path) -> None:
        (tmp_path / "below").mkdir()
        (tmp_path / "below" / "a.json").write_text("{}")
        assert narrow_search("a.json", [str(tmp_path)]) == (None, None)
        assert narrow_search(str(tmp_path / "a.json")) == (None, None)
        found = tmp_path / "a.json.default"
        found.write_text("{}")
        assert narrow_search("a.json", [str(tmp_path)]) == (ConfigFormat.JSON, str(found))
        (tmp_path / "a.json").write_text("{}")
        assert narrow_search("a.conf", [str(tmp_path)]) == (ConfigFormat.JSON, str(tmp_path / "a.json"))

    def test_of_a_kit_startup_and_local(self, tmp_path: Path) -> None:
        kit = write_kit(tmp_path / "clinic")
        write_junk(kit)
        write_junk(kit / JOB)
        found = kit / "local" / "resources.json.default"
        assert narrow_search("resources.json.default", [str(kit)]) == (ConfigFormat.JSON, str(found))
        assert narrow_search("comm_config.json", [str(kit)]) == (None, None)

    def test_the_first_folder_that_has_it(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.json").write_text("{}")
        folders = [str(tmp_path / name) for name in ("none", "two", "one")]
        assert narrow_search("a.json", folders) == (ConfigFormat.JSON, str(tmp_path / "two" / "a.json"))

    @pytest.mark.parametrize("name", ["a.json", "a", "", ".json", "a.conf"])
    def test_a_name_without_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for file in ("a.json", ".json", "a.json.default"):
            Path(file).write_text("{}")
        assert narrow_search(name) == narrow_search(name, []) == (None, None)

    def test_another_format_than_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("{}")
        assert narrow_search("a.json", [str(tmp_path)], ConfigFormat.PYHOCON) == (None, None)
        assert narrow_search("a.json", [str(tmp_path)], ConfigFormat.JSON)[0] is ConfigFormat.JSON

    def test_a_folder_of_the_name_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").mkdir()
        assert narrow_search("a.json", [str(tmp_path)]) == (None, None)


class OtherSearch:
    """FLARE as it might become: its own ways lead past the search that is replaced."""

    @staticmethod
    def load_config(file_path: str, search_dirs: Any = None, target_fmt: Any = None) -> None:
        return None


INSIDE = {
    "version": (nvflare, "__version__", "2.9.1"),
    "_fmt2Loader": (ConfigFactory, "_fmt2Loader", []),
    "no json": (ConfigFactory, "_fmt2Loader", {}),
    "search": (ConfigFactory, "search_config_format", staticmethod(lambda path: (None, None))),
    "ways": (ConfigFactory, "load_config", OtherSearch.__dict__["load_config"]),
    "loader": (ConfigFactory, "get_config_loader", staticmethod(lambda fmt: object())),
    "_config_loaded": (CommConfigurator, "_config_loaded", None),
    "_configuration": (CommConfigurator, "_configuration", "text"),
    "get_config": (CommConfigurator, "get_config", lambda self: {"comm_driver_path": "."}),
    "search_file": (config_service, "search_file", lambda name: None),
}


@pytest.mark.usefixtures("flare")
class TestOtherFlare:
    @pytest.mark.parametrize("part", INSIDE)
    def test_nothing_starts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        where, name, value = INSIDE[part]
        monkeypatch.setattr(where, name, value)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "daemon_pid.fl").write_text("1")
        with pytest.raises(SystemExit) as caught:
            ClosedLoaders()
        assert str(caught.value.code).startswith("FLARE_CHANGED")
        assert (tmp_path / "shutdown.fl").exists(), "the script must not start it again"

    @pytest.mark.parametrize(
        ("where", "name"),
        [
            (ConfigFactory, "_fmt2Loader"),
            (ConfigFactory, "search_config_format"),
            (CommConfigurator, "_config_loaded"),
            (CommConfigurator, "_configuration"),
            (config_service, "search_file"),
        ],
    )
    def test_nor_where_a_part_is_gone(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        monkeypatch.delattr(where, name)
        with pytest.raises(HistoflareError) as caught:
            close_loaders()
        assert caught.value.reason == "FLARE_CHANGED"
        monkeypatch.undo()

    def test_the_installed_one_is_known(self) -> None:
        assert nvflare.__version__ == loaders.FLARE
        assert comm_config._comm_config_files[0] == "comm_config.json"
        close_loaders()
