"""Reads and writes a site's own file, a TOML file with comments. No other module does."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from histoflare.checks import is_whole
from histoflare.errors import JobError, list_lines
from histoflare.site.configuration import CACHE_MB, SiteConfiguration
from histoflare.site.kinds import KINDS
from histoflare.storage import real_path, write_text

SITES_VARIABLE = "HISTOFLARE_SITES"
"""Environment variable: a folder with one ``<site>.toml`` each. For simulations on one machine."""

SITE_FILE = "histoflare.toml"
"""A provisioned site's own file, in the ``local`` folder of its startup kit."""

PSEUDONYM = "[a-z0-9-]{1,32}"

OTHER_PATHS = ("records", "ledger", "ledger_key", "encoder_weights")
"""Keys of paths but those of the data."""

OPTIONAL = ("ledger", "ledger_key")
"""Keys that stand in a written file as a comment where there is nothing to say."""

_WORKSTATION = """
# One of several sites on one workstation: its ledger is one to try things out with, and no steward's.
workstation = true
"""

_TEMPLATE = """\
# What histoflare needs to know about this site. No job can read or change it.
# Relative paths start at this file's folder.

{data}

# Folder for this site's own notes of each run: what it keeps from round to round, TensorBoard, predictions.
# They name slides and patients, and stay here.
records = {records}

# This site's privacy ledger: what was spent on which patients, and what left unprotected, over all jobs and
# all kits. It is made once, outside the kit (histoflare ledger create), and kept; no job runs without it.
ledger = {ledger}

# The key under which patients stand in the ledger, in another folder, and not in the same backup.
ledger_key = {ledger_key}

# true: bags that are missing, or not made as the job wants them, are made before the first round. Bags that
# were imported, or made with other mosaic parameters than the defaults, are then made again.
prepare = {prepare}

# For prepare: the encoder's weight file and the SHA-256 the sites agreed on; "" for an encoder without one. A
# TorchScript file has another beside it, FILE.toml, which says its mean, std and input size.
encoder_weights = {encoder_weights}
encoder_sha256 = {encoder_sha256}

# Memory for features or images, in MiB; those beyond it are read from disk each time.
cache_mb = {cache_mb}

# Where models and encoders run: "cpu", "cuda" or "cuda:1". Only the CPU gives the same bytes again.
device = {device}

# true: this site never trains; it only says how well a model does on its patients.
evaluation_only = {evaluation_only}

# The name under which other sites see this one: a-z, 0-9 and '-', at most 32; "" for its FLARE name.
pseudonym = {pseudonym}
"""


def write_site_file(path: Path, configuration: SiteConfiguration) -> None:
    """Write ``configuration`` as a commented TOML file that its owner can edit."""
    of_kinds = [
        "\n".join([kind.comment, *(f"{key} = {_toml(configuration.files.get(key))}" for key in kind.keys)])
        for kind in KINDS.values()
    ]
    own = {name: _toml(value) for name, value in vars(configuration).items() if name != "files"}
    text = _TEMPLATE.format(data="\n\n".join(of_kinds), **own)
    for name in OPTIONAL:
        if getattr(configuration, name) is None:
            text = text.replace(f'\n{name} = ""\n', f'\n# {name} = ""\n')
    write_text(path, text + (_WORKSTATION if configuration.workstation else ""))


def named_ledger(path: Path) -> tuple[Path, Path] | None:
    """Return what a site's file says of ledger and key, which may have nothing else in it yet; None: nothing.

    Raises:
        JobError: The file is missing or no TOML, or says one of the two (SITE_NOT_CONFIGURED).
    """
    content = _read_toml(path)
    said = [content.get(name) for name in OPTIONAL]
    if not any(said):
        return None
    if not all(isinstance(text, str) and text for text in said):
        raise JobError(f"{path}: ledger and ledger_key: give both or neither", reason="SITE_NOT_CONFIGURED")
    folder = real_path(path).parent
    return folder / str(said[0]), folder / str(said[1])


