"""A site's ledger and its audit log, as its own file names them."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

from histoflare.errors import HistoflareError, LedgerError
from histoflare.privacy.audit_log import AuditLog
from histoflare.privacy.ledger import Ledger
from histoflare.site.configuration import SiteConfiguration


def open_ledger(configuration: SiteConfiguration) -> Ledger:
    """Return the site's ledger; it is made if neither it nor its key is there.

    Raises:
        LedgerError: It is damaged, or one of the two is missing.
    """
    return _open(configuration.ledger, configuration.ledger_key)


@cache
def _open(path: Path, key_path: Path) -> Ledger:
    """Return one ledger for all of a process: it remembers what it has verified."""
    return Ledger.open_or_create(path, key_path)


def audit_log_of(configuration: SiteConfiguration) -> AuditLog:
    """Return the log of all that left the site and of all that was refused, beside its ledger."""
    return AuditLog(configuration.ledger.with_suffix(".audit.jsonl"))


def note_refusal(configuration: SiteConfiguration, run: str, error: HistoflareError) -> None:
    """Write why nothing left into the site's audit log; a full disk is no reason to say more."""
    with suppress(LedgerError):
        audit_log_of(configuration).write("refused", run=run, reason=error.reason, detail=str(error))


def ledger_holds(configuration: SiteConfiguration, sha256: str) -> bool:
    """Return whether the site's ledger says that these bytes were released."""
    return open_ledger(configuration).is_released(sha256)
