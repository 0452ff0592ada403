"""A site's own policy as a file, read together with the signed policies that it narrows.

Everything at a site that asks what may leave goes through :func:`read_site_policy`. It looks at all scopes of
the kit, whichever is asked for: a wrong entry closes the site until its steward has put it right, and does
not wait for the one job that it concerns.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from histoflare.checks import is_above_zero, is_whole
from histoflare.errors import JobError, list_lines
from histoflare.privacy.own_policy import OWN_POLICY_FILE, Narrowing, StewardPolicy, faults, narrowed
from histoflare.privacy.policy import (
    EXHAUSTED,
    MAX_DELTA,
    MOST_COLLUDERS,
    RECORDS,
    TAKES_PART,
    Policy,
    read_policy,
)
from histoflare.storage import write_text

POLICY_FILE = "policy_{}.toml"
"""A scope's signed policy, in the ``local`` folder of a kit."""

MOST_BYTES = 1 << 16
MOST_NAMES = 256
LONGEST_NAME = 64
LARGEST = 10**9

PINS, TRUST_CA = "pins", "trust_ca"
"""Entries about other sites, which no signed policy has: see ``privacy.policy.Policy``."""

FINGERPRINT = re.compile("[0-9a-fA-F]{64}")

_TEMPLATE = """\
# This site's own policy. It is not signed: change it here at any time; each job reads it anew.
# What then holds, beside what the kit's signed policies say:
#   histoflare policy show      (set NAME=VALUE changes a line here, check says all that is wrong)

# What this site takes part in. A job that names anything else is refused. To list a name widens nothing: how
# its part works with what protects the updates is checked in each job. A strategy or a model that a newer
# version brings is added here; that needs no new kit. Evaluations name the strategy fedavg.
purposes = {purposes}
strategies = {strategies}
models = {models}

# The scopes that this site takes part in, of those in its kit (policy_<scope>.toml beside this file); without
# this line: all of them.
# scopes = ["dp-patient"]

# What holds in every scope, if it is to be narrower than the kit's policies; they say what the entries mean.
# An entry that would be wider is an error, and the site takes no job until it is put right.
# minimum_patients = 10
# metrics = ["auc", "auc_low", "auc_high"]
# counts = false
# numbers = []

# A lower budget for each patient, over all jobs together. Here, above all tables, these lines take for
# granted that every scope the site takes part in has a budget (open has none).
# epsilon = 4.0
# delta = 1e-6
# job_share = 0.25
# evaluations = 0
# records = ["patient"]
# seeded_noise = false
# Where the kit leaves out of a job whoever has no budget left: refuse such a job instead.
# exhausted = "refuse"

# Where sites share their noise: against the server and how many colluding sites epsilon is kept (more is
# stricter), and the epsilon that is kept should all other sites collude.
# colluders = 2
# all_collude_epsilon = 6.0
# At how many of these sites one patient may be (more is stricter). The largest colluders and the largest
# sites_per_patient that a scope says count in all.
# sites_per_patient = 2

# In a secure sum this site counts on no site but those whose certificates stand below, in [pins]. With true
# it counts on every site that has a certificate of the consortium's authority; whoever makes the kits could
# then stand in for sites.
# trust_ca = false

# What one scope has narrower still. These tables stand last.
# [scope.dp-patient]
# epsilon = 2.0

# Which certificates other sites have, as their stewards say: histoflare policy pin SITE FINGERPRINT
# [pins]
# hospital-b = "8b1f…"
"""


def write_own_policy(
    path: Path, *, purposes: Sequence[str], strategies: Sequence[str], models: Sequence[str]
) -> None:
    """Write a commented policy of a site's own that takes part in these and narrows nothing."""
    names = {"purposes": purposes, "strategies": strategies, "models": models}
    listed = {name: json.dumps(list(value), ensure_ascii=False) for name, value in names.items()}
    write_text(path, _TEMPLATE.format(**listed))


def read_own_policy(path: Path) -> StewardPolicy:
    """Read a site's own policy.

    Raises:
        JobError: It is missing, too large, no TOML, or has a missing, unknown or unusable entry (all of them
            are listed). The reason is ``POLICY_INVALID``: a site that does not say what it takes part in
            takes part in nothing.
    """
    content = _read(path)
    problems = _problems(content)
    if problems:
        raise _invalid(path, problems)
    return _steward_policy(content)


def _read(path: Path, text: str | None = None) -> dict[str, Any]:
    """Return what a site's own policy says, or would with ``text`` in its place; errors as above."""
    try:
        if text is None:
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES + 1)
        else:
            raw = text.encode()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "not found" if missing else f"cannot be read: {error.strerror or error}"
        raise JobError(
            f"{path}: {what}. Without it this site takes part in nothing. Write what it shall, e.g.:\n"
            '  purposes = ["research"]\n  strategies = ["fedavg"]\n  models = ["mem"]',
            reason="POLICY_INVALID",
        ) from None
    try:
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES // 1024} KiB")
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise JobError(
            f"{path}: not a TOML file that can be used: {error}", reason="POLICY_INVALID"
        ) from None


