"""Changes to a site's own policy, by its steward: line by line, with all comments kept."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.privacy.own_policy import OWN_POLICY_FILE
from histoflare.privacy.own_policy_file import ENTRIES, FINGERPRINT, LISTS, PINS, TRUST_CA, read_layers
from histoflare.privacy.policy import TAKES_PART
from histoflare.storage import write_text


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the changes of ``NAME=VALUE`` texts: lists with commas; nothing after ``=`` takes a line out.

    A list may also stand in brackets and quotes, as in the file. An empty list of purposes, strategies or
    models is one of nothing: the site then takes part in nothing.

    Raises:
        JobError: One has no name, or no value of TOML (POLICY_INVALID).
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or name not in ENTRIES:
            in_scope = " For one scope alone add --scope SCOPE." if name.startswith("scope.") else ""
            raise JobError(
                f"'{pair}': give NAME=VALUE, where NAME is one of {', '.join(ENTRIES)}.{in_scope}",
                reason="POLICY_INVALID",
            )
        if name in LISTS:
            names = _names(text)
            changes[name] = names if names or name in TAKES_PART else None
        elif not text:
            changes[name] = None
        else:
            try:
                changes[name] = tomllib.loads(f"value = {text}")["value"]
            except (tomllib.TOMLDecodeError, KeyError):
                changes[name] = text  # read_layers says what it must be
    return changes


def _names(text: str) -> list[str]:
    """Return the names of a list, written with commas alone or as TOML writes it."""
    if text.startswith("["):
        with suppress(tomllib.TOMLDecodeError, KeyError):
            return [str(each) for each in tomllib.loads(f"value = {text}")["value"]]
        text = text.strip("[]")  # a shell has taken the quotes away
    return [each.strip() for each in text.split(",") if each.strip()]


def change_own_policy(local: Path, changes: Mapping[str, Any], scopes: Sequence[str] = ()) -> bool:
    """Change a site's own policy, if what it then says can hold; return whether it says anything new.

    Args:
        local: Folder with the signed policies and ``policy.toml``.
        changes: Entry → its value; None takes the line out, so that the kit's holds.
        scopes: Scopes in whose tables the entries are to stand; none: for all scopes, above the tables.

    Raises:
        JobError: The changed policy could not be used; nothing was written (POLICY_INVALID).
    """
    import tomlkit

    before, document = _read(local, {} if scopes else changes)
    if scopes and any(name in (*TAKES_PART, "scopes", TRUST_CA) for name in changes):
        raise JobError(
            f"{', '.join(TAKES_PART)}, scopes and {TRUST_CA} are for all scopes: leave --scope out.",
            reason="POLICY_INVALID",
        )
    tables: list[Any] = [document]
    if scopes:
        every = document.setdefault("scope", tomlkit.table(is_super_table=True))
        tables = [every.setdefault(scope, tomlkit.table()) for scope in scopes]
    for table in tables:
        for name, value in changes.items():
            if value is None:
                table.pop(name, None)
            else:
                table[name] = value
    return _write(local, before, document)


def pin_sites(local: Path, pins: Mapping[str, str]) -> bool:
    """Write into a site's own policy which certificates other sites have; return whether that is new.

    Args:
        local: Folder with the signed policies and ``policy.toml``.
        pins: Site → SHA-256 of its certificate, in hex; an empty text takes its pin out. Other pins stay.

    Raises:
        JobError: The changed policy could not be used; nothing was written (POLICY_INVALID).
    """
    import tomlkit

    for site, fingerprint in pins.items():
        if fingerprint and not FINGERPRINT.fullmatch(fingerprint):
            raise JobError(
                f"'{fingerprint}': no fingerprint of {site}. It has 64 hexadecimal digits, as 'histoflare "
                "kit fingerprint' prints it at that site; '' takes the pin out.",
                reason="POLICY_INVALID",
            )
    before, document = _read(local, {})
    table = document.setdefault(PINS, tomlkit.table())
    for site, fingerprint in pins.items():
        if fingerprint:
            table[site] = fingerprint.lower()
        else:
            table.pop(site, None)
    return _write(local, before, document)


def _read(local: Path, changes: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the text of a site's own policy, and what it says, with changed lines out of their comments."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = local / OWN_POLICY_FILE
    try:
        before = path.read_text(encoding="utf-8")
        return before, tomlkit.parse(_uncommented(before, changes))
    except (OSError, ValueError, TOMLKitError) as error:
        raise JobError(f"{path}: cannot be read: {error}", reason="POLICY_INVALID") from None


def _write(local: Path, before: str, document: Any) -> bool:
    """Write a changed policy if it can hold; return whether it says anything new."""
    import tomlkit

    text = tomlkit.dumps(document)
    read_layers(local, text=text)
    if text == before:
        return False
    write_text(local / OWN_POLICY_FILE, text)
    return True


def _uncommented(text: str, changes: Mapping[str, Any]) -> str:
    """Return a policy in which the lines to be written are, where a comment holds their place already."""
    head, tables, rest = text.partition("\n# [scope")
    said = tomllib.loads(text)
    for name, value in changes.items():
        if name not in said and value is not None:
            head = re.sub(rf"^#[ \t]*({name}[ \t]*=.*)$", r"\1", head, count=1, flags=re.MULTILINE)
    return head + tables + rest
