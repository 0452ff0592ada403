"""The sites of an experiment on one workstation: a folder with one manifest per site."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from histoflare.errors import ManifestError
from histoflare.site.configuration import SiteConfiguration
from histoflare.site.kinds import BAGS, KINDS, DataKind

EXTERNAL = "external"

LEDGERS_FOLDER, KEYS_FOLDER = "ledgers", "ledger-keys"
"""In a workspace: the ledgers of its sites, and apart from them their keys."""


@dataclass(frozen=True)
class SiteFolder:
    """The manifests found: ``sites`` train, the ``external`` cohorts are only asked at the end."""

    sites: dict[str, Path]
    external: dict[str, Path]

    def to_json(self) -> dict[str, str]:
        """Return site → the full path of its manifest."""
        return {name: str(path.resolve()) for name, path in {**self.sites, **self.external}.items()}

    def configure(
        self, kind: DataKind, beside: Path | None = None, out: Path | None = None, **settings: Any
    ) -> tuple[dict[str, SiteConfiguration], dict[str, SiteConfiguration]]:
        """Return the configurations of the training sites and of the external cohorts, which only evaluate.

        Args:
            kind: The kind of their data.
            beside: As for :meth:`DataKind.configure`.
            out: Folder in which ``records`` has each site's notes; None: they are beside its data.
            settings: Further ones of :class:`SiteConfiguration`, the same for all.
        """

        def one(name: str, manifest: Path, **own: Any) -> SiteConfiguration:
            if out is not None:
                own["records"] = (out / "records" / name).resolve()
            return kind.configure(name, manifest, beside, **settings, **own)

        return (
            {name: one(name, path) for name, path in self.sites.items()},
            {name: one(name, path, evaluation_only=True) for name, path in self.external.items()},
        )


def find_sites(folder: Path, kind: DataKind = BAGS) -> SiteFolder:
    """Return the manifests in ``folder``: ``<site>/manifest.csv`` or ``<site>.csv``.

    Of another kind of data than bags ``manifest.csv`` has another name. External cohorts are a site called
    ``external``, and every ``external/<name>.csv``.

    Raises:
        ManifestError: There are none, one site has two, or a name cannot be a FLARE site name.
    """
    from histoflare.flare.kits import SERVER, SITE_NAME  # FLARE takes its time

    found: dict[str, Path] = {}
    problems = []
    usual, manifests = kind.manifest, {each.manifest for each in KINDS.values()}
    for path in sorted([*folder.glob(f"*/{usual}"), *folder.glob("*.csv")]):
        if path.name.startswith((".", "~$")):  # companions of macOS, locks of spreadsheets
            continue
        name = path.parent.name if path.name == usual and path.parent != folder else path.stem
        if name in found:
            problems.append(f"{name}: has two manifests, {found[name]} and {path}")
        found[name] = path
    external = {name: path for name, path in found.items() if name == EXTERNAL}
    external |= {
        f"{EXTERNAL}-{path.stem}": path
        for path in sorted((folder / EXTERNAL).glob("*.csv"))
        if path.name not in manifests and not path.name.startswith((".", "~$"))
    }
    found.pop(EXTERNAL, None)
    problems += [
        f"{name}: a site's name may have up to 64 letters, digits, '-' and '_' only, and is not '{SERVER}'"
        f"{_other_name(name)}"
        for name in (*found, *external)
        if not SITE_NAME.fullmatch(name) or name == SERVER
    ]
    if not found:
        problems.append(f"no <site>/{usual} and no <site>.csv")
    if problems:
        raise ManifestError(f"{folder}: cannot be used as a folder of sites.", problems=problems)
    return SiteFolder(found, external)


def _other_name(name: str) -> str:
    """Return a name that a folder or file may have in place of ``name``, in words; empty if there is none."""
    from histoflare.flare.kits import SERVER, SITE_NAME  # FLARE takes its time

    fit = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:64]
    return f"; rename it, to {fit} for instance" if SITE_NAME.fullmatch(fit) and fit != SERVER else ""


def with_ledgers(sites: Mapping[str, SiteConfiguration], workspace: Path) -> dict[str, SiteConfiguration]:
    """Return sites whose ledgers, and apart from them their keys, are in a workspace; none is made here."""
    folder = workspace.resolve()
    return {
        name: replace(
            site,
            ledger=folder / LEDGERS_FOLDER / name / "ledger.sqlite",
            ledger_key=folder / KEYS_FOLDER / name / "ledger.key",
        )
        for name, site in sites.items()
    }
