"""A client or a server that starts only with the startup kit that was signed."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import WorkspaceConstants

from histoflare.errors import HistoflareError
from histoflare.flare.job_folders import remove_applications
from histoflare.flare.kit_signature import CLIENT_FILE, participant_of, verify_kit
from histoflare.site.ledgers import open_ledger
from histoflare.site.site_file import read_own_file

CHECK_FILE = "kit_check__p_resources.json"
"""In ``startup``: FLARE reads it whatever the site has in ``local``, in the process that starts the jobs, and
not in a job's. There Admission makes the check: when a job's process ends, the job ends at all sites."""

_START_SCRIPT_RUNS = "daemon_pid.fl"
"""In the kit while ``start.sh`` waits to start again what has ended."""


class KitCheck(FLComponent):
    """Ends the process that builds it, with exit code 1, unless the kit is as it was signed, and this site's.

    FLARE builds it before it connects to anybody, in the kit's folder. Whoever removes :data:`CHECK_FILE`
    starts a client without this check; Admission makes the same comparison, and refuses each job.
    """

    def __init__(self) -> None:
        super().__init__()
        require_usable_folder(Path.cwd())
        require_signed_kit(Path.cwd())
        require_own_kit(Path.cwd())


def require_usable_folder(kit: Path) -> None:
    r"""End this process with what is wrong if what jobs make would be lost where the kit is.

    FLARE packs a finished job with ``/`` for each ``\`` of its path, and then finds nothing to pack.
    """
    if "\\" in str(kit):
        refuse_start(
            kit,
            HistoflareError(
                f"{kit}: FLARE loses the results of a job in a path with a '\\'. Move the kit, and start "
                "it from there.",
                reason="FEDERATION_FAILED",
            ),
        )


def require_own_kit(kit: Path) -> None:
    """End this process with what is wrong if the kit is another site's than the ledger that its file names.

    Whatever else is wrong with the file or the ledger is said of each job.
    """
    if not (kit / CLIENT_FILE).exists():
        return
    site = participant_of(kit)
    try:
        open_ledger(read_own_file(site, kit / "local")).check_usable()
    except HistoflareError as error:
        if error.reason == "LEDGER_FOREIGN":
            refuse_start(kit, error)


def require_signed_kit(kit: Path) -> None:
    """End this process with what is wrong, unless the kit is as it was signed.

    What a site's earlier jobs brought is removed first: nothing needs it any more. (A server's is what a job
    that was lost goes on from.)
    """
    try:
        if (kit / CLIENT_FILE).exists():
            remove_applications(kit)
        verify_kit(kit)
    except HistoflareError as error:
        refuse_start(kit, error)


def refuse_start(kit: Path, error: HistoflareError) -> NoReturn:
    """Raise :class:`SystemExit` with what is wrong.

    FLARE's start script would start the process again and again: it is told to stop.
    """
    if (kit / _START_SCRIPT_RUNS).exists():
        (kit / WorkspaceConstants.SHUTDOWN_FILE).touch()
    raise SystemExit(f"{error.reason}: {error}") from None


def check_configuration() -> dict[str, object]:
    """Return the content of :data:`CHECK_FILE`."""
    path = f"{KitCheck.__module__}.{KitCheck.__name__}"
    return {"format_version": 2, "components": [{"id": "histoflare_kit_check", "path": path, "args": {}}]}
