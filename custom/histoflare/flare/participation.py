"""Who took part in which round: a file in the run folder, which comes with the job's result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants

from histoflare.storage import write_json

PARTICIPATION_FILE = "participation.json"


class ParticipationLog:
    """Collects one row per round and rewrites :data:`PARTICIPATION_FILE` after each."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, fl_ctx: FLContext, *, sites: list[str], taking_part: list[str]) -> None:
        """Note that of ``sites`` (registered with the server) ``taking_part`` had their update combined."""
        self._rows.append(
            {
                "round": fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
                "sites": sites,
                "taking_part": taking_part,
                "unix_time": round(time.time(), 3),
            }
        )
        write_json(run_folder(fl_ctx) / PARTICIPATION_FILE, self._rows)


def run_folder(fl_ctx: FLContext) -> Path:
    """Return the server's folder of this job; what lies there is downloaded with the job's result."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
