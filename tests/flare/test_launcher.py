"""The command line of a job's process: FLARE's, and with paths that FLARE's own does not survive."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher

from histoflare.flare.launcher import ClientLauncher, ServerLauncher

Launcher = Callable[[], ProcessJobLauncher]
BOTH = [(ClientLauncher, ClientProcessJobLauncher), (ServerLauncher, ServerProcessJobLauncher)]
AWKWARD = ["/a b", "/it's", '/a"b', "/Köln #1", "/a\\b", "/$HOME;x", "/a\nb", ""]


def context(kit: str) -> FLContext:
    """Return what FLARE hands to a launcher, as ``client_executor`` and ``server_engine`` make it."""
    given = {
        JobProcessArgs.EXE_MODULE: ("-m", "nvflare.private.fed.app.client.worker_process"),
        JobProcessArgs.JOB_ID: ("-n", "4c1f"),
        JobProcessArgs.AUTH_TOKEN: ("-t", "secret"),
        JobProcessArgs.WORKSPACE: ("-m", kit),
        JobProcessArgs.STARTUP_DIR: ("-w", f"{kit}/startup"),
        JobProcessArgs.APP_ROOT: ("-r", f"{kit}/4c1f/app"),
        JobProcessArgs.SERVICE_PORT: ("--port", 8002),
        JobProcessArgs.OPTIONS: ("--set", " secure_train=true uid=a print_conf=True"),
    }
    made = FLContext()
    made.set_prop(FLContextKey.JOB_PROCESS_ARGS, given, private=True, sticky=False)
    return made


@pytest.mark.parametrize(("ours", "flares"), BOTH)
def test_it_is_flare_s_where_that_works(ours: Launcher, flares: Launcher) -> None:
    lines = [shlex.split(make().get_command({}, context("/srv/kit")), True) for make in (ours, flares)]
    assert lines[0] == lines[1]
    assert lines[0][0] == sys.executable and "secret" not in lines[0]


@pytest.mark.parametrize("kit", AWKWARD)
@pytest.mark.parametrize(("ours", "flares"), BOTH)
def test_a_path_stays_one_argument(ours: Launcher, flares: Launcher, kit: str) -> None:
    plain = shlex.split(ours().get_command({}, context("/srv/kit")), True)
    words = shlex.split(ours().get_command({}, context(kit)), True)
    assert words == [word.replace("/srv/kit", kit) for word in plain]


@pytest.mark.parametrize(("ours", "flares"), BOTH)
def test_so_does_that_of_python(ours: Launcher, flares: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    assert shlex.split(ours().get_command({}, context("/kit")))[0] == "/my venv/bin/python"
