"""With ``ANY_JOB`` FLARE's processes take jobs that are none of this project; the client of ``OPEN_SITE``
sends what FLARE's would send; and a tap (``wire_tap``).

Python imports a module of this name at its start, if it is on the path.
"""

import os
import sys
from pathlib import Path

from wire_tap import tap


def _take_any_job() -> None:
    """Leave out the look at a job's bytes: what is tested is what stands behind it."""
    import histoflare.flare.application as application
    import histoflare.flare.job_files as job_files

    for name in (
        "check_application",
        "check_folder",
        "check_meta",
        "check_submission",
        "check_server_application",
    ):
        setattr(application, name, lambda *_: None)
    job_files.check_configuration = lambda *_: None


def _send_all() -> None:
    """Leave out what stops messages of the process that starts the jobs: FLARE's sends logs of jobs."""
    import histoflare.flare.cells as cells

    cells.is_listed = lambda table, channel, topic, asked=cells.is_listed: (
        table is cells.PARENT_SENDS or asked(table, channel, topic)
    )


if os.environ.get("ANY_JOB") and any("nvflare.private.fed.app" in part for part in sys.orig_argv):
    _take_any_job()
    if os.environ.get("OPEN_SITE") in {Path(part).name for part in sys.orig_argv}:
        _send_all()
tap()
