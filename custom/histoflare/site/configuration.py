"""Where a site keeps its own things: one commented TOML file per site, never part of a job."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.storage import write_text

SITES_VARIABLE = "HISTOFLARE_SITES"
"""Environment variable: a folder with one ``<site>.toml`` each. For simulations on one machine."""

SITE_FILE = "histoflare.toml"
"""A provisioned site's own file, in the ``local`` folder of its startup kit."""

DATA = ("manifest", "bags", "images")
CACHE_MB = 2048
PSEUDONYM = "[a-z0-9-]{1,32}"

_TEMPLATE = """\
# What histoflare needs to know about this site. No job can read or change it.
# Relative paths start at this file's folder.

# For classification: CSV with the columns slide, patient, label (see: histoflare manifest check --help), and
# the folder of bags made by: histoflare prepare MANIFEST --out BAGS. Both "" at a site without any.
manifest = {manifest}
bags = {bags}

# For segmentation: CSV with the columns image, mask, patient (see: histoflare masks --help); "" for none.
images = {images}

# Folder for this site's own notes of each run: what it keeps from round to round, TensorBoard, predictions.
# They name slides and patients, and stay here.
records = {records}

# This site's privacy ledger: what was spent on which patients, over all jobs. Keep it, and a copy of it:
# without it nobody knows what was spent, and no job that protects patients runs here.
ledger = {ledger}

# The key under which patients stand in the ledger, in another folder, and not in the same backup.
ledger_key = {ledger_key}

# true: bags that are missing, or not made as the job wants them, are made before the first round. Bags that
# were imported, or made with other mosaic parameters than the defaults, are then made again.
prepare = {prepare}

# For prepare: the encoder's weight file and the SHA-256 the sites agreed on; "" for an encoder without one.
encoder_weights = {encoder_weights}
encoder_sha256 = {encoder_sha256}

# Memory for features or images, in MiB; those beyond it are read from disk each time.
cache_mb = {cache_mb}

# Where segmentation networks run: "cpu", "cuda" or "cuda:1". Only the CPU gives the same bytes again.
device = {device}

# true: this site never trains; it only says how well a model does on its patients.
evaluation_only = {evaluation_only}

# The name under which other sites see this one: a-z, 0-9 and '-', at most 32; "" for its FLARE name.
pseudonym = {pseudonym}
"""


@dataclass(frozen=True)
class SiteConfiguration:
    """One site's own settings.

    Attributes:
        manifest: The site's manifest of slides. bags: The folder of their bags. None: it has no bags.
        images: The site's manifest of images with masks; None: it has none.
        records: The folder of its own notes of each run. If not given: ``<bags>-records`` beside the bags, so
            that sites on one machine have one each (beside the images' manifest, by its name, without bags).
        ledger, ledger_key: The site's privacy ledger and its key. If not given: in ``<bags>-ledger`` and
            ``<bags>-keys`` beside the bags.
        prepare: Whether missing or stale bags are made before the first round.
        encoder_weights, encoder_sha256: Of an encoder with a weight file; for ``prepare``.
        cache_mb: Memory for features or images in MiB; at least 0.
        device: Where segmentation networks run: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.
        evaluation_only: Whether training tasks are answered with ``EVALUATION_ONLY``.
        pseudonym: The name under which other sites see this one; None for its FLARE name.
    """

    manifest: Path | None = None
    bags: Path | None = None
    images: Path | None = None
    records: Path = Path()
    ledger: Path = Path()
    ledger_key: Path = Path()
    prepare: bool = False
    encoder_weights: Path | None = None
    encoder_sha256: str | None = None
    cache_mb: int = CACHE_MB
    device: str = "cpu"
    evaluation_only: bool = False
    pseudonym: str | None = None

    def __post_init__(self) -> None:
        beside = {"records": "records", "ledger": "ledger/ledger.sqlite", "ledger_key": "keys/ledger.key"}
        data = self.bags or (self.images and self.images.with_suffix(""))
        if data is None:
            raise JobError("A site needs bags or images.", reason="SITE_NOT_CONFIGURED")
        if self.bags and self.images and Path() in (self.ledger, self.ledger_key):
            raise JobError(
                "A site with bags and with images must say where its one ledger and its key are.",
                reason="SITE_NOT_CONFIGURED",
            )
        for name, place in beside.items():
            if getattr(self, name) == Path():
                object.__setattr__(self, name, data.parent / f"{data.name}-{place}")