def _steward_policy(content: Mapping[str, Any]) -> StewardPolicy:
    """Return the policy of those entries that can be used."""
    tables = content.get("scope", {})
    return StewardPolicy(
        **{name: tuple(content[name]) for name in TAKES_PART if _is_names(content.get(name))},
        scopes=tuple(content["scopes"]) if _is_names(content.get("scopes")) else None,
        everywhere=_narrowing(content),
        scope={name: _narrowing(table) for name, table in tables.items() if isinstance(table, dict)}
        if isinstance(tables, dict)
        else {},
        pins={site: pin.lower() for site, pin in content[PINS].items()} if _are_pins(content) else {},
        trust_ca=content.get(TRUST_CA) is True,
    )


def _are_pins(content: Mapping[str, Any]) -> bool:
    """Return whether the table of pins can be used."""
    table = content.get(PINS)
    return (
        isinstance(table, dict)
        and len(table) <= MOST_NAMES
        and all(0 < len(site) <= LONGEST_NAME for site in table)
        and all(isinstance(pin, str) and FINGERPRINT.fullmatch(pin) for pin in table.values())
    )


def read_site_policy(signed: Path, local: Path | None = None) -> Policy:
    """Return what holds at a site in one scope.

    Args:
        signed: The scope's signed policy.
        local: The folder with the site's own policy and all its signed ones; None: that of ``signed``.

    Raises:
        JobError: One of the files cannot be used, or the site's own would widen a signed one, in whatever
            scope (POLICY_INVALID); or the site takes no part in this scope (SCOPE_NOT_ALLOWED).
    """
    asked = read_policy(signed)
    _, own = read_layers(signed.parent if local is None else local, asked)
    return narrowed(asked, own)


def read_layers(
    local: Path, asked: Policy | None = None, text: str | None = None
) -> tuple[dict[str, Policy], StewardPolicy]:
    """Return a site's signed policies by scope, and its own, which fits them all.

    A patient's budget is one for all scopes, and so is whom it is kept against: how many colluders, and sites
    of one patient, one scope says counts in all of them. Else one scope would use up what another keeps.

    Args:
        local: Folder with ``policy_<scope>.toml`` and ``policy.toml``.
        asked: A signed policy to be looked at in place of the one of its scope.
        text: What ``policy.toml`` is to say, to be looked at in place of what it says.

    Raises:
        JobError: As :func:`read_site_policy`, with all faults of the site's own policy at once; or there is
            no signed policy (POLICY_INVALID).
    """
    signed = {}
    for path in sorted(local.glob(POLICY_FILE.format("*"))):
        policy = read_policy(path)
        if path.name != POLICY_FILE.format(policy.name):
            raise JobError(
                f"{path}: is the policy of the scope '{policy.name}', which belongs into "
                f"{POLICY_FILE.format(policy.name)}.",
                reason="POLICY_INVALID",
            )
        signed[policy.name] = policy
    if asked is not None:
        signed[asked.name] = asked
    if not signed:
        raise JobError(
            f"{local}: no policy there; a kit's local folder has {POLICY_FILE.format('<scope>')} files.",
            reason="POLICY_INVALID",
        )
    path = local / OWN_POLICY_FILE
    content = _read(path, text)
    own, problems = _steward_policy(content), _problems(content)
    named = dict.fromkeys([*(own.scopes or ()), *own.scope])
    problems += [
        f"scope {_cut(name)}: not in this kit{_nearest(name, signed)}" for name in named if name not in signed
    ]
    problems += [fault for policy in signed.values() for fault in faults(policy, own)]
    if problems:
        raise _invalid(path, problems)
    return signed, _against_the_same(signed, own)


def _against_the_same(signed: Mapping[str, Policy], own: StewardPolicy) -> StewardPolicy:
    """Return a site's own policy, with the strictest of these two numbers in each scope with a budget."""
    policies = [narrowed(policy, own) for name, policy in signed.items() if own.takes_part(name)]
    kept = {policy.name: policy.protection for policy in policies if policy.protection is not None}
    scopes = dict(own.scope)
    for entry in ("colluders", "sites_per_patient"):
        most = max((getattr(each, entry) for each in kept.values()), default=1)
        for name, each in kept.items():
            if getattr(each, entry) < most:
                stricter: dict[str, Any] = {entry: most}
                scopes[name] = replace(scopes.get(name, Narrowing()), **stricter)
    return replace(own, scope=scopes)