def name_ledger(path: Path, ledger: Path, key: Path) -> bool:
    """Say in a site's file where its ledger and the key are; return whether the file was changed.

    All else in the file stays as it is, comments too. What it says of a ledger already is replaced.

    Raises:
        JobError: The file is missing or no TOML (SITE_NOT_CONFIGURED).
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    content = _read_toml(path)
    for name, value in (("ledger", ledger), ("ledger_key", key)):
        if content.get(name) == str(value):
            continue
        line = f"{name} = {_toml(value)}"
        said = re.compile(rf"^[ \t]*{name}[ \t]*=.*$", re.MULTILINE)
        unsaid = re.compile(rf"^#[ \t]*{name}[ \t]*=.*$", re.MULTILINE)
        pattern = said if name in content else unsaid
        text, replaced = pattern.subn(lambda _, line=line: line, text, count=1)  # type: ignore[misc]
        if not replaced:
            text = f"{line}\n{text}"  # before any table
    if text == path.read_text(encoding="utf-8"):
        return False
    named = tomllib.loads(text)
    assert (named["ledger"], named["ledger_key"]) == (str(ledger), str(key)), "the file says it now"
    write_text(path, text)
    return True


def read_site_file(path: Path, site: str | None = None) -> SiteConfiguration:
    """Read a site's file.

    Relative paths in it start at its folder. If it does not say where ``records`` are, they are in
    ``records`` beside a ``histoflare.toml``, in ``records/<site>`` beside a ``<site>.toml``.

    Args:
        path: The file.
        site: The name under which the site takes part, if it is known.

    Raises:
        JobError: The file is missing, is not TOML, or has a missing, unknown or unusable key; all of these
            are listed (SITE_NOT_CONFIGURED).
    """
    content = _read_toml(path)
    problems = _problems(content)
    if problems:
        listed = list_lines(problems)
        raise JobError(
            f"{path}: cannot be used as a site's file; correct:{listed}", reason="SITE_NOT_CONFIGURED"
        )
    records = "records" if path.name == SITE_FILE else f"records/{path.stem}"
    return replace(make_configuration({"records": records, **content}, real_path(path).parent), site=site)


def make_configuration(content: Mapping[str, Any], folder: Path = Path()) -> SiteConfiguration:
    """Return the configuration of a site whose file has ``content``, which is not checked.

    Args:
        folder: Where relative paths start.
    """
    return SiteConfiguration(
        files={key: folder / content[key] for key in _keys() if content.get(key)},
        **{name: folder / content[name] for name in OTHER_PATHS if content.get(name)},
        prepare=content.get("prepare", False),
        encoder_sha256=content.get("encoder_sha256") or None,
        cache_mb=content.get("cache_mb", CACHE_MB),
        device=content.get("device", "cpu"),
        evaluation_only=content.get("evaluation_only", False),
        pseudonym=content.get("pseudonym") or None,
        workstation=content.get("workstation", False),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = _needed(", ", ' = "…"')
        raise JobError(
            f"{path}: not found. Write this site's file ({said}).",
            reason="SITE_NOT_CONFIGURED",
        ) from None
    except OSError as error:
        raise JobError(
            f"{path}: cannot be read: {error.strerror or error}", reason="SITE_NOT_CONFIGURED"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not a TOML file: {error}", reason="SITE_NOT_CONFIGURED") from None


def read_own_file(site: str, local_folder: Path) -> SiteConfiguration:
    """Return what the file of ``site`` says, wherever it is; errors as :func:`read_site_file`."""
    return read_site_file(find_site_file(site, local_folder), site)


def find_site_file(site: str, local_folder: Path) -> Path:
    """Return the file of ``site``: from :data:`SITES_VARIABLE` if set, else from the kit's local folder."""
    folder = os.environ.get(SITES_VARIABLE)
    return Path(folder) / f"{site}.toml" if folder else local_folder / SITE_FILE


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _matches(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_pseudonym(text: str) -> bool:
    """Return whether a text can be a site's pseudonym."""
    return re.fullmatch(PSEUDONYM, text) is not None


_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "records": (_is_path, "the path of a folder"),
    "ledger": (_is_text, 'the path of a file, or ""'),
    "ledger_key": (_is_text, 'the path of a file, or ""'),
    "prepare": (_is_bool, "true or false"),
    "encoder_weights": (_is_text, 'the path of a file, or ""'),
    "encoder_sha256": (_matches("|[0-9a-fA-F]{64}"), '64 hexadecimal digits, or ""'),
    "cache_mb": (lambda value: is_whole(value, 0), "a whole number of MiB, at least 0"),
    "device": (_matches(r"cpu|cuda(:\d+)?"), '"cpu", "cuda" or "cuda:<n>"'),
    "evaluation_only": (_is_bool, "true or false"),
    "pseudonym": (_matches(f"|{PSEUDONYM}"), "at most 32 of a-z, 0-9 and '-'"),
    "workstation": (_is_bool, "true or false"),
}
"""Key, but those of the data → whether a value of it can be used, and what it must be."""

_MOVED = {
    "epsilon": "stands in policy.toml, the site's own policy, beside this file in the kit; take it out here"
}
"""Keys of earlier versions → where what they said now stands."""


def entries() -> list[str]:
    """Return every key that a site's file may have."""
    return [*_keys(), *_RULES]


def _keys() -> dict[str, str]:
    """Return the keys of all kinds of data, and what a value of each must be."""
    return {key: wanted for kind in KINDS.values() for key, wanted in kind.keys.items()}


def _needed(between: str, after: str = "") -> str:
    """Return in words what a site's file has to name."""
    return ", or ".join(between.join(f"{key}{after}" for key in kind.keys) for kind in KINDS.values())


def _missing(content: Mapping[str, Any]) -> list[str]:
    """Return which keys of the data are missing: no kind is named, or one in part."""
    of_kinds = [{key: content.get(key) not in (None, "") for key in kind.keys} for kind in KINDS.values()]
    if not any(any(given.values()) for given in of_kinds):
        return list(of_kinds[0])
    return [key for given in of_kinds if any(given.values()) for key, there in given.items() if not there]


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = [f"{name}: missing (a site needs {_needed(' and ')})" for name in _missing(content)]
    rules = {key: (_is_text, wanted) for key, wanted in _keys().items()} | _RULES
    for name, value in content.items():
        if name in _MOVED:
            problems.append(f"{name}: {_MOVED[name]}")
        elif name not in rules:
            problems.append(f"{name}: unknown; there are {', '.join(rules)}")
        elif not rules[name][0](value):
            problems.append(f"{name}: must be {rules[name][1]}, not {value!r}")
    if not problems and bool(content.get("encoder_weights")) != bool(content.get("encoder_sha256")):
        problems.append("encoder_weights and encoder_sha256: give both or neither")
    if not problems and bool(content.get("ledger")) != bool(content.get("ledger_key")):
        problems.append("ledger and ledger_key: give both or neither")
    return problems


def _toml(value: object) -> str:
    """Return ``value`` as TOML; None is an empty text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = "" if value is None else str(value)
    # JSON's escapes are TOML's; TOML has one control character more.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
