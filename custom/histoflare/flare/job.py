"""A job folder, read the way FLARE reads it, for the runtimes that are not FLARE's own."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.class_utils import instantiate_class
from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs
from nvflare.fuel_opt.utils.pyhocon_loader import PyhoconLoader
from pyhocon.exceptions import ConfigException
from pyparsing.exceptions import ParseBaseException

from histoflare.errors import HistoflareError, JobError
from histoflare.privacy.plan import Open, PrivacyPlan
from histoflare.rounds.strategy import count_sent_by_job
from histoflare.storage import write_json

CONFIG_FOLDER = Path("app") / "config"
SERVER_APP = "app_server"
META_FILE = "meta.json"
PRESETS_FOLDER = "presets"
"""In a job folder: named sets of other figures, ``<name>.conf``. Not part of what is deployed."""
VARIABLES_FILE = "job.conf"
START_MODEL_FILE = "start_model.safetensors"
OWN_CLASSES = "histoflare."
TASK, STRATEGY, PRIVACY = "task", "strategy", "privacy"
"""Ids of a job's components that say what is learned, how sites work together, and what protects the updates
(without that one nothing does)."""

AGREED = {
    "rounds": "protocol.stop.rounds",
    "task.labels": "protocol.labels",
    "task.encoder": "protocol.encoder",
    "task.network": "protocol.network",
    "task.window_px": "protocol.window_px",
    "task.mpp": "protocol.mpp",
    "task.patch_px": "protocol.patch_px",
}
"""Variables that the protocol decides: a variant that changes one changes the protocol with it."""


@dataclass(frozen=True)
class Job:
    """What a job says, whoever runs it.

    Attributes:
        name: The job's name.
        folder: Where it was read.
        rounds: Number of rounds.
        seed: The job's seed.
        task: What is learned (has the methods of ``rounds.task.Task``).
        strategy: How the sites work together (``rounds.strategy.Strategy``).
        scope: The privacy scope it asks for. protocol: What the consortium agreed on.
        plan: What protects the updates, settled for the job's rounds. asked: The same as the job states it.
    """

    name: str
    folder: Path
    rounds: int
    seed: int
    task: Any
    strategy: Any
    scope: str
    protocol: dict[str, Any]
    plan: PrivacyPlan
    asked: PrivacyPlan


def read_configuration(path: Path) -> dict[str, Any]:
    """Return a FLARE configuration file with its includes read and its ``{variables}`` filled in.

    Raises:
        JobError: The file is missing or is not HOCON.
    """
    if not path.is_file():
        raise JobError(f"{path}: not found. A job folder has meta.json and app/config with {path.name}.")
    try:
        content: dict[str, Any] = PyhoconLoader().load_config(str(path)).to_dict()
    except (ParseBaseException, ConfigException, ValueError, OSError, RecursionError, TypeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise JobError(f"{path}: cannot be read (with what it includes) as HOCON: {first_line}") from None
    resolve_var_refs(JsonScanner(content), content)
    return content


def read_job(folder: Path) -> Job:
    """Read a job folder and make its task and strategy.

    Only classes of this package are made here.

    Raises:
        JobError: Something is missing, or a class or its arguments are wrong.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text())
        name, scope = str(meta["name"]), str(meta["scope"])
    except (OSError, ValueError, KeyError, TypeError):
        raise JobError(
            f"{folder}: not a job folder: it has no readable meta.json with a name and a scope. "
            "The jobs are in jobs/."
        ) from None
    server = read_configuration(folder / CONFIG_FOLDER / "config_fed_server.conf")
    try:
        components = {component["id"]: component for component in server.get("components", [])}
        rounds = _whole({"rounds": _workflow_rounds(server)}, "rounds", at_least=1)
        asked = make_component(components[PRIVACY]) if PRIVACY in components else Open()
        if not isinstance(asked, PrivacyPlan):
            raise JobError("the job's 'privacy' is no privacy plan", reason="PRIVACY_INVALID")
        task, strategy = make_component(components["task"]), make_component(components["strategy"])
        return Job(
            name=name,
            folder=folder,
            rounds=rounds,
            seed=_whole(server, "seed"),
            task=task,
            strategy=strategy,
            scope=scope,
            protocol=dict(server["protocol"]),
            plan=asked
            if isinstance(asked, Open)
            else asked.settled(rounds, count_sent_by_job(strategy, task)),
            asked=asked,
        )
    except KeyError as error:
        raise JobError(f"{folder}: the job does not say {error}.") from None
    except (TypeError, ValueError, IndexError, AttributeError):
        raise JobError(
            f"{folder}: its components, workflows or protocol are not built as those of a job; compare with "
            "jobs/mem_fedavg."
        ) from None


def _workflow_rounds(server: Mapping[str, Any]) -> Any:
    """Return the rounds the workflow runs; KeyError if nobody says (FLARE reads it as None)."""
    rounds = server["workflows"][0]["args"]["rounds"]
    if rounds is None:
        raise KeyError("rounds")
    return rounds


