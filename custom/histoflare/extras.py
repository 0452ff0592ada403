"""Libraries that an installation may do without, and the extra of the package that brings each.

A FLARE server installs ``histoflare`` alone: it opens no slide, prepares no bag and draws no page.
"""

from __future__ import annotations

EXTRAS = {
    "PIL": "slides",
    "einops": "masks",
    "h5py": "slides",
    "imagecodecs": "slides",
    "jinja2": "report",
    "monai": "slides",
    "openslide": "slides",
    "sklearn": "slides",
    "tifffile": "slides",
    "transformers": "masks",
}
"""Module of the library → extra. Where several bring it, the one that most people want."""


def describe_missing(error: ModuleNotFoundError) -> str | None:
    """Return what to install for a library that was not found; None if no extra brings it."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module)
    if extra is None:
        return None
    return (
        f"this needs {module}, which is not installed here: pip install 'histoflare[{extra}]' brings it, and "
        "pip install 'histoflare[all]' all that a hospital or a workstation needs"
    )
