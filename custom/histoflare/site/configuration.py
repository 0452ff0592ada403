"""Where a site keeps its own things: one commented TOML file per site, never part of a job."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from histoflare.errors import JobError

SITES_VARIABLE = "HISTOFLARE_SITES"
"""Environment variable: a folder with one ``<site>.toml`` each. For simulations on one machine."""

SITE_FILE = "histoflare.toml"
"""A provisioned site's own file, in the ``local`` folder of its startup kit."""

_TEMPLATE = """\
# What histoflare needs to know about this site. No job can read or change it.

# CSV with the columns slide, patient, label (see: histoflare manifest check --help)
manifest = {manifest}

# Folder of bags made by: histoflare prepare MANIFEST --out BAGS
bags = {bags}
"""


@dataclass(frozen=True)
class SiteConfiguration:
    """One site's own paths.

    Attributes:
        manifest: The site's manifest.
        bags: The folder of its bags.
    """

    manifest: Path
    bags: Path


def write_site_file(path: Path, configuration: SiteConfiguration) -> None:
    """Write ``configuration`` as a commented TOML file that its owner can edit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quoted = {name: _quote(value) for name, value in vars(configuration).items()}
    path.write_text(_TEMPLATE.format(**quoted))


def read_site_file(path: Path) -> SiteConfiguration:
    """Read a site's file. Relative paths in it start at its folder.

    Raises:
        JobError: The file is missing, is not TOML, or lacks or adds a key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise JobError(
            f'{path}: not found. Write this site\'s file (manifest = "…", bags = "…").',
            reason="SITE_NOT_CONFIGURED",
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path}: not a TOML file: {error}", reason="SITE_NOT_CONFIGURED") from None
    wanted = set(SiteConfiguration.__dataclass_fields__)
    if set(content) != wanted or not all(isinstance(value, str) for value in content.values()):
        raise JobError(
            f"{path}: must have exactly the texts {', '.join(sorted(wanted))}; "
            f"it has {', '.join(sorted(content)) or 'nothing'}.",
            reason="SITE_NOT_CONFIGURED",
        )
    return SiteConfiguration(**{name: path.parent / content[name] for name in wanted})


def find_site_file(site: str, local_folder: Path) -> Path:
    """Return the file of ``site``: from :data:`SITES_VARIABLE` if set, else from the kit's local folder."""
    folder = os.environ.get(SITES_VARIABLE)
    return Path(folder) / f"{site}.toml" if folder else local_folder / SITE_FILE


def _quote(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