def _whole(variables: Mapping[str, Any], name: str, at_least: int | None = None) -> int:
    value = variables[name]
    if type(value) is not int or (at_least is not None and value < at_least):
        limit = "" if at_least is None else f" of at least {at_least}"
        raise JobError(f"{name} in {VARIABLES_FILE} must be a whole number{limit}, not {value!r}.")
    return value


def make_component(component: Mapping[str, Any]) -> Any:
    """Make one ``{path, args}`` component of a job.

    Raises:
        JobError: The class is not one of this package's, does not exist, or refuses its arguments.
    """
    path = str(component["path"])
    if not path.startswith(OWN_CLASSES):
        raise JobError(f"{path}: not a class of this package; this runtime makes no others.")
    arguments = dict(component.get("args") or {})
    _check_arguments(path, arguments)
    try:
        return instantiate_class(path, arguments)
    except HistoflareError:
        raise
    except Exception as error:
        raise JobError(f"{path}: cannot be made from the job's arguments: {error}") from error


def _check_arguments(path: str, arguments: Mapping[str, Any]) -> None:
    """Name arguments that a class does not take, before Python's own message does."""
    module, _, name = path.rpartition(".")
    try:
        known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return  # whoever makes it says what is wrong
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise JobError(f"{path}: takes no {', '.join(unknown)}; it takes: {', '.join(known)}.")


def write_variant(
    folder: Path,
    target: Path,
    changes: Mapping[str, Any],
    *,
    sites: Sequence[str] | None = None,
    scope: str | None = None,
    start_model: Path | None = None,
    for_server: Mapping[str, bytes] | None = None,
) -> Path:
    """Copy a job folder to ``target`` with some of its variables changed; return ``target``.

    Args:
        changes: Dotted variable names and their values, e.g. ``{"rounds": 5, "task.patch_px": 224}``. They
            are added at the end of ``job.conf``, where HOCON lets the last word win.
        sites: Whom the job is for; None is every site of the federation.
        scope: The privacy scope it asks for; None leaves the folder's.
        start_model: File that the job starts from; it travels inside the job, where ``sites`` are named in an
            application of the server's own: no other needs it.
        for_server: Files beside the configuration, name → content, that only the server needs.

    Raises:
        JobError: ``target`` exists, or is in the job folder.
    """
    if target.resolve().is_relative_to(folder.resolve()):
        raise JobError(f"{target}: in the job folder {folder} itself; give another place.")
    if target.exists():
        raise JobError(f"{target}: exists already; give a folder that does not.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".histoflare-") as scratch:
        made = Path(scratch) / target.name
        files = dict(for_server or {})
        if start_model is not None:
            files[START_MODEL_FILE] = start_model.read_bytes()
            changes = {**changes, "start_model": START_MODEL_FILE}
        _write_variant(folder, made, changes, sites, files, scope)
        made.rename(target)
    return target


def _write_variant(
    folder: Path,
    target: Path,
    changes: Mapping[str, Any],
    sites: Sequence[str] | None,
    files: Mapping[str, bytes],
    scope: str | None,
) -> None:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(PRESETS_FOLDER))
    changes = {AGREED.get(name, name): value for name, value in changes.items()}
    lines = [f"{name} = {json.dumps(value)}" for name, value in changes.items()]
    if lines:
        variables = target / CONFIG_FOLDER / VARIABLES_FILE
        text = variables.read_text()
        variables.write_text(text + "\n# Changed for this run:\n" + "\n".join(lines) + "\n")
    meta = json.loads((target / META_FILE).read_text())
    place = target / CONFIG_FOLDER
    if sites is not None:
        meta["deploy_map"] = {"app": ["server", *sites]}
        if files:
            place = target / SERVER_APP / CONFIG_FOLDER.name
            shutil.rmtree(target / SERVER_APP, ignore_errors=True)
            shutil.copytree(target / CONFIG_FOLDER, place)
            meta["deploy_map"] = {SERVER_APP: ["server"], CONFIG_FOLDER.parent.name: list(sites)}
    for name, content in files.items():
        (place / name).write_bytes(content)
    if "min_clients" in changes:  # FLARE wants it in both places
        meta["min_clients"] = changes["min_clients"]
    if scope is not None:
        meta["scope"] = scope
    write_json(target / META_FILE, meta)


@dataclass(frozen=True)
class Preset:
    """Other figures of a job, ``changes`` for :func:`write_variant`, and the scope they need, if any."""

    changes: dict[str, Any]
    scope: str | None


def read_preset(folder: Path, name: str) -> Preset:
    """Return a preset of a job folder. Its ``scope``, where it says one, goes into the job's ``meta.json``.

    Raises:
        JobError: The job has no such preset, or it cannot be read.
    """
    presets = sorted(path.stem for path in (folder / PRESETS_FOLDER).glob("*.conf"))
    if name not in presets:
        raise JobError(f"{folder}: has no preset '{name}'; it has: {', '.join(presets) or 'none'}.")
    content = read_configuration(folder / PRESETS_FOLDER / f"{name}.conf")
    scope = content.pop("scope", None)
    return Preset(_dotted(content), None if scope is None else str(scope))


def _dotted(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in content.items():
        changes |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return changes
