"""``report.json``: one schema, whoever wrote it, and the one reader of it.

A report always has :data:`ALWAYS`. Everything else is a part that may be missing (:data:`PARTS`): a run on
one workstation has them all, what a lead makes of a download has no figures of other models, and a hospital's
own has nothing of other sites. Pages show the parts that there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from histoflare.errors import JobError
from histoflare.report.figures import CLASSIFICATION, KINDS

FORMAT = 2
"""``format`` of a report. Those of version 0.1 do not say it, have every part, and are read as 1."""

ALWAYS: Mapping[str, type | tuple[type, ...]] = {
    "job": str,
    "runtime": str,
    "strategy": dict,
    "task": dict,
    "seed": int,
    "rounds": int,
    "privacy": str,
    "participation": list,
    "guarantee": dict,
}
"""What every report has, and its type."""

PARTS: Mapping[str, Any] = {
    "data": CLASSIFICATION.data,
    "encoder": None,
    "protocol": None,
    "sites": {},
    "federated": None,
    "pooled": None,
    "local_on_all_sites": {},
    "external": None,
    "external_other_models": {},
    "bounds": {},
    "accuracy_against_epsilon": [],
    "evaluated_at_sites": None,
    "evaluated_model": "last",
    "evaluation_refused": {},
    "evaluation_noise": None,
    "bytes_up": None,
    "bytes_down": None,
    "seconds": {},
    "seconds_per_site": {},
    "model_sha256": None,
}
"""What a report may have → what stands for it where it has not. ``encoder`` is the task's encoder, or its
network where it has none; ``evaluated_model`` says which model was asked about: ``last`` or ``best``."""


def drop_missing(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without the parts in which nothing is."""
    return {name: value for name, value in report.items() if name not in PARTS or value != PARTS[name]}


def fill_missing(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report in which every part stands, those that are not there as :data:`PARTS` has them."""
    return {**PARTS, **report}


def read_report(path: Path) -> dict[str, Any]:
    """Return the report in a file, of this version or an earlier one, with every part.

    Raises:
        JobError: There is no such file, it is no report, or a later version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (FileNotFoundError, IsADirectoryError):
        raise JobError(
            f"{path}: not a file. A run writes its report.json into its folder, and 'histoflare job result' "
            "one of what a job's download brought."
        ) from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise JobError(f"{path}: not JSON: {error}") from None
    problem = _problem(content)
    if problem:
        raise JobError(f"{path}: not a report that this version of histoflare can read: {problem}.")
    return fill_missing(content)


@contextmanager
def of_a_report(path: Path) -> Iterator[None]:
    """Raise one clear error for whatever a damaged report causes in the block that makes a page of it.

    Raises:
        JobError: It is damaged.
    """
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, UndefinedError):
        raise JobError(
            f"{path}: damaged: its figures are not built as histoflare writes them. Make it again."
        ) from None


def sites_of(report: Mapping[str, Any]) -> set[str]:
    """Return every site that a report speaks of."""
    found = {*report["sites"], *(report["evaluated_at_sites"] or {}), *report["evaluation_refused"]}
    for row in report["participation"]:
        found |= {*(row.get("sites") or []), *row["taking_part"], *row.get("refused", {})}
    return found


def _problem(content: Any) -> str:
    """Return what is wrong with a report as a whole; empty if nothing is."""
    if not isinstance(content, dict):
        return "it is no table of parts"
    version = content.get("format", 1)
    if type(version) is not int or version < 1:
        return f"its format is {version!r}"
    if version > FORMAT:
        return f"a later version wrote it (format {version}; this one reads up to {FORMAT})"
    missing = [name for name in ALWAYS if name not in content]
    if missing:
        return f"it lacks {', '.join(missing)}"
    wrong = [name for name, kind in ALWAYS.items() if not isinstance(content[name], kind)]
    wrong += [
        name
        for name, empty in PARTS.items()
        if isinstance(empty, dict | list) and not isinstance(content.get(name, empty), type(empty))
    ]
    if content.get("data", CLASSIFICATION.data) not in KINDS:
        wrong.append("data")
    return f"{', '.join(wrong)} cannot be what stands there" if wrong else ""


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no figure")
