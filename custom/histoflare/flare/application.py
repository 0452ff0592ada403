"""The boundary of a job: its bytes are looked at before FLARE unpacks, parses or starts anything of it.

At a site an application is exactly the four files of :mod:`histoflare.flare.job_files` and FLARE's signatures
of them; JSON as this package has it, TOML that a job can be made of. Nothing else can be in it, so that there
is nothing to forbid. The server looks at a submission in the same way, with the two files that it alone gets.

All functions here raise :class:`~histoflare.errors.JobError` with one of two reasons, which are all that a
site says of it: JOB_INVALID, or JOB_VERSION where the job is of another release. The message is for the
people on whose machine the check is made.
"""

from __future__ import annotations

import io
import json
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from histoflare.errors import HistoflareError, JobError
from histoflare.flare.job_files import (
    CONFIG_FOLDER,
    CONFIGURATIONS,
    EARLIER_ROUNDS_FILE,
    JOB_FILE,
    META_FILE,
    MOST_BYTES,
    PRESETS_FOLDER,
    PROTOCOL_FILE,
    SERVER_APP,
    SERVER_ONLY,
    START_MODEL_FILE,
    check_files,
)
from histoflare.flare.job_schema import COHORT, check_tables

CODES = ("JOB_INVALID", "JOB_VERSION")
"""All that a site says of a job it refuses before the job runs."""

_FILES = (*CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE)
_SIGNATURES = (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE)
_CONFIG = CONFIG_FOLDER.name
_APP = CONFIG_FOLDER.parent.name

META_KEYS = frozenset(
    {
        *("name", "min_clients", "scope", "resource_spec", "deploy_map"),
        *("job_id", "job_folder_name", "study", "status", "data_storage_format"),
        *("submitter_name", "submitter_org", "submitter_role", "submit_time", "submit_time_iso"),
        *("start_time", "duration", "last_schedule_time", "schedule_count", "schedule_history"),
        *("job_deploy_detail", "job_clients", "cloned_from", "approvals"),
    }
)
"""What a job's meta may speak of: what FLARE notes of any job, and nothing that it does something on."""

MOST_META = 1 << 20
"""Characters and values in all of a meta."""