def write_site_file(path: Path, configuration: SiteConfiguration) -> None:
    """Write ``configuration`` as a commented TOML file that its owner can edit."""
    write_text(path, _TEMPLATE.format(**{name: _toml(value) for name, value in vars(configuration).items()}))


def read_site_file(path: Path) -> SiteConfiguration:
    """Read a site's file.

    Relative paths in it start at its folder. What it does not say of ``records``, ``ledger`` and
    ``ledger_key`` are ``records``, ``ledger/ledger.sqlite`` and ``keys/ledger.key`` beside a
    ``histoflare.toml``; beside a ``<site>.toml``, which has others next to it, they bear the site's name.

    Raises:
        JobError: The file is missing, is not TOML, or has a missing, unknown or unusable key; all of these
            are listed (SITE_NOT_CONFIGURED).
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(
            f'{path}: not found. Write this site\'s file (manifest = "…", bags = "…", or images = "…").',
            reason="SITE_NOT_CONFIGURED",
        ) from None
    except OSError as error:
        raise JobError(
            f"{path}: cannot be read: {error.strerror or error}", reason="SITE_NOT_CONFIGURED"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not a TOML file: {error}", reason="SITE_NOT_CONFIGURED") from None
    problems = _problems(content)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise JobError(
            f"{path}: cannot be used as a site's file; correct:{listed}", reason="SITE_NOT_CONFIGURED"
        )
    folder = path.absolute().parent
    ours = path.name == SITE_FILE
    records = "records" if ours else f"records/{path.stem}"
    ledger = f"ledger/{'ledger' if ours else path.stem}.sqlite"
    key = f"keys/{'ledger' if ours else path.stem}.key"
    weights = content.get("encoder_weights")
    data = {name: folder / content[name] for name in DATA if content.get(name)}
    return SiteConfiguration(
        **data,
        records=folder / content.get("records", records),
        ledger=folder / content.get("ledger", ledger),
        ledger_key=folder / content.get("ledger_key", key),
        prepare=content.get("prepare", False),
        encoder_weights=folder / weights if weights else None,
        encoder_sha256=content.get("encoder_sha256") or None,
        cache_mb=content.get("cache_mb", CACHE_MB),
        device=content.get("device", "cpu"),
        evaluation_only=content.get("evaluation_only", False),
        pseudonym=content.get("pseudonym") or None,
    )


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
    "manifest": (_is_text, 'the path of a CSV, or ""'),
    "bags": (_is_text, 'the path of a folder, or ""'),
    "images": (_is_text, 'the path of a CSV, or ""'),
    "records": (_is_path, "the path of a folder"),
    "ledger": (_is_path, "the path of a file"),
    "ledger_key": (_is_path, "the path of a file"),
    "prepare": (_is_bool, "true or false"),
    "encoder_weights": (_is_text, 'the path of a file, or ""'),
    "encoder_sha256": (_matches("|[0-9a-fA-F]{64}"), '64 hexadecimal digits, or ""'),
    "cache_mb": (lambda value: type(value) is int and value >= 0, "a whole number of MiB, at least 0"),
    "device": (_matches(r"cpu|cuda(:\d+)?"), '"cpu", "cuda" or "cuda:<n>"'),
    "evaluation_only": (_is_bool, "true or false"),
    "pseudonym": (_matches(f"|{PSEUDONYM}"), "at most 32 of a-z, 0-9 and '-'"),
}
"""Key → whether a value of it can be used, and what it must be."""

_MOVED = {
    "epsilon": "stands in policy.toml, the site's own policy, beside this file in the kit; take it out here"
}
"""Keys of earlier versions → where what they said now stands."""


def _problems(content: Mapping[str, Any]) -> list[str]:
    given = [name for name in DATA if content.get(name) not in (None, "")]
    problems = [
        f"{name}: missing (a site needs manifest and bags, or images)"
        for name in ("manifest", "bags")
        if name not in given and ("images" not in given or "manifest" in given or "bags" in given)
    ]
    for name, value in content.items():
        if name in _MOVED:
            problems.append(f"{name}: {_MOVED[name]}")
        elif name not in _RULES:
            problems.append(f"{name}: unknown; there are {', '.join(_RULES)}")
        elif not _RULES[name][0](value):
            problems.append(f"{name}: must be {_RULES[name][1]}, not {value!r}")
    if not problems and bool(content.get("encoder_weights")) != bool(content.get("encoder_sha256")):
        problems.append("encoder_weights and encoder_sha256: give both or neither")
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
