"""Where a site keeps what: its file is found from its kit's folder, and all else is listed from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histoflare.errors import JobError
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import POLICY_FILE
from histoflare.privacy.protocol import PROTOCOL_FILE
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.ledgers import audit_path_of
from histoflare.site.site_file import SITE_FILE, read_site_file
from histoflare.storage import real_path

LOCAL = "local"
"""Folder of a startup kit with what is the site's own."""

FLARE_LOG = "log.txt"
"""FLARE's log in the kit's folder; each job has one of this name in a folder called by the job's id."""


@dataclass(frozen=True)
class Place:
    """One thing of a site: what it is, where, and whether it is there."""

    what: str
    path: Path
    is_there: bool


def find_site_of(given: Path | None = None) -> Path:
    """Return a site's file: the one that is given, or that of a kit.

    Args:
        given: The file itself, its kit's folder, or that kit's ``local`` folder. None: the kit that the
            current folder is, or is directly in.

    Raises:
        JobError: There is no kit (SITE_NOT_CONFIGURED). That the site's file is there is not looked at.
    """
    if given is not None and not given.is_dir():
        if not given.exists() and given.suffix != Path(SITE_FILE).suffix:
            raise JobError(
                f"{given}: not there. Give a kit's folder, or the site's file in it, {LOCAL}/{SITE_FILE}.",
                reason="SITE_NOT_CONFIGURED",
            )
        return given
    folders = [given] if given is not None else [Path.cwd(), Path.cwd().parent]
    for folder in folders:
        for local in (folder / LOCAL, folder):
            if (local / SITE_FILE).is_file() or any(local.glob(POLICY_FILE.format("*"))):
                return local / SITE_FILE
    raise JobError(
        f"{folders[0]}: no site's kit there ({LOCAL}/{SITE_FILE}). Go into the kit's folder, or give it, or "
        "the site's file, with --site.",
        reason="SITE_NOT_CONFIGURED",
    )


def kit_of(site: Path) -> Path | None:
    """Return the startup kit that a site's file is in; None if it is in none."""
    kit = real_path(site).parent.parent
    return kit if (kit / "startup").is_dir() else None


def list_places(site: Path) -> tuple[list[Place], JobError | None]:
    """Return where a site's things are, and why some are not known.

    Args:
        site: The site's file.
    """
    local, kit = real_path(site).parent, kit_of(site)
    found: list[tuple[str, Path | None]] = [("startup kit", kit), ("the site's file", real_path(site))]
    found += [(f"signed policy {_scope(path)}", path) for path in sorted(local.glob(POLICY_FILE.format("*")))]
    found += [("own policy", local / OWN_POLICY_FILE), ("agreed protocol", local / PROTOCOL_FILE)]
    problem = None
    try:
        found += _configured(read_site_file(site))
    except JobError as error:
        problem = error
    if kit is not None:
        found += [("log of the client", kit / FLARE_LOG)]
        found += [("log of a job", path) for path in sorted(kit.glob(f"*/{FLARE_LOG}"))]
    return [Place(what, path, _is_there(path)) for what, path in found if path is not None], problem


def _configured(configuration: SiteConfiguration) -> list[tuple[str, Path | None]]:
    ledger, key = configuration.ledger, configuration.ledger_key
    return [
        *configuration.files.items(),
        ("records of runs", configuration.records),
        ("ledger", ledger),
        ("ledger's key", key),
        ("ledger's head", None if key is None else key.with_name(f"{key.name}.head")),
        ("released updates", None if ledger is None else ledger.with_suffix(".releases")),
        ("audit log", audit_path_of(configuration)),
    ]


def _scope(path: Path) -> str:
    before, after = POLICY_FILE.split("{}")
    return path.name.removeprefix(before).removesuffix(after)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into
        return False
