"""How FLARE starts the process of a job, whatever the path of the kit and of Python.

FLARE joins the arguments with blanks and splits the line again, as a shell would: with a blank, a quote or
``#`` in a path they are other arguments then, and no job starts. These join them quoted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher
from nvflare.utils.job_launcher_utils import get_client_job_args, get_server_job_args


class ClientLauncher(ProcessJobLauncher):
    """Starts a job's process at a site."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """Return the command line."""
        return join_command(fl_ctx, get_client_job_args())


class ServerLauncher(ProcessJobLauncher):
    """Starts a job's process at the server."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """Return the command line."""
        return join_command(fl_ctx, get_server_job_args())


def join_command(fl_ctx: FLContext, names: Sequence[str]) -> str:
    """Return this Python with FLARE's arguments of these names, as a line that a shell splits into them."""
    given = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
    words = [sys.executable]
    for name in names:
        if given.get(name):
            option, value = given[name]
            # the options are many words in one text; none of them is a path
            words += [option, *(value.split() if name == JobProcessArgs.OPTIONS else [str(value)])]
    return shlex.join(words)
