"""What of FLARE's own loading is taken out of a process before a job can bring it anything.

As it comes, FLARE parses configurations in HOCON and YAML too, which include files and addresses and read the
environment; it looks for a configuration in whole folders, a kit with all its jobs, and takes the first file
of the name; and a ``comm_config`` found so names folders whose code it imports. Here it parses JSON, looks
where it was told to and nowhere below, and has no ``comm_config``.

All of it is FLARE's inside. A process whose FLARE is not the one known here ends, it does not go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import nvflare
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.utils import config_service
from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory
from nvflare.fuel.utils.json_config_loader import JsonConfigLoader

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.kit_check import refuse_start

FLARE = "2.9.0"
"""The version whose inside is known here."""

EXTENSIONS = (".json", ".json.default")
KIT_FOLDERS = ("startup", "local")

PARSERS = (
    *("pyhocon", "omegaconf"),
    *("nvflare.fuel_opt.utils.pyhocon_loader", "nvflare.fuel_opt.utils.omegaconf_loader"),
)
"""Modules that no process of a kit imports once its loaders are closed."""


class ClosedLoaders(FLComponent):
    """Closes FLARE's loaders in the process that builds it, or ends it. Stands first among the components of
    the ``resources.json`` of sites and server: FLARE builds those before it reads anything of a job.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            close_loaders()
        except HistoflareError as error:
            refuse_start(Path.cwd(), error)
        for name in PARSERS:
            sys.modules[name] = None  # type: ignore[assignment]


def close_loaders() -> None:
    """Leave FLARE the loader for JSON and :func:`narrow_search`; it may be called again.

    Raises:
        JobError: FLARE's inside is not what is known here (FLARE_CHANGED).
    """
    require_known_flare(_KNOWN)
    loader = ConfigFactory._fmt2Loader[ConfigFormat.JSON]
    ConfigFactory._fmt2Loader = {ConfigFormat.JSON: loader}
    _require(_searches_where_it_is_told(), "ConfigFactory.load_config")
    ConfigFactory.search_config_format = staticmethod(narrow_search)
    CommConfigurator._config_loaded, CommConfigurator._configuration = True, None
    config_service.search_file = _no_file
    _require(ConfigFactory.get_config_loader(ConfigFormat.PYHOCON) is None, "ConfigFactory.get_config_loader")
    _require(
        ConfigFactory.get_config_loader(ConfigFormat.OMEGACONF) is None, "ConfigFactory.get_config_loader"
    )
    _require(CommConfigurator().get_config() is None, "CommConfigurator")


def narrow_search(
    init_file_path: str, search_dirs: Sequence[str] | None = None, target_fmt: ConfigFormat | None = None
) -> tuple[ConfigFormat | None, str | None]:
    """Return the format and path of a JSON configuration, in place of FLARE's search through whole folders.

    Looked at is the folder itself, or ``startup`` and ``local`` of one that has ``startup``: a kit, in whose
    root jobs have their folders. A name without a folder is found nowhere.

    Args:
        init_file_path: The file's path or name; its extension does not count.
        search_dirs: Folders to look in; none: the file's own.
        target_fmt: A format to look for; any other than JSON finds nothing.
    """
    path = Path(init_file_path)
    stem = path.name.partition(".")[0]
    if target_fmt in (None, ConfigFormat.JSON) and stem:
        own = [path.parent] if len(path.parts) > 1 else []
        for folder in [Path(each) for each in search_dirs] if search_dirs else own:
            places = KIT_FOLDERS if (folder / KIT_FOLDERS[0]).is_dir() else ("",)
            for found in (folder / place / (stem + end) for end in EXTENSIONS for place in places):
                if found.is_file():
                    return ConfigFormat.JSON, str(found)
    return None, None


def require_known_flare(parts: Mapping[str, Callable[[], bool]]) -> None:
    """Raise :class:`JobError` (FLARE_CHANGED) unless FLARE is the version whose inside is known here.

    Args:
        parts: Name of a part of it → whether it is as it is known.
    """
    _require(nvflare.__version__ == FLARE, f"version {nvflare.__version__}")
    for name, holds in parts.items():
        try:
            known = holds()
        except Exception:  # whatever is not there any more
            known = False
        _require(known, name)


def _require(known: bool, name: str) -> None:
    if not known:
        raise JobError(
            f"The installed FLARE is not {FLARE} as this package knows it ({name}): what keeps jobs from "
            "reading and running things would not hold. Install the versions of constraints.txt.",
            reason="FLARE_CHANGED",
        )


def _searches_where_it_is_told() -> bool:
    """Return whether all of FLARE's own ways to a configuration lead through the search that is replaced."""
    asked = []

    def search(path: str, *_: Any) -> tuple[None, None]:
        asked.append(path)
        return None, None

    ConfigFactory.search_config_format = staticmethod(search)
    ConfigFactory.load_config("a.json")
    ConfigFactory.has_config("b.json")
    config_service.ConfigService.load_configuration("c.json")
    config_service.ConfigService.load_config_dict("d.json", raise_exception=False)
    return asked == ["a.json", "b.json", "c.json", "d.json"]


def _no_file(file_basename: str, dirs: Any) -> None:
    """Find no file: replaces FLARE's search for a file of any format, which only relays need."""


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters; a class's are those it is built with."""
    return list(signature(function).parameters)


_KNOWN: dict[str, Callable[[], bool]] = {
    "ConfigFactory._fmt2Loader": lambda: isinstance(
        ConfigFactory._fmt2Loader[ConfigFormat.JSON], JsonConfigLoader
    ),
    "ConfigFactory.search_config_format": lambda: (
        parameters(ConfigFactory.search_config_format) == parameters(narrow_search)
    ),
    "CommConfigurator._config_loaded": lambda: type(CommConfigurator._config_loaded) is bool,
    "CommConfigurator._configuration": lambda: (
        CommConfigurator._configuration is None or type(CommConfigurator._configuration) is dict
    ),
    "config_service.search_file": lambda: parameters(config_service.search_file) == parameters(_no_file),
}
"""What of FLARE's inside is relied on → whether it is as it was."""
