"""What left a site beside the updates of a run: figures of its models, and what an earlier chapter sent.

A site's page lists the updates round by round. These sentences say the rest, so that the page holds all that
left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histoflare.report.chapters import UNPROTECTED_RUN
from histoflare.report.evaluation_noise import figures_together, say_evaluation_noise
from histoflare.report.figures import NAMES, kind_of
from histoflare.report.participation import site_rounds, update_left


def say_also_left(report: Mapping[str, Any], site: str) -> list[str]:
    """Return, in a sentence each, what else left ``site`` in a run and in its unprotected first chapter.

    A run in one process sent nothing; it has no sentences.

    Args:
        report: The consortium's.
        site: Its name there.
    """
    if report["runtime"] == "inprocess":
        return []
    found = _figures(report, site, "the model")
    first = report.get(UNPROTECTED_RUN)
    if not first:
        return found
    updates = _updates(first, site)
    if updates:
        found.append(
            f"Before this run, in the first chapter (job {first['job']}), {updates} updates left the site "
            "without protection. They are of the same patients, and no ε here covers them."
        )
    return found + _figures(first, site, "the first chapter's model")


def say_uncovered_chapter(report: Mapping[str, Any]) -> str:
    """Return that no ε covers a report's first chapter; empty if it has none."""
    first = report.get(UNPROTECTED_RUN)
    if not first:
        return ""
    return (
        f"Nor is the first chapter covered: the updates of its job, {first['job']}, are of the same patients "
        "and left without protection. Whoever saw both has no such bound; a protected job alone has it."
    )


def _updates(report: Mapping[str, Any], site: str) -> int:
    return sum(
        update_left(row, site, status)
        for each in site_rounds(report)
        if each.site == site
        for row, status in zip(report["participation"], each.statuses, strict=True)
    )


def _figures(report: Mapping[str, Any], site: str, which: str) -> list[str]:
    said = (report.get("evaluated_at_sites") or {}).get(site)
    noise, together = report.get("evaluation_noise"), figures_together(report)
    if noise is not None and (said is not None or (together is not None and site in together[0])):
        return [
            f"Counts of what {which} says of the site's test patients left. {say_evaluation_noise(noise)}"
        ]
    if not said:
        return []
    names = [NAMES[name] for name in kind_of(report).names if said.get(name) is not None]
    figures = f" ({', '.join(names)})" if names else ""
    return [f"Figures of {which} on the site's test patients{figures} left without noise: no ε covers them."]
