"""Where a FLARE server keeps its jobs: inside its own startup kit, not in the machine's temporary folder.

FLARE takes absolute folders only, and where a kit will be unpacked is not known when it is made. The server
changes into its kit before it builds these, so relative folders start there.
"""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

JOBS_FOLDER = "jobs"
SNAPSHOTS_FOLDER = "snapshots"


class KitJobs(SimpleJobDefManager):
    """FLARE's job manager with a folder below the server's kit; an absolute folder is taken as it is."""

    def __init__(self, uri_root: str = JOBS_FOLDER, job_store_id: str = "job_store") -> None:
        super().__init__(str(Path.cwd() / uri_root), job_store_id)


class KitStorage(FilesystemStorage):
    """FLARE's storage with a folder below the server's kit; an absolute folder is taken as it is."""

    def __init__(self, root_dir: str = SNAPSHOTS_FOLDER, uri_root: str = "/") -> None:
        super().__init__(str(Path.cwd() / root_dir), uri_root)
