"""The four files of a job's application: JSON that never varies, and TOML within bounds.

FLARE's two files are the same in every job: :data:`CLIENT_CONFIGURATION` and :data:`SERVER_CONFIGURATION`.
They name the few fixed classes of this package, and a site compares them with its own. Whatever a consortium
decides stands in ``job.toml`` and ``protocol.toml``, which FLARE never opens. TOML has no includes, no
references and no environment, and here it is bounded in size, depth and numbers before anybody looks at it.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.errors import JobError

CLIENT_FILE = "config_fed_client.json"
SERVER_FILE = "config_fed_server.json"
JOB_FILE = "job.toml"
PROTOCOL_FILE = "protocol.toml"
START_MODEL_FILE = "start_model.safetensors"
"""Beside a server's configuration: the model that a job starts from or asks about."""
EARLIER_ROUNDS_FILE = "earlier_rounds.json"
"""Beside a server's configuration, of a job that goes on after another: the rows of that one."""

SERVER_ONLY = {START_MODEL_FILE: 4 << 30, EARLIER_ROUNDS_FILE: 16 << 20}
"""Files that go to the server alone, and how many bytes each may have."""

CONFIG_FOLDER = Path("app") / "config"
SERVER_APP = "app_server"
META_FILE = "meta.json"
PRESETS_FOLDER = "presets"
"""In a job folder: named sets of other figures, ``<name>.toml``. Nobody but the lead reads them."""

FORMAT = 1
"""Of ``job.toml``. Another one is of another release: JOB_VERSION."""

MOST_BYTES = 1 << 16
"""Of each of the four files."""
LONGEST_LINE = 1000
"""Bytes. A key of many dots costs a parser the square of their number."""
DEEPEST = 5
LONGEST_LIST = 10_000
LONGEST_TEXT = 1000
LARGEST_WHOLE = 2**53
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_OLD_FILES = ("job.conf", "config_fed_client.conf", "config_fed_server.conf")

_DOWNLOAD_BYTES = 16 << 20
"""Of a model sent at once: FLARE keeps a thread for each piece, a minute long."""

CLIENT_CONFIGURATION: dict[str, Any] = {
    "format_version": 2,  # stands first: else "nvflare job submit" loses all but the first block
    "np_download_chunk_size": _DOWNLOAD_BYTES,
    "task_data_filters": [],
    "task_result_filters": [],
    "executors": [
        {
            "tasks": ["hello", "train", "evaluate"],
            "executor": {"path": "histoflare.flare.executor.SiteExecutor", "args": {}},
        }
    ],
    "components": [],
}

SERVER_CONFIGURATION: dict[str, Any] = {
    "format_version": 2,
    "np_download_chunk_size": _DOWNLOAD_BYTES,
    "server": {"heart_beat_timeout": 600, "task_request_interval": 0.1},  # seconds
    "task_data_filters": [],
    "task_result_filters": [],
    "workflows": [
        {
            "id": "rounds",
            "path": "histoflare.flare.workflow.AskingScatterAndGather",
            "args": {"custom": "{JOB_CUSTOM_DIR}"},
        }
    ],
    "components": [
        {"id": "persistor", "path": "histoflare.flare.persistor.SeededPersistor", "args": {}},
        {"id": "aggregator", "path": "histoflare.flare.aggregator.SiteOrderAggregator", "args": {}},
        {"id": "collector", "path": "histoflare.flare.aggregator.MetricsCollector", "args": {}},
        {
            "id": "shareable_generator",
            "path": "histoflare.flare.shareables.AskingShareableGenerator",
            "args": {},
        },
    ],
}

CONFIGURATIONS = {CLIENT_FILE: CLIENT_CONFIGURATION, SERVER_FILE: SERVER_CONFIGURATION}


def configuration_text(name: str) -> str:
    """Return the text of one of FLARE's two files, as a job folder has it."""
    return json.dumps(CONFIGURATIONS[name], indent=2) + "\n"


def check_configuration(name: str, content: bytes) -> None:
    """Compare one of FLARE's two files with this package's own.

    By what it says, not by its layout: FLARE's submission writes it anew.

    Raises:
        JobError: It says anything else (JOB_INVALID).
    """
    try:
        said = json.loads(_text(name, content, "ascii"), object_pairs_hook=take_once)
        same = _written(said) == _written(CONFIGURATIONS[name])
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise JobError(
            f"{name}: not what this version of histoflare has. It is the same in every job: take it from a "
            "job that came with this version, and say in job.toml what the job is to do.",
            reason="JOB_INVALID",
        )


