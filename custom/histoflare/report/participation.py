"""Who took part: what a report's rounds say of each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoflare.reasons import advise_lead, explain

REFUSED_AT_SERVER = "UPDATES_INVALID"
"""Code the server itself gives: the update had left the site. All other codes come from the site."""


@dataclass(frozen=True)
class SiteRounds:
    """What one site did.

    Attributes:
        statuses: One of :data:`histoflare.report.charts.STATUSES` for each round.
        refusals: Reason code → the rounds (from 1) in which the site answered with it.
        known: Whether the report says who was asked; if not, the site counts as asked in every round.
    """

    site: str
    statuses: tuple[str, ...]
    refusals: dict[str, list[int]]
    known: bool = True

    @property
    def taken(self) -> int:
        """Rounds taken part in."""
        return self.statuses.count("took")

    @property
    def asked(self) -> int:
        """Rounds in which the site was asked."""
        return len(self.statuses) - (self.statuses.count("unasked") if self.known else 0)

    @property
    def silent(self) -> list[int]:
        """Rounds (from 1) that ended without an answer of the site."""
        return [number for number, status in enumerate(self.statuses, 1) if status == "silent"]

    @property
    def complete(self) -> bool:
        """Whether the site took part whenever it was asked, and was asked at least once."""
        return 0 < self.asked == self.taken


def site_rounds(report: Mapping[str, Any]) -> list[SiteRounds]:
    """Return what each site did, sites with figures first; a site that only appears in a round counts too."""
    rows = report["participation"]
    names = list(report["sites"])
    for row in rows:
        seen = [*row.get("sites", []), *(row.get("asked") or []), *row["taking_part"]]
        seen += [*row.get("refused", {}), *row.get("no_answer", [])]
        names += sorted(set(seen) - set(names))
    known = all(row.get("asked") is not None for row in rows)
    return [
        SiteRounds(name, tuple(_status(row, name) for row in rows), _refusals(rows, name), known)
        for name in names
    ]


def update_left(row: Mapping[str, Any], site: str, status: str) -> bool:
    """Return whether an update of ``site`` left it in a round, used or not; ``status`` as in SiteRounds."""
    return status in ("took", "unused") or row.get("refused", {}).get(site) == REFUSED_AT_SERVER


def finished_rounds(report: Mapping[str, Any]) -> int:
    """Return how many rounds were brought to their end."""
    return sum(row.get("finished", True) for row in report["participation"])


def say_rounds(report: Mapping[str, Any]) -> str:
    """Return how many rounds were finished: ``30 rounds``, or ``12 of 30 rounds``."""
    done, planned = finished_rounds(report), report["rounds"]
    noun = "round" if planned == 1 else "rounds"
    return f"{planned} {noun}" if done == planned else f"{done} of {planned} {noun}"


def _rejected(row: Mapping[str, Any]) -> Mapping[str, str]:
    """Return site → why the strategy did not use its update of this round, a code."""
    rejected: Mapping[str, str] = row.get("rejected", {})
    return rejected


def _status(row: Mapping[str, Any], site: str) -> str:
    if site in _rejected(row):
        return "unused"
    if site in row["taking_part"]:
        return "took"
    if site in row.get("refused", {}):
        return "refused"
    if site in row.get("no_answer", []):
        return "silent"
    return "unused" if site in (row.get("asked") or []) else "unasked"


def _refusals(rows: Sequence[Mapping[str, Any]], site: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows:
        for codes in (row.get("refused", {}), _rejected(row)):
            if site in codes:
                found.setdefault(codes[site], []).append(row["round"] + 1)
    return found


def say_refused(code: str, rounds: Sequence[int] = ()) -> str:
    """Return a refusal in words: its code, the rounds in which it was given, and what it means."""
    where = f" in {name_rounds(rounds)}" if rounds else ""
    return f"{code}{where}: {explain(code)}"


def say_advice(codes: Iterable[str]) -> list[str]:
    """Return what a lead can do about refusals with these codes, each advice once."""
    return [f"{code}: {advice}" for code in dict.fromkeys(codes) if (advice := advise_lead(code))]


def name_rounds(rounds: Sequence[int]) -> str:
    """Return rounds in a sentence's words: ``round 3``, ``rounds 1–3, 7``."""
    return f"{'round' if len(rounds) == 1 else 'rounds'} {list_rounds(rounds)}"


def list_rounds(rounds: Sequence[int]) -> str:
    """Return rounds in words, neighbours joined: ``1–3, 7``."""
    parts: list[str] = []
    start = previous = None
    for number in [*rounds, None]:
        if previous is not None and (number is None or number != previous + 1):
            parts.append(str(start) if start == previous else f"{start}–{previous}")
            start = None
        start = number if start is None else start
        previous = number
    return ", ".join(parts)
