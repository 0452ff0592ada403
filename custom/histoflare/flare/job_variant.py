"""What a lead makes of a job folder: the same with other figures, for some sites, from a model; its presets.

Comments stay: a variant is the folder's own TOML with some values changed. Sites never import this.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.container import Container
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Table

from histoflare.errors import JobError
from histoflare.flare.job import Job, read_job
from histoflare.flare.job_files import (
    CONFIG_FOLDER,
    JOB_FILE,
    META_FILE,
    PRESETS_FOLDER,
    PROTOCOL_FILE,
    SERVER_APP,
    START_MODEL_FILE,
    read_tables,
    read_toml,
)
from histoflare.flare.job_schema import AGREED, VARIABLES
from histoflare.storage import write_json

DECIDED = {"rounds": "protocol.stop.rounds"} | {f"task.{name}": f"protocol.{name}" for name in AGREED}
"""Variables that the protocol decides: a variant that changes one changes the protocol with it."""


MODEL = ("task.model", "task.model.name")
"""Variables that say which model it is; they come before those of its settings."""


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
        changes: Dotted variable names and their values, e.g. ``{"rounds": 5, "task.patch_px": 224}``. None
            takes a variable out.
        sites: Whom the job is for; None is every site of the federation.
        scope: The privacy scope it asks for; None leaves the folder's.
        start_model: File that the job starts from. It travels in an application of the server's own, as no
            site needs it: with it, ``sites`` must be named.
        for_server: Further files of the server's, name → content.

    Raises:
        JobError: ``target`` exists, or is in the job folder; a variable cannot be; sites are not named.
    """
    if target.resolve().is_relative_to(folder.resolve()):
        raise JobError(f"{target}: in the job folder {folder} itself; give another place.")
    if target.exists():
        raise JobError(f"{target}: exists already; give a folder that does not.")
    files = dict(for_server or {})
    if start_model is not None:
        files[START_MODEL_FILE] = start_model.read_bytes()
    if files and sites is None:
        raise JobError(
            f"{folder}: a job with a model in it names its sites, so that the model goes to the server alone "
            "(--sites a,b,c).",
            reason="SITES_NOT_NAMED",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".histoflare-") as scratch:
        made = Path(scratch) / target.name
        shutil.copytree(folder, made, ignore=shutil.ignore_patterns(PRESETS_FOLDER, SERVER_APP, ".*"))
        _change_tables(made / CONFIG_FOLDER, changes)
        _change_meta(made, changes.get("least_sites"), sites, scope, files)
        made.rename(target)
    return target


def try_variant(folder: Path, changes: Mapping[str, Any]) -> Job:
    """Return the job that :func:`write_variant` would make, and leave nothing on the disk.

    Raises:
        JobError: The changes make no job.
    """
    with tempfile.TemporaryDirectory(prefix="histoflare-") as scratch:
        return read_job(write_variant(folder, Path(scratch) / folder.resolve().name, changes))


