"""A page of a site's two layers of policy, for its steward and those who must agree. It stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.report.rendering import write_template

MEANINGS = {
    "epsilon": "the lifetime budget ε of each patient, over all jobs together",
    "delta": "the δ of that budget",
    "colluders": "with how many other sites the server may collude, where sites share their noise",
    "all_collude_epsilon": "the lifetime budget ε should all other sites collude, where they share noise",
    "sites_per_patient": "at how many of the sites that share noise one patient may be",
    "exhausted": "what becomes of a job that costs more than a patient has left",
    "job_share": "which part of the budget one job may take; shares of jobs add up",
    "minimum_patients": "nothing computed over fewer patients leaves",
    "evaluations": "how many evaluations over a patient may leave, over all jobs",
    "counts": "whether numbers of slides and patients may leave",
    "numbers": "numbers that may leave beside an update",
    "records": "whose contribution training limits",
    "seeded_noise": "whether noise may be repeatable, which voids every promise",
}
"""Entry of a policy → what it says, in the order of the page."""


def write_policy_page(facts: Mapping[str, Any], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        facts: What ``histoflare policy show --json`` prints.
        path: Where to.
    """
    scopes = {
        name: {
            **scope,
            "metrics": {
                layer: _say(scope["entries"]["metrics"][layer]) for layer in ("signed", "own", "holds")
            },
            "rows": [
                (meaning, *(_say(scope["entries"][entry][layer]) for layer in ("signed", "own", "holds")))
                for entry, meaning in MEANINGS.items()
                if entry in scope["entries"]
            ],
        }
        for name, scope in facts["scopes"].items()
    }
    write_template("policy.html", path, facts=facts, scopes=scopes)


def _say(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)
