"""What sites are called in a report: their pseudonyms, where they have some."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SiteNames:
    """FLARE name → name in the report, for every site whose name changes."""

    changed: Mapping[str, str]

    @classmethod
    def of(cls, sites: Iterable[str], pseudonyms: Mapping[str, str]) -> SiteNames:
        """Return the names; two sites that would get one name are told apart by a number."""
        taken: set[str] = set()
        changed = {}
        for site in sorted(sites, key=lambda site: (site in pseudonyms, site)):
            wanted = name = pseudonyms.get(site, site)
            number = 2
            while name in taken:
                name, number = f"{wanted} ({number})", number + 1
            taken.add(name)
            if name != site:
                changed[site] = name
        return cls(changed)

    def of_site(self, site: str) -> str:
        """Return a site's name."""
        return self.changed.get(site, site)

    def of_model(self, model: str) -> str:
        """Return a model's name with its site's (``local/<site>``) in it."""
        kind, slash, site = model.partition("/")
        return f"{kind}/{self.of_site(site)}" if slash else model

    def apply(self, value: Any) -> Any:
        """Return a mapping with its keys renamed, or a list with its entries; anything else as it is.

        A list of mappings is one of rows (:meth:`apply_each`).
        """
        if isinstance(value, Mapping):
            return {self.of_site(key): entry for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._of_entry(entry) for entry in value]
        return value

    def _of_entry(self, entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return self.apply_each(entry)
        return self.of_site(entry) if isinstance(entry, str) else entry

    def apply_each(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with :meth:`apply` done to every value."""
        return {key: self.apply(value) for key, value in row.items()}

    def apply_values(self, figures: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return a set of figures with the names replaced among its subgroups' values."""
        if figures is None:
            return None
        return {
            key: {column: self.apply(groups) for column, groups in entry.items()}
            if key == "subgroups"
            else (self.apply_values(entry) if isinstance(entry, dict) else entry)
            for key, entry in figures.items()
        }