def _change_tables(config: Path, changes: Mapping[str, Any]) -> None:
    read_tables(config)  # what is wrong with the folder is said of the folder
    named = {DECIDED.get(name, name): value for name, value in changes.items()}
    unknown = [name for name in named if name.partition(".")[0] not in VARIABLES]
    if unknown:
        raise JobError(
            f"A job has no variable {', '.join(unknown)}; {JOB_FILE} and {PROTOCOL_FILE} list them.",
            reason="JOB_INVALID",
        )
    prefix = "protocol."
    _change(
        config / PROTOCOL_FILE, {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
    )
    _change(config / JOB_FILE, {n: v for n, v in named.items() if not n.startswith(prefix)})


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a TOML file and leave all else as it is.

    Another model takes none of the settings of the one that was there.
    """
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    first = [name for name in MODEL if name in changes]
    for name in (*first, *(name for name in changes if name not in first)):
        value = changes[name]
        *above, last = name.split(".")
        table: Any = document
        for part in above:
            if value is None and part not in table:
                break
            table = table.setdefault(part, tomlkit.table())
            if not isinstance(table, Mapping):
                raise JobError(f"{name}: '{part}' is no table in {path.name}.", reason="JOB_INVALID")
        else:
            try:
                if value is None:
                    table.pop(last, None)
                else:
                    if name == MODEL[1] and table.get(last) != value:
                        table.clear()
                    _set(table, last, _plain(value))
            except (TOMLKitError, ValueError, TypeError):
                raise JobError(f"{name}: {value!r} is no value of a job.", reason="JOB_INVALID") from None
    path.write_text(tomlkit.dumps(document), encoding="utf-8")


def _set(table: Any, name: str, value: Any) -> None:
    """Set a value of a table; a new name comes right after the last one that the table has.

    What stands below that in the file, as comments do, may speak of the next table.
    """
    container = table.value if isinstance(table, Table) else table
    names = [
        key
        for key, item in (container.body if isinstance(container, Container) else ())
        if key is not None and not isinstance(item, Table | AoT)
    ]
    if name in table or not names:
        table[name] = value
    else:
        container._insert_after(names[-1], name, value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _change_meta(
    job: Path,
    least_sites: int | None,
    sites: Sequence[str] | None,
    scope: str | None,
    files: Mapping[str, bytes],
) -> None:
    meta = json.loads((job / META_FILE).read_text())
    app = CONFIG_FOLDER.parent.name
    if sites is not None:
        meta["deploy_map"] = {app: ["server", *sites]}
    if files:
        meta["deploy_map"] = {SERVER_APP: ["server"], app: list(sites or ())}
        place = job / SERVER_APP / CONFIG_FOLDER.name
        shutil.copytree(job / CONFIG_FOLDER, place)
        for name, content in files.items():
            (place / name).write_bytes(content)
    if least_sites is not None:  # FLARE wants it too, under its own word
        meta["min_clients"] = least_sites
    if scope is not None:
        meta["scope"] = scope
    write_json(job / META_FILE, meta)


@dataclass(frozen=True)
class Preset:
    """Other figures of a job, ``changes`` for :func:`write_variant`, and the scope they need, if any."""

    changes: dict[str, Any]
    scope: str | None


def read_preset(folder: Path, name: str) -> Preset:
    """Return a preset of a job folder. Its ``scope``, where it says one, goes into the job's ``meta.json``.

    Where a preset has one of ``privacy.noise_multiplier`` and ``privacy.budget_share``, the other is taken
    out: they are two ways to say the same.

    Raises:
        JobError: The job has no such preset, or it cannot be read.
    """
    presets = sorted(path.stem for path in (folder / PRESETS_FOLDER).glob("*.toml"))
    if name not in presets:
        raise JobError(f"{folder}: has no preset '{name}'; it has: {', '.join(presets) or 'none'}.")
    path = folder / PRESETS_FOLDER / f"{name}.toml"
    content = read_toml(str(path), path.read_bytes())
    scope = content.pop("scope", None)
    return Preset(instead(flatten(content)), None if scope is None else str(scope))


EITHER = (
    ("privacy.noise_multiplier", "privacy.budget_share"),
    ("task.local_epochs", "task.local_steps"),
)
"""Pairs of variables of which a job says one."""

SHARE = "protocol.split.test_fraction"
FOLDS = ("protocol.split.folds", "protocol.split.fold")


def instead(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes that also take out what a changed variable stands instead of.

    That is the other one of :data:`EITHER`; the folds, where a share of test patients is said; and that
    share, where folds and a fold are said together. Either of these alone keeps the share that the job has.
    """
    out = dict(changes)
    for one, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
        if changes.get(one) is not None:
            out.setdefault(other, None)
    if changes.get(SHARE) is not None:
        out = dict.fromkeys(FOLDS) | out
    elif all(changes.get(name) is not None for name in FOLDS):
        out.setdefault(SHARE, None)
    return out


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a table of tables as one table: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the changes of ``name=value`` texts; a value is JSON, or else a text.

    Raises:
        JobError: One has no name or no value.
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise JobError(f"--set takes name=value, not '{pair}'.")
        if name.partition(".")[0] not in VARIABLES:
            raise JobError(
                f"--set {pair}: a job has no variable '{name}'; {JOB_FILE} and {PROTOCOL_FILE} list them."
            )
        changes[name] = read_value(value)
    return instead(changes)


def read_value(text: str) -> Any:
    """Return a value given on a command line: JSON, or else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
