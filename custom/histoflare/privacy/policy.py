"""A site's policy for one scope: what may leave the building. Data, written and read by its data steward.

A job names a scope; what the scope allows is the site's to say, in a TOML file of its own that no job can
read or change. The scope decides how updates are protected (``mechanism``), for which purposes the site
works at all, which metrics may leave and from which cohort size.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoflare.errors import JobError

MECHANISMS = ("open",)
"""``open``: updates leave as they were trained: no clipping, no noise, nothing booked, ε = ∞."""

COUNTS = ("n_slides", "n_patients")
"""Metrics that are counts; they leave only where ``counts`` is true."""


@dataclass(frozen=True)
class Policy:
    """What one scope allows.

    Attributes:
        name: The scope, as jobs name it.
        mechanism: One of :data:`MECHANISMS`.
        purposes: A job with any other purpose is refused.
        metrics: Names of the metrics that may leave, e.g. ``"auc"`` or ``"validation/auc"``; others are cut.
        counts: Whether counts (of slides, patients, training samples as an update's weight) may leave.
        minimum_patients: Nothing computed over fewer patients leaves, neither update nor metric. At least 1.
    """

    name: str
    mechanism: str
    purposes: tuple[str, ...]
    metrics: tuple[str, ...]
    counts: bool
    minimum_patients: int

    def allowed_metrics(self, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
        """Return those of ``metrics`` that may leave."""
        return {
            name: value
            for name, value in metrics.items()
            if (self.counts if name.rpartition("/")[2] in COUNTS else name in self.metrics)
        }


POLICIES = Path(__file__).parent / "policies"
"""The policies that come with this package, one ``<scope>.toml`` each; a kit gets a copy of its own."""


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        JobError: It is missing, is not TOML, or has a missing, unknown or unusable entry (all are listed).
            The reason is ``POLICY_INVALID``: without a policy nothing leaves.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError:
        raise JobError(
            f"{path}: not found. Without its policy this site takes no job.", reason="POLICY_INVALID"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not a TOML file: {error}", reason="POLICY_INVALID") from None
    problems = _problems(content)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise JobError(f"{path}: cannot be used as a policy; correct:{listed}", reason="POLICY_INVALID")
    return Policy(
        name=content["name"],
        mechanism=content["mechanism"],
        purposes=tuple(content["purposes"]),
        metrics=tuple(content["metrics"]),
        counts=content["counts"],
        minimum_patients=content["minimum_patients"],
    )


def _problems(content: Mapping[str, Any]) -> list[str]:
    fields = Policy.__dataclass_fields__
    problems = [f"{name}: missing" for name in fields if name not in content]
    problems += [f"{name}: not an entry of a policy" for name in content if name not in fields]
    if not (isinstance(content.get("name", "x"), str) and content.get("name", "x")):
        problems.append("name: the scope's name")
    if content.get("mechanism", "open") not in MECHANISMS:
        problems.append(f"mechanism: one of {', '.join(MECHANISMS)}, not {content['mechanism']!r}")
    for name in ("purposes", "metrics"):
        entries = content.get(name, [])
        if not (isinstance(entries, list) and all(isinstance(entry, str) and entry for entry in entries)):
            problems.append(f"{name}: a list of texts, not {entries!r}")
    if not isinstance(content.get("counts", True), bool):
        problems.append(f"counts: true or false, not {content['counts']!r}")
    minimum = content.get("minimum_patients", 1)
    if type(minimum) is not int or minimum < 1:
        problems.append(f"minimum_patients: a whole number of at least 1, not {minimum!r}")
    return problems
