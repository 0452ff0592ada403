"""A site's ledger and its audit log, as its own file names them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from histoflare.errors import LedgerError
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import STEWARD, Ledger
from histoflare.site.configuration import SiteConfiguration

AUDIT_FILE = "audit.jsonl"


def open_ledger(configuration: SiteConfiguration) -> Ledger:
    """Return the site's ledger; it is never made here.

    What is written to it is refused if it is another site's, or a workstation's and this site is none of a
    workstation.

    Raises:
        LedgerError: The site's file names no ledger (LEDGER_MISSING).
    """
    if configuration.ledger is None or configuration.ledger_key is None:
        raise LedgerError(
            "This site's file names no ledger, and no job runs without one. If this site has one, from an "
            "earlier kit: say ledger and ledger_key in local/histoflare.toml. If it has never had one: "
            "histoflare ledger create.",
            reason="LEDGER_MISSING",
        )
    owner = None if configuration.workstation else STEWARD
    return _open(configuration.ledger, configuration.ledger_key, configuration.site, owner)


@cache
def _open(path: Path, key_path: Path, site: str | None, owner: str | None) -> Ledger:
    """Return one ledger for all of a process: it remembers what it has verified."""
    return Ledger(path, key_path, site=site, owner=owner)


def on_workstation(site: str, configuration: SiteConfiguration) -> SiteConfiguration:
    """Return a site's configuration as one of a workstation's, with a ledger.

    Where it names none, the ledger is beside its data, in ``<bags>-ledger`` and ``<bags>-keys``. One that is
    not there is made, and marked as a workstation's: no site with a steward takes it.

    Raises:
        LedgerError: One of ledger and key is gone, or they cannot be made.
    """
    data = configuration.data
    ledger = configuration.ledger or data.parent / f"{data.name}-ledger" / "ledger.sqlite"
    key = configuration.ledger_key or data.parent / f"{data.name}-keys" / "ledger.key"
    Ledger.open_or_create(ledger, key, site)
    return replace(configuration, ledger=ledger, ledger_key=key, workstation=True)


def kit_around(path: Path) -> Path | None:
    """Return the startup kit that a path is in; None if it is in none."""
    for folder in path.resolve().parents:
        if (folder / "startup").is_dir() and (folder / "local").is_dir():
            return folder
    return None


def refuse_kit(*paths: Path) -> None:
    """Refuse to have a ledger or a key in a startup kit: the next kit would not have it.

    Raises:
        LedgerError: A path is in a kit (LEDGER_UNUSABLE).
    """
    for path in paths:
        kit = kit_around(path)
        if kit is not None:
            raise LedgerError(
                f"{path}: this is in the startup kit {kit}. The ledger and its key outlive every kit: keep "
                "them elsewhere, e.g. /srv/histoflare/ledger.sqlite and /srv/histoflare-key/ledger.key."
            )


def audit_log_of(configuration: SiteConfiguration) -> AuditLog:
    """Return the log of all that left the site and of all that was refused: beside its ledger.

    A site that has no ledger, and can but refuse, has it among its records.
    """
    return AuditLog(audit_path_of(configuration))


def audit_path_of(configuration: SiteConfiguration) -> Path:
    """Return where that log is."""
    if configuration.ledger is None:
        return configuration.records / AUDIT_FILE
    return configuration.ledger.with_suffix(f".{AUDIT_FILE}")


def ledger_holds(configuration: SiteConfiguration, sha256: str) -> bool:
    """Return whether the site's ledger says that these bytes were released."""
    return open_ledger(configuration).is_released(sha256)
