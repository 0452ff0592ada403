"""The kinds of data that tasks are trained on: one file each, and one line here."""

from __future__ import annotations

from histoflare.errors import JobError
from histoflare.site.kinds.bags import BAGS
from histoflare.site.kinds.images import IMAGES
from histoflare.site.kinds.kind import DataKind

__all__ = ["BAGS", "IMAGES", "KINDS", "DataKind", "kind_of"]

KINDS: dict[str, DataKind] = {
    "bags": BAGS,
    "images": IMAGES,
}
"""``Task.data`` → what such data bring."""


def kind_of(data: str) -> DataKind:
    """Return the kind of data called ``data``, as in a task's ``data``.

    Raises:
        JobError: There is no such kind (JOB_INVALID).
    """
    if data not in KINDS:
        raise JobError(
            f"This version of histoflare has no data of the kind {data!r}; it has {', '.join(KINDS)}. "
            "Install the version that the job was made for.",
            reason="JOB_INVALID",
        )
    return KINDS[data]
