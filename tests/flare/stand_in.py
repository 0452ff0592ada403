"""A FLARE engine of a few lines: real contexts and shareables, no processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager

from histoflare.rounds.transports.float32 import PLAIN


class StandInEngine:
    """Hands out sites and folders, notes the events that are fired, and has a job (:func:`job_of_engine`)."""

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...] = (),
        configuration: Path | None = None,
        **job: Any,
    ) -> None:
        self.folder = folder
        self.configuration = configuration or folder
        known = {"transport": PLAIN, "rounds": 3, "seed": 0, "training_sites": sorted, "most_evaluations": 1}
        known |= {"tally": None, "spare_rounds": 0}
        self.job = SimpleNamespace(**{**known, **job})
        self.sites = sites
        self.events: list[str] = []

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=site) for site in self.sites]

    def get_workspace(self) -> Any:
        folder = str(self.folder)
        return SimpleNamespace(
            get_run_dir=lambda job_id: folder,
            get_site_config_dir=lambda: folder,
            get_app_config_dir=lambda job_id: str(self.configuration),
        )

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.events.append(event_type)

    def context(self, identity: str) -> FLContext:
        return FLContextManager(self, identity, "job").new_context()


def job_of_engine(fl_ctx: FLContext) -> Any:
    """Stands in for ``flare.job.job_of``."""
    return fl_ctx.get_engine().job


def come_from(site: str, fl_ctx: FLContext) -> FLContext:
    """Return ``fl_ctx`` as FLARE hands it over with a reply of ``site``."""
    peer = FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
    fl_ctx.set_prop(FLContextKey.PEER_CONTEXT, peer, private=True, sticky=False)
    return fl_ctx
