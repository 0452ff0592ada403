"""What FLARE's simulator leaves out at a site: to put the scope of ``privacy.json`` into force."""

from __future__ import annotations

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ProcessType
from nvflare.apis.fl_context import FLContext
from nvflare.private.privacy_manager import PrivacyService


class SimulatedScope(FLComponent):
    """Gives a simulated site's job the filters of its scope, as a provisioned site's gets them from FLARE.

    Stands in the ``components`` of the simulator's ``privacy.json``, and in no other.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Set the scope before the first task."""
        if event_type != EventType.ABOUT_TO_START_RUN or fl_ctx.get_process_type() == ProcessType.SERVER_JOB:
            return
        name = (fl_ctx.get_prop(FLContextKey.JOB_META) or {}).get("scope")
        fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, PrivacyService.get_scope(name), private=True, sticky=True)
