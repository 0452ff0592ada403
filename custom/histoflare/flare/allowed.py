"""The classes that a job may name at a site or a server: those of the files that are the same in every job.

Whole class paths, never a package prefix: a prefix would admit any class below it as a job's filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from histoflare.flare.job_files import CONFIGURATIONS

SITE_CLASSES = (
    "histoflare.flare.admission.Admission",
    "histoflare.flare.gate.Gate",
    "histoflare.flare.guard.Guard",
)
"""What a site's own ``privacy.json`` names. A job may not: it would bring its own gate."""


def _paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        yield from ([content["path"]] if "path" in content else [])
        content = list(content.values())
    if isinstance(content, list):
        for entry in content:
            yield from _paths(entry)


ALLOWED_CLASSES = tuple(sorted({*_paths(list(CONFIGURATIONS.values()))}))
