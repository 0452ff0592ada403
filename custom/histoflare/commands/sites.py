"""Finding the sites of an experiment on one workstation: a folder with one manifest per site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histoflare.errors import ManifestError
from histoflare.flare.kits import SERVER, SITE_NAME

EXTERNAL = "external"


@dataclass(frozen=True)
class SiteFolder:
    """The manifests found: ``sites`` train, the ``external`` cohorts are only asked at the end."""

    sites: dict[str, Path]
    external: dict[str, Path]


def find_sites(folder: Path) -> SiteFolder:
    """Return the manifests in ``folder``: ``<site>/manifest.csv`` or ``<site>.csv``.

    External cohorts are a site called ``external``, and every ``external/<name>.csv``.

    Raises:
        ManifestError: There are none, one site has two, or a name cannot be a FLARE site name.
    """
    found: dict[str, Path] = {}
    problems = []
    for path in sorted([*folder.glob("*/manifest.csv"), *folder.glob("*.csv")]):
        name = path.parent.name if path.name == "manifest.csv" and path.parent != folder else path.stem
        if name in found:
            problems.append(f"{name}: has two manifests, {found[name]} and {path}")
        found[name] = path
    external = {name: path for name, path in found.items() if name == EXTERNAL}
    external |= {
        f"{EXTERNAL}-{path.stem}": path
        for path in sorted((folder / EXTERNAL).glob("*.csv"))
        if path.name != "manifest.csv"
    }
    found.pop(EXTERNAL, None)
    problems += [
        f"{name}: a site's name may have letters, digits, '-' and '_' only, and is not '{SERVER}'"
        for name in (*found, *external)
        if not SITE_NAME.fullmatch(name) or name == SERVER
    ]
    if not found:
        problems.append("no <site>/manifest.csv and no <site>.csv")
    if problems:
        raise ManifestError(f"{folder}: cannot be used as a folder of sites.", problems=problems)
    return SiteFolder(found, external)
