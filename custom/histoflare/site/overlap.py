"""Whether sites whose files lie on one machine have a patient or a slide in common.

A federation's ε is the largest that any one site spends on a patient, and its test figures are of patients
whom no model was trained on. Both hold only if no patient is at two sites. Hospitals cannot look at each
other's data. On a machine that has the data of all sites it is checked here.

One slide at two sites is one patient for certain. One name at two sites may be: many hospitals number their
patients from 1. Where an ε rests on it, a person has to say so, by different names; where nothing is
protected, it is a warning.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from histoflare.errors import JobError, list_lines
from histoflare.privacy.ledger.chain import normalised
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import kind_of
from histoflare.site.kinds.kind import Entry

LISTED = 10

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Entry:
    """A slide or image of a site."""

    site: str
    of_site: Entry

    def __str__(self) -> str:
        return f"{self.site} ({self.of_site.where})"


def check_apart(sites: Mapping[str, SiteConfiguration], data: str, *, protected: bool) -> list[str]:
    """Refuse sites, external cohorts among them, that share a slide or, under a privacy plan, a patient.

    A patient is told by the name in the manifests. A slide is told by its path, by the hash that its bag
    carries, and, where files of two sites have the same size, by the hash of their bytes.

    Args:
        data: The kind of data, as ``Task.data``.
        protected: Whether the job has a privacy plan, whose ε holds for each patient.

    Returns:
        Warnings: names of patients that two sites have where nothing is protected.

    Raises:
        ManifestError: A manifest cannot be used.
        JobError: A slide is at two sites, or a patient of a protected job (COHORT_INVALID), or a site has no
            data of this kind.
    """
    kind = kind_of(data)
    entries = [_Entry(site, entry) for site, of_site in sites.items() for entry in kind.entries(of_site)]
    patients = [
        f"patient {name}: {_say(found)}"
        for name, found in _shared(entries, lambda e: normalised(e.of_site.patient))
    ]
    slides = [found for _, found in _shared(entries, lambda entry: entry.of_site.file.resolve())]
    slides += [found for _, found in _shared(entries, lambda entry: entry.of_site.content)]
    unknown = [entry for entry in entries if entry.of_site.content is None]
    sizes = {size for size, _ in _shared(unknown, _size)}
    slides += [found for _, found in _shared([e for e in unknown if _size(e) in sizes], _content)]
    problems = list(dict.fromkeys(f"one {kind.item}: {_say(found)}" for found in slides))
    if protected or problems:
        problems = patients + problems
    if problems:
        raise JobError(
            "A patient may be at one site only: neither ε nor the test figures would hold."
            f"{_list(problems)}\nTake each out of all sites but one. Different people of one name get "
            "different names, for instance with their site in front.",
            reason="COHORT_INVALID",
        )
    if not patients:
        return []
    return [
        "Names of patients that two sites have are taken for different people. If any are the same, the test "
        f"figures are too good, and a protected job is refused.{_list(patients)}"
    ]


def _list(found: list[str]) -> str:
    more = [f"… and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return list_lines([*found[:LISTED], *more])


def _say(entries: list[_Entry]) -> str:
    return " and ".join(map(str, entries))


def _size(entry: _Entry) -> int | None:
    return entry.of_site.file.stat().st_size if entry.of_site.file.is_file() else None


def _content(entry: _Entry) -> str:
    with entry.of_site.file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _shared(entries: list[_Entry], key_of: Callable[[_Entry], Key | None]) -> list[tuple[Key, list[_Entry]]]:
    """Return the keys that entries of two sites have, with the first entry of each such site."""
    found: defaultdict[Key, dict[str, _Entry]] = defaultdict(dict)
    for entry in entries:
        key = key_of(entry)
        if key is not None:
            found[key].setdefault(entry.site, entry)
    return [(key, list(of_sites.values())) for key, of_sites in found.items() if len(of_sites) > 1]
