"""How evenly the sites are served, and who is better off alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.report.figures import NAMES, kind_of

GLOBAL = "global"
"""A site's figures of the global model, where the site uses another: what it shares and what it keeps."""


def say_served(report: Mapping[str, Any], figure: str = "") -> list[str]:
    """Return sentences on the spread of a figure between the sites, and on the sites better off alone.

    Empty where fewer than two sites have the figure.

    Args:
        figure: Empty: the main one of the report's kind.
    """
    figure = figure or kind_of(report).main
    found = figures_of(report, "federated", figure)
    if len(found) < 2:
        return []
    lowest, highest = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    said = [
        f"Between the sites, the {NAMES[figure]} of the federated model differs by "
        f"{found[highest] - found[lowest]:.3f}: from {found[lowest]:.3f} ({lowest}) to {found[highest]:.3f} "
        f"({highest})."
    ]
    alone = figures_of(report, "local", figure)
    better = [site for site in found if site in alone and alone[site] > found[site]]
    if better:
        listed = ", ".join(f"{site} ({alone[site]:.3f} for {found[site]:.3f})" for site in better)
        said.append(f"Better off with the model of its own data alone: {listed}; few patients may be chance.")
    elif alone:
        said.append("No site is better off with the model of its own data alone.")
    shared = figures_of(report, GLOBAL, figure)
    if shared:
        gained = [found[site] - shared[site] for site in shared if site in found]
        better_shared = [site for site in shared if site in found and shared[site] > found[site]]
        said.append(
            f"What sites keep for themselves changes it by {sum(gained) / len(gained):+.3f} on average"
            + (f"; better off without: {', '.join(better_shared)}." if better_shared else ".")
        )
    return said


def figures_of(report: Mapping[str, Any], model: str, figure: str) -> dict[str, float]:
    """Return site → a figure of its own test patients; sites without it are left out."""
    return {
        name: site[model][figure]
        for name, site in report["sites"].items()
        if site.get(model) and site[model].get(figure) is not None
    }
