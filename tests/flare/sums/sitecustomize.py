"""A site that is lost between its hello and its training, and a server that keeps what it holds.

``HISTOFLARE_TEST_LOST=file.json`` with ``{"site": …, "round": …}``: that site's client and its job's process
are killed when the list of that round's first attempt is there. ``HISTOFLARE_TEST_HELD=folder``: each vector
that the server's aggregator holds is written there.

Python imports a module of this name at its start, if it is on the path.
"""

import json
import os
import signal
import sys
import uuid
from pathlib import Path

ARGUMENTS = " ".join(sys.orig_argv)


def _be_lost() -> None:
    from histoflare.flare.site_sum import SiteSum

    join = SiteSum.join

    def die_or_join(self, hellos, round_index, attempt, *rest):  # type: ignore[no-untyped-def]
        lost = json.loads(Path(os.environ["HISTOFLARE_TEST_LOST"]).read_text())
        if (self._site, round_index, attempt) == (lost.get("site"), lost.get("round"), 0):
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return join(self, hellos, round_index, attempt, *rest)

    SiteSum.join = die_or_join


def _keep_what_is_held() -> None:
    import numpy as np

    from histoflare.flare.aggregator import SiteOrderAggregator

    hold = SiteOrderAggregator.hold

    def hold_and_keep(self, site, dxo, fl_ctx):  # type: ignore[no-untyped-def]
        hold(self, site, dxo, fl_ctx)
        folder = Path(os.environ["HISTOFLARE_TEST_HELD"]) / fl_ctx.get_job_id()
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{site}-{uuid.uuid4().hex}.npz", **dxo.data)

    SiteOrderAggregator.hold = hold_and_keep


if os.environ.get("HISTOFLARE_TEST_LOST") and "client.worker_process" in ARGUMENTS:
    _be_lost()
if os.environ.get("HISTOFLARE_TEST_HELD") and "server.runner_process" in ARGUMENTS:
    _keep_what_is_held()
