"""A ledger's SQLite file: its tables, how it is opened, and what SQLite's complaints mean.

Rows are added and never changed: triggers refuse it to whoever comes with another tool, and the chain shows
it of whoever takes the triggers away. There is no index on purpose: SQLite's quick check does not compare an
index with its table, and a damaged one could answer wrongly.
"""

from __future__ import annotations

import errno
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from histoflare.errors import LedgerError
from histoflare.privacy.ledger.key import RESTORE, WAIT_S
from histoflare.storage import real_path

PAGE_BYTES = 4096
APPLICATION = 0x48464C47
"""SQLite's application id of a ledger: "HFLG"."""

VERSION = 2

EARLIER = range(1, VERSION)
_EARLIER = (
    "an earlier version of histoflare wrote it, and this one does not read it: keep it, see with the version "
    "that wrote it what was spent (histoflare ledger show), make a new ledger in another place (histoflare "
    "ledger create), and lower the site's own epsilon to what is left."
)

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""What a full disk, a file grown too large and a spent quota are called."""

_KEYS = {"entries": "seq", "patients": "id", "cohorts": "id"}
_TABLES = {
    "entries": "seq INTEGER PRIMARY KEY, unix_time INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "chain BLOB NOT NULL",
    "patients": "id INTEGER PRIMARY KEY, mac BLOB NOT NULL, role TEXT NOT NULL",
    "cohorts": "id INTEGER PRIMARY KEY, members BLOB NOT NULL",
}


def _statements() -> dict[str, str]:
    """Return the name of everything in the file → the statement that makes it."""
    made = {table: f"CREATE TABLE {table} ({columns})" for table, columns in _TABLES.items()}
    for table, key in _KEYS.items():
        refuse = f"BEGIN SELECT RAISE(ABORT, '{table}: rows are only added'); END"
        for action in ("UPDATE", "DELETE"):
            name = f"{table}_{action.lower()}"
            made[name] = f"CREATE TRIGGER {name} BEFORE {action} ON {table} {refuse}"
        # Or INSERT OR REPLACE would take a row away without asking the trigger of DELETE.
        name = f"{table}_insert"
        last = f"(SELECT coalesce(max({key}), 0) + 1 FROM {table})"
        made[name] = f"CREATE TRIGGER {name} BEFORE INSERT ON {table} WHEN NEW.{key} IS NOT {last} {refuse}"
    return made


STATEMENTS = _statements()


def damaged(path: Path, what: str) -> LedgerError:
    """Return the error of a ledger that cannot be believed."""
    return LedgerError(f"{path}: {what}. {RESTORE}", reason="LEDGER_DAMAGED")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk complain of into a :class:`LedgerError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(path, error) from error
    except UnicodeDecodeError as error:  # SQLite's complaint quotes a damaged name, and Python cannot read it
        raise damaged(path, "damaged") from error
    except OSError as error:
        where = error.filename or path
        if error.errno in NO_ROOM:
            raise LedgerError(f"{where}: {_FULL}", reason="LEDGER_FULL") from error
        raise LedgerError(
            f"{where}: {error.strerror or error}. Check the path and its permissions."
        ) from error


_FULL = "there is no room left on the disk, or none in this user's quota. Make room and try again."
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_OUTSIDE = frozenset(
    {
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOLFS,
    }
)
"""Faults of the place a ledger is in, not of the ledger."""


def _explain(path: Path, error: sqlite3.Error) -> LedgerError:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    # SQLite has a code for a full disk, but takes a full quota for a failed write.
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
        return LedgerError(f"{path}: {_FULL}", reason="LEDGER_FULL")
    if code & 0xFF in _BUSY:
        return LedgerError(
            f"{path}: another program has had it open for {WAIT_S:.0f} seconds; close that one."
        )
    if code & 0xFF in _OUTSIDE:
        return LedgerError(f"{path}: cannot be used: {error}. Check the disk and the file's permissions.")
    return damaged(path, f"damaged ({error})")


def later(path: Path, what: str) -> LedgerError:
    """Return the error of a ledger that has something in it that this version does not know."""
    return LedgerError(f"{path}: a later version of histoflare wrote it ({what}); update this one.")


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a ledger that is there; text comes back as bytes.

    Raises:
        LedgerError: It is not a ledger's file, or cannot be opened.
    """
    with translated(path):
        _check_header(path)
        with closing(_connect(path)) as connection:
            _configure(connection)
            yield connection


def make_file(path: Path) -> None:
    """Make an empty ledger's file with its tables and triggers at a path where nothing is."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA encoding = 'UTF-8'")
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("BEGIN IMMEDIATE")
        for statement in STATEMENTS.values():
            connection.execute(statement)
        connection.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{real_path(path).as_uri()}?mode=rw", uri=True, timeout=WAIT_S, isolation_level=None
    )


def _configure(connection: sqlite3.Connection) -> None:
    connection.text_factory = bytes
    for pragma in (
        "journal_mode = DELETE",
        # EXTRA: the folder too is flushed once the journal is gone. Or a power cut could bring the journal
        # back, and with it the ledger of before, behind its head.
        "synchronous = EXTRA",
        "cell_size_check = ON",
        "trusted_schema = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _check_header(path: Path) -> None:
    """Refuse a file that SQLite would open in another way than ours: in WAL mode, read-only, as UTF-16, …

    Compares what never changes in the first 100 bytes (https://sqlite.org/fileformat2.html, section 1.3).
    """
    with path.open("rb") as file:
        header = file.read(100)
    fixed = (
        (0, b"SQLite format 3\x00" + struct.pack(">HBBBBBB", PAGE_BYTES, 1, 1, 0, 64, 32, 32)),
        (44, struct.pack(">I", 4)),
        (52, struct.pack(">II", 0, 1)),
        (64, struct.pack(">II", 0, APPLICATION)),
        (72, bytes(20)),
    )
    if len(header) < 100 or any(header[at : at + len(part)] != part for at, part in fixed):
        raise damaged(path, "not a ledger's file, or a damaged one")
    (version,) = struct.unpack_from(">I", header, 60)
    if version in EARLIER:
        raise LedgerError(f"{path}: {_EARLIER}")
    if version != VERSION:
        raise later(path, f"version {version}")


def check_structure(path: Path, connection: sqlite3.Connection) -> None:
    """Raise :class:`LedgerError` unless the tables are ours and SQLite finds them whole."""
    found = {name.decode(errors="replace"): sql for name, sql in _schema(connection)}
    if found != {name: sql.encode() for name, sql in STATEMENTS.items()}:
        raise damaged(path, "its tables are not those of a ledger")
    answer = connection.execute("PRAGMA quick_check").fetchall()
    if answer != [(b"ok",)]:
        raise damaged(path, f"damaged ({answer[0][0].decode(errors='replace')})")


def _schema(connection: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
    rows = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    return [(bytes(name or b""), bytes(sql or b"")) for name, sql in rows]
