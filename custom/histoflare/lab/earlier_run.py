"""Refuses an output folder with the results of another run: two runs in one folder would be taken for one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histoflare.errors import JobError
from histoflare.storage import write_json

INPUTS_FILE = "inputs.json"
MADE_BY = {"made_by": "histoflare run"}
"""In that file: without it a folder is somebody else's, and nothing in it is removed."""

RESULTS = ("report.json", "summary.json", "site-*.html", "seed-*/report.json")
"""Names of what a run leaves. A run that failed before leaves none of them, and its folder is free."""

UNFINISHED = ("job", "records", "federation", "unprotected", "seed-*")
"""What a run that failed before that has begun. Bags are not among them: each says what it was made of. Nor
are ledgers, which say what was spent."""


def claim_output(out: Path, inputs: Mapping[str, Any]) -> None:
    """Make ``out`` the folder of a run on ``inputs``, or check that it is: the same run may go on there.

    What another run, which came to nothing, has begun there is removed.

    Args:
        out: The output folder. inputs: What tells runs apart, as plain JSON: their sites, at least.

    Raises:
        JobError: The results that lie there are of another run (OUTPUT_TAKEN). Nothing was changed then.
    """
    path = out / INPUTS_FILE
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError):
        found = None
    wanted = json.loads(json.dumps(MADE_BY | dict(inputs)))
    if found == wanted:
        return
    if any(any(out.glob(pattern)) for pattern in RESULTS):
        raise JobError(
            f"{out}: holds what another run left ({_differs(found, wanted)}), and the two would be taken for "
            "one. Give another folder with --out, or remove this one.",
            reason="OUTPUT_TAKEN",
        )
    if isinstance(found, dict) and found.get("made_by") == wanted["made_by"]:
        for begun in (each for pattern in UNFINISHED for each in out.glob(pattern)):
            if begun.is_dir():
                shutil.rmtree(begun)
    write_json(path, wanted)


def _differs(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "of a version that did not say of which sites and job"
    return "with other " + " and ".join(name for name in wanted if found.get(name) != wanted[name])