def _narrowing(content: Mapping[str, Any]) -> Narrowing:
    given: dict[str, Any] = {
        name: value for name, value in content.items() if name in _RULES and _RULES[name][0](value)
    }
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return Narrowing(**given)


def _is_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_NAMES
        and all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in value)
    )


_NAMES = f"a list of at most {MOST_NAMES} texts of at most {LONGEST_NAME} letters"
_TRUTH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "minimum_patients": (lambda value: is_whole(value, 1, LARGEST), "a whole number of at least 1"),
    "metrics": (_is_names, _NAMES),
    "counts": _TRUTH,
    "numbers": (_is_names, _NAMES),
    "epsilon": (lambda value: is_above_zero(value, LARGEST), "a number above 0"),
    "delta": (lambda value: is_above_zero(value, MAX_DELTA), f"a number above 0 and at most {MAX_DELTA}"),
    "evaluations": (lambda value: is_whole(value, 0, LARGEST), "a whole number of at least 0"),
    "records": (
        lambda value: _is_names(value) and value != [] and set(value) <= set(RECORDS),
        f"some of {', '.join(RECORDS)}",
    ),
    "seeded_noise": _TRUTH,
    "job_share": (lambda value: is_above_zero(value, 1), "a number above 0 and at most 1"),
    "colluders": (
        lambda value: is_whole(value, 1, MOST_COLLUDERS),
        f"a whole number from 1 to {MOST_COLLUDERS}",
    ),
    "sites_per_patient": (
        lambda value: is_whole(value, 1, MOST_COLLUDERS),
        f"a whole number from 1 to {MOST_COLLUDERS}",
    ),
    "all_collude_epsilon": (lambda value: is_above_zero(value, LARGEST), "a number above 0"),
    "exhausted": (
        lambda value: isinstance(value, str) and value in EXHAUSTED,
        f"one of {', '.join(EXHAUSTED)}",
    ),
}
"""Entry of :class:`Narrowing` → whether a value of it can be used, and what it must be."""

ENTRIES = (*TAKES_PART, "scopes", TRUST_CA, *_RULES)
"""What a site's own policy can say."""

LISTS = (*TAKES_PART, "scopes", "metrics", "numbers", "records")
"""Those of them that are lists of names."""


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = [
        f'{name}: missing; list what this site takes part in, e.g. ["{example}"], or [] for nothing'
        for name, example in zip(TAKES_PART, ("research", "fedavg", "mem"), strict=True)
        if name not in content
    ]
    for name in (*TAKES_PART, "scopes"):
        if name in content and not _is_names(content[name]):
            problems.append(f"{name}: must be {_NAMES}")
    if PINS in content and not _are_pins(content):
        problems.append(
            f"[{PINS}]: must be a table of at most {MOST_NAMES} sites, each with the SHA-256 of its "
            'certificate in 64 hexadecimal digits: hospital-b = "8b1f…". histoflare policy pin writes it'
        )
    if not isinstance(content.get(TRUST_CA, False), bool):
        problems.append(f"{TRUST_CA}: must be true or false, not {_said(content[TRUST_CA])}")
    known = (*TAKES_PART, "scopes", "scope", PINS, TRUST_CA, *_RULES)
    problems += _entry_problems({name: content[name] for name in content if name not in known[:7]}, "", known)
    tables = content.get("scope", {})
    if not isinstance(tables, dict):
        return [*problems, "scope: tables, one for a scope: [scope.dp-patient]"]
    for name, table in tables.items():
        if isinstance(table, dict):
            problems += _entry_problems(table, f"[scope.{_cut(name)}] ", tuple(_RULES))
        else:
            problems.append(f"scope.{_cut(name)}: must be a table: [scope.dp-patient]")
    return problems


def _entry_problems(content: Mapping[str, Any], table: str, known: Sequence[str]) -> list[str]:
    problems = []
    for name, value in content.items():
        if name in (*TAKES_PART, "scopes"):
            problems.append(f"{table}{name}: stands above the first table, for all scopes")
        elif name not in _RULES:
            problems.append(f"{table}{_cut(name)}: no entry of this file{_nearest(name, known)}")
        elif not _RULES[name][0](value):
            problems.append(f"{table}{name}: must be {_RULES[name][1]}, not {_said(value)}")
    return problems


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(name[:LONGEST_NAME], list(known))
    return f" (nearest: {', '.join(near)})" if near else f" (there are: {', '.join(known)})"


def _said(value: object) -> str:
    try:
        return _cut(repr(value))
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}…"


def _invalid(path: Path, problems: Sequence[str]) -> JobError:
    listed = list_lines(problems)
    return JobError(
        f"{path}: this site's own policy cannot be used; correct:{listed}", reason="POLICY_INVALID"
    )
