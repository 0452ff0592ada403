"""FLARE's console for administrators, with its loaders closed first: what a kit's ``fl_admin.sh`` starts.

FLARE's own changes into the kit, below which downloaded jobs lie, and looks through all of it for a
``comm_config`` that names code to run.
"""

from __future__ import annotations

from nvflare.fuel.hci.tools import admin

from histoflare.flare.closed_messages import close_messages
from histoflare.flare.loaders import ClosedLoaders

if __name__ == "__main__":
    ClosedLoaders()
    close_messages()
    admin.main()
