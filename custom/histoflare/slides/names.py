"""Text and paths as Windows, macOS and spreadsheets write them."""

from __future__ import annotations

import codecs
import re
import unicodedata
from functools import lru_cache
from pathlib import Path, PurePosixPath

WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
"""A drive's letter, or a server's share."""

SPREADSHEET_NUMBER = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)
"""What a spreadsheet makes of a long identifier: 1.23457E+11. The other digits are gone."""

_MONTH = (
    r"(jan(uary?)?|feb(ruary?)?|mar(ch)?|märz?|mrz|apr(il)?|ma[yi]|jun[ei]?|jul[iy]?|aug(ust)?|sep(t|tember)?"
    r"|o[ck]t(ober)?|nov(ember)?|de[cz](ember)?)\.?"
)
SPREADSHEET_DATE = re.compile(rf"\d{{1,4}}[-. ]+{_MONTH}|{_MONTH}[-. ]+\d{{1,4}}", re.IGNORECASE)
"""What a spreadsheet makes of 10-19: 19-Oct, Oct 19, 19. Okt."""


def decode_text(content: bytes) -> str:
    """Return the text of a file in UTF-8 or UTF-16, without its byte order mark, with line feeds only.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find_path(folder: Path, written: str) -> Path:
    """Return the file that a manifest in ``folder`` calls ``written``.

    That is the file of this name. If there is none: with slashes for backslashes, and the only name that
    differs in capitals or in how its letters are composed (macOS stores ä as a and ¨). If there is none
    either, the path as it is written.
    """
    path = folder / written
    try:
        if path.exists() or WINDOWS_PATH.match(written):
            return path
        found = folder
        for part in PurePosixPath(written.replace("\\", "/")).parts:
            if not (found / part).exists():
                alike = _names(found, found.stat().st_mtime_ns).get(_plain(part), ())
                if len(alike) != 1:
                    return path
                part = alike[0]
            found = found / part
    except (OSError, ValueError):  # e.g. a name that is too long to be one
        return path
    return found


@lru_cache(maxsize=64)
def _names(folder: Path, changed_ns: int) -> dict[str, list[str]]:
    """Return the names in a folder by their plain form; listed once, until the folder changes."""
    found: dict[str, list[str]] = {}
    for each in folder.iterdir():
        found.setdefault(_plain(each.name), []).append(each.name)
    return found


def path_hint(written: str) -> str:
    """Return what to say beside a path of a manifest that leads to no file; often nothing."""
    if WINDOWS_PATH.match(written):
        return " (a path of Windows; write it as it is on this machine, starting at the manifest's folder)"
    return ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
