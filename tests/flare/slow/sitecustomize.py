"""Sites that take their time: with ``HISTOFLARE_TEST_DELAYS=file.json`` a trainer sleeps after its work.

The file holds site → seconds for each round, the last one for all later rounds; it is read at each round.
A file ``<site>-<round>`` beside it says that the site sleeps, or did.
Python imports a module of this name at its start, if it is on the path.
"""

import json
import os
import sys
import time
from pathlib import Path


def _slow_down() -> None:
    from histoflare.site.work import SiteWork

    train = SiteWork.train

    def slowly(self, arrays, round_index, *rest):  # type: ignore[no-untyped-def]
        answer = train(self, arrays, round_index, *rest)
        file = Path(os.environ["HISTOFLARE_TEST_DELAYS"])
        of_site = json.loads(file.read_text()).get(self._setup.site, [0.0])
        file.with_name(f"{self._setup.site}-{round_index}").touch()
        time.sleep(of_site[min(round_index, len(of_site) - 1)])
        return answer

    SiteWork.train = slowly


if os.environ.get("HISTOFLARE_TEST_DELAYS") and "histoflare.site.child" in sys.orig_argv:
    _slow_down()