def read_toml(name: str, content: bytes) -> dict[str, Any]:
    """Return a TOML file's tables as plain values: texts, numbers, booleans, lists and dictionaries.

    Args:
        name: Of the file, for messages. content: Its bytes.

    Raises:
        JobError: It is not TOML, or larger than a job's file can be (JOB_INVALID).
    """
    text = _text(name, content, "utf-8")
    try:
        tables = tomllib.loads(text)
        _check_value(name, tables, DEEPEST)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{name}: not TOML: {str(error)[:LONGEST_TEXT]}", reason="JOB_INVALID") from None
    except RecursionError:
        raise _too_much(name, "it is nested too deeply") from None
    except ValueError:  # Python's own, of a number with thousands of digits
        raise _too_much(name, "it has a number that is too long") from None
    return tables


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a folder's four files.

    Raises:
        JobError: One is missing, is no plain file, or is too large (JOB_INVALID); the folder is of an earlier
            version's format (JOB_VERSION).
    """
    if any((folder / name).exists() for name in _OLD_FILES):
        raise JobError(
            f"{folder}: a job of an earlier version. A job now has {JOB_FILE} and {PROTOCOL_FILE} beside "
            "FLARE's two JSON files; write them after those of mem_fedavg (docs/jobs.md says how).",
            reason="JOB_VERSION",
        )
    files = {}
    for name in (*CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise JobError(
                f"{path}: not found. A job folder has {META_FILE}, and app/config with {CLIENT_FILE}, "
                f"{SERVER_FILE}, {JOB_FILE} and {PROTOCOL_FILE}.",
                reason="JOB_INVALID",
            )
        with path.open("rb") as file:
            files[name] = file.read(MOST_BYTES + 1)
    return files


def read_tables(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``job.toml`` and ``protocol.toml`` of a configuration folder say.

    Raises:
        JobError: As :func:`read_files` and :func:`check_files`.
    """
    return check_files(read_files(folder))


def check_files(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``job.toml`` and ``protocol.toml`` say, if all four files are those of this version.

    Args:
        files: Name → content, of all four.

    Raises:
        JobError: As :func:`check_configuration` and :func:`read_toml`; or of another format (JOB_VERSION).
    """
    job = read_toml(JOB_FILE, files[JOB_FILE])
    format_ = job.get("format")
    if type(format_) is int and format_ != FORMAT:
        raise JobError(
            f"{JOB_FILE} has the format {format_}, and this version of histoflare reads {FORMAT}. Take the "
            "job that came with the version that the sites have.",
            reason="JOB_VERSION",
        )
    for name in CONFIGURATIONS:
        check_configuration(name, files[name])
    return job, read_toml(PROTOCOL_FILE, files[PROTOCOL_FILE])


def _text(name: str, content: bytes, encoding: str) -> str:
    if len(content) > MOST_BYTES:
        raise _too_much(name, f"it has more than {MOST_BYTES} bytes")
    if max(map(len, content.split(b"\n"))) > LONGEST_LINE:
        raise _too_much(name, f"it has a line of more than {LONGEST_LINE} bytes")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise JobError(f"{name}: not a text in {encoding}.", reason="JOB_INVALID") from None


def _check_value(name: str, value: Any, depth: int) -> None:
    """Refuse values that no job needs: they would cost memory, or hide something where they are shown."""
    if isinstance(value, Mapping):
        if depth == 0:
            raise _too_much(name, "it is nested too deeply")
        for key, entry in value.items():
            if not _KEY.fullmatch(key):
                raise _too_much(name, f"the name {key[:64]!r} is not of letters, digits, '_', '.' and '-'")
            _check_value(name, entry, depth - 1)
    elif isinstance(value, list):
        if depth == 0 or len(value) > LONGEST_LIST:
            raise _too_much(name, "it has a list that is too long, or lists in lists")
        for entry in value:
            _check_value(name, entry, depth - 1)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.isprintable():
            raise _too_much(name, "it has a text that is too long, or that cannot be printed on one line")
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        if abs(value) > LARGEST_WHOLE:
            raise _too_much(name, "it has a whole number beyond 2 to the 53rd")
    elif not (isinstance(value, float) and math.isfinite(value)):
        raise _too_much(name, "it has a date, or a number that is not finite")


def _too_much(name: str, what: str) -> JobError:
    return JobError(f"{name}: cannot be a job's: {what}.", reason="JOB_INVALID")


def take_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return what a JSON object says; ValueError if a key stands in it twice (``object_pairs_hook``)."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _written(content: Any) -> str:
    """Return content as the one text that stands for it; 1, 1.0 and true are three."""
    return json.dumps(content, sort_keys=True)