_LEAD_KEYS = frozenset({"name", "min_clients", "scope", "resource_spec", "deploy_map"})
_PRESET = re.compile(rf"{PRESETS_FOLDER}/[A-Za-z0-9_-]{{1,64}}\.toml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_application(body: object, app: object = _APP) -> None:
    """Look at an application as a server deploys it to a site.

    Args:
        body: The bytes of its zip archive. app: What the server calls it; FLARE writes that into the kit.

    Raises:
        JobError: It is anything else than a job's application.
    """
    if app != _APP:
        raise _invalid(f"an application for a site is called {_APP}")
    if type(body) is not bytes:
        raise _invalid("the application is not an archive")
    files = _open_archive(body, _application_names(_CONFIG + "/"))
    _check_files({name: files[f"{_CONFIG}/{name}"] for name in _FILES if f"{_CONFIG}/{name}" in files})


def check_folder(config: Path) -> None:
    """Look at a deployed application on the disk: the second look, in the process that runs the job.

    Args:
        config: Its ``config`` folder.

    Raises:
        JobError: It has other files, or they are not a job's.
    """
    app = config.parent
    allowed = _application_names(f"{config.name}/")
    files = {}
    for path in sorted(app.rglob("*")):
        name = path.relative_to(app).as_posix()
        kind = stat.S_IFMT(path.lstat().st_mode)
        if (name + "/" if kind == stat.S_IFDIR else name) not in allowed or kind not in (
            stat.S_IFDIR,
            stat.S_IFREG,
        ):
            raise _invalid(f"it brings something else than a job of this project: {name[:200]!r}")
        if path.parent == config and path.name in _FILES:
            with path.open("rb") as file:
                files[path.name] = file.read(MOST_BYTES + 1)
    _check_files(files)


def check_submission(archive: str | bytes) -> None:
    """Look at a job folder as a lead submits it.

    Args:
        archive: Path or bytes of its zip archive, with the job's folder in it.

    Raises:
        JobError: It is anything else than a job folder of this project.
    """
    folder, files = _read_submission(archive)
    meta = _read_meta(files.get(f"{folder}/{META_FILE}", b""))
    unknown = sorted(set(meta) - _LEAD_KEYS)
    if unknown:
        raise _invalid(
            f"{META_FILE} says {', '.join(unknown)[:200]}; it may say {', '.join(sorted(_LEAD_KEYS))}"
        )
    check_meta(meta)
    deployed = meta.get("deploy_map")
    if not isinstance(deployed, Mapping) or not set(deployed) <= {_APP, SERVER_APP} or _APP not in deployed:
        raise _invalid(f"deploy_map deploys {_APP}, and {SERVER_APP} to the server where there is one")
    if SERVER_APP in deployed and deployed[SERVER_APP] != ["server"]:
        raise _invalid(f"{SERVER_APP} goes to the server alone")
    if not all(
        isinstance(sites, list) and all(type(site) is str for site in sites) for sites in deployed.values()
    ):
        raise _invalid("deploy_map lists names of sites")
    for app in deployed:
        place = f"{folder}/{app}/{_CONFIG}/"
        job = _check_files({name: files[place + name] for name in _FILES if place + name in files})
        if job["least_sites"] != meta.get("min_clients"):
            raise _invalid(
                f"least_sites is {job['least_sites']} in job.toml, and min_clients another number in "
                f"{META_FILE}"
            )
    asks_model = job["kind"] == "evaluation" and job["task"]["name"] != COHORT
    if asks_model and f"{folder}/{SERVER_APP}/{_CONFIG}/{START_MODEL_FILE}" not in files:
        raise _invalid(
            "an evaluation has a model that it asks about (histoflare job make … --model FILE --sites …)"
        )


def check_server_application(body: bytes, app: str) -> None:
    """Look at an application that a server starts: as at a site, with the server's own two files.

    Raises:
        JobError: It is anything else.
    """
    own = {f"{_CONFIG}/{name}": size for name, size in SERVER_ONLY.items() if app == SERVER_APP}
    files = _open_archive(body, _application_names(_CONFIG + "/") | own)
    _check_files({name: files[f"{_CONFIG}/{name}"] for name in _FILES if f"{_CONFIG}/{name}" in files})


def check_meta(meta: object, job_id: str | None = None) -> None:
    """Look at what FLARE knows of a job: known words only, and nothing that asks a site for something.

    Args:
        job_id: The job that it must be of; None: one that has no id yet.

    Raises:
        JobError: It says anything else.
    """
    if not isinstance(meta, Mapping):
        raise _invalid("the job has no meta")
    unknown = [str(key)[:100] for key in meta if key not in META_KEYS]
    if unknown:
        raise _invalid(f"its meta says {', '.join(unknown)}, which no job of this project does")
    if not _is_small(meta):
        raise _invalid("its meta is large, or not of words and numbers")
    if meta.get("job_id") != job_id:
        raise _invalid("its meta is another job's")
    if meta.get("resource_spec"):
        raise _invalid("resource_spec: a job asks for no resources of a site")
    for key in ("name", "scope"):
        value = meta.get(key)
        if key not in meta or (key, value) == ("scope", ""):  # the default scope is meant
            continue
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise _invalid(f"{key}: up to 64 letters, digits, '_', '.' and '-', a letter or digit first")


def _is_small(meta: object) -> bool:
    """Return whether all of a meta is plain and small: FLARE writes it into the kit as it comes."""
    size, left = 0, [meta]
    while left and size <= MOST_META:
        one = left.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            left += one
        elif one is not None and type(one) not in (bool, int, float):
            return False
        size += 1
    return not left and size <= MOST_META


def code_of(error: BaseException) -> str:
    """Return what a site may say of why a job was refused."""
    reason = error.reason if isinstance(error, HistoflareError) else ""
    return reason if reason in CODES else "JOB_INVALID"


def _check_files(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Check the four files; return what ``job.toml`` says.

    Raises:
        JobError: One is missing or wrong; every other reason of a part counts as JOB_INVALID.
    """
    missing = [name for name in _FILES if name not in files]
    if missing:
        raise _invalid(f"{', '.join(missing)}: missing")
    try:
        job, protocol = check_files(files)
        check_tables(job, protocol)
    except HistoflareError as error:
        raise JobError(str(error), reason=code_of(error)) from None
    return job


def _application_names(config: str) -> dict[str, int]:
    """Return every name that may be in an application's archive → how many bytes it may have."""
    names = {config: 0} | {config + name: MOST_BYTES for name in _FILES}
    return names | {place + name: MOST_BYTES for place in ("", config) for name in _SIGNATURES}


def _read_submission(archive: str | bytes) -> tuple[str, dict[str, bytes]]:
    """Return the name of a job folder in an archive, and its files, see :func:`_open_archive`."""
    try:
        with _opened(archive) as opened:
            names = opened.namelist()
    except JobError:
        raise
    except Exception:  # as in _open_archive
        raise _invalid("the submission is not an archive") from None
    folders = {name.partition("/")[0] for name in names}
    folder = folders.pop() if len(folders) == 1 else ""
    if not _NAME.fullmatch(folder):
        raise _invalid(
            f"the archive has one folder, called by letters, digits, '_', '.' and '-', not {folder[:64]!r}"
        )
    allowed = {f"{folder}/": 0, f"{folder}/{META_FILE}": MOST_BYTES}
    allowed |= {f"{folder}/{name}": MOST_BYTES for name in _SIGNATURES}
    for app in (_APP, SERVER_APP):
        allowed |= {f"{folder}/{app}/": 0}
        allowed |= {f"{folder}/{app}/{n}": size for n, size in _application_names(_CONFIG + "/").items()}
    allowed |= {f"{folder}/{SERVER_APP}/{_CONFIG}/{name}": size for name, size in SERVER_ONLY.items()}
    allowed |= {f"{folder}/{PRESETS_FOLDER}/": 0}
    allowed |= {f"{folder}/{PRESETS_FOLDER}/{name}": MOST_BYTES for name in _SIGNATURES}
    presets = [name for name in names if _PRESET.fullmatch(name.removeprefix(f"{folder}/"))]
    return folder, _open_archive(archive, allowed | dict.fromkeys(presets, MOST_BYTES))


def _open_archive(archive: str | bytes, allowed: Mapping[str, int]) -> dict[str, bytes]:
    """Return name → content of an archive's files, if its names are allowed, each once and small enough.

    A file of the server's own is not read: its content is b"".
    """
    try:
        if isinstance(archive, bytes) and len(archive) > 2 * sum(allowed.values()):
            raise _invalid("the archive is too large")
        with _opened(archive) as opened:
            entries = opened.infolist()
            if opened.comment:
                raise _invalid("the archive has a comment")
            for entry in entries:
                _check_entry(entry, allowed)
            if len({entry.filename for entry in entries}) < len(entries):
                raise _invalid("the archive has a name twice")
            files = {}
            for entry in entries:
                if entry.is_dir():
                    continue
                small = allowed[entry.filename] <= MOST_BYTES
                files[entry.filename] = _read_entry(opened, entry) if small else b""
            return files
    except JobError:
        raise
    except Exception:  # zipfile raises whatever its parts do
        raise _invalid("the archive is damaged") from None


@contextmanager
def _opened(archive: str | bytes) -> Iterator[zipfile.ZipFile]:
    """Open an archive, unless its list of entries alone would take much memory."""
    with io.BytesIO(archive) if isinstance(archive, bytes) else Path(archive).open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end is None or end[zipfile._ECD_SIZE] > MOST_BYTES:  # type: ignore[attr-defined]
            raise _invalid("it is not an archive, or one with too many entries")
        with zipfile.ZipFile(file) as opened:
            yield opened


def _check_entry(entry: zipfile.ZipInfo, allowed: Mapping[str, int]) -> None:
    name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
    wanted = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
    if name not in allowed or entry.orig_filename != name:
        raise _invalid(f"it brings something else than a job of this project: {name[:200]!r}")
    if kind not in (0, wanted):
        raise _invalid(f"{name}: a link, or no plain file")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        raise _invalid(f"{name}: packed in an unusual way")
    if entry.file_size > allowed[name]:
        raise _invalid(f"{name}: {entry.file_size} bytes, more than {allowed[name]}")


def _read_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with opened.open(entry) as file:
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES or file.read(1):
            raise _invalid(f"{entry.filename}: larger than it says")
    return content


def _read_meta(content: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise _invalid(f"{META_FILE}: missing, or not a JSON object")
    return meta


def _invalid(what: str) -> JobError:
    return JobError(f"This job is refused: {what}.", reason="JOB_INVALID")


assert set(SERVER_ONLY) == {START_MODEL_FILE, EARLIER_ROUNDS_FILE}
