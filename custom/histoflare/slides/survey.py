"""What is wrong with the slides of a manifest, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from histoflare.errors import SlideError
from histoflare.slides.manifest import Manifest
from histoflare.slides.reader import Slide


@dataclass(frozen=True)
class Finding:
    """What is odd about the slide of a manifest's ``line``; not ``usable``: it would be left out."""

    line: int
    message: str
    usable: bool


def survey_slides(manifest: Manifest, on_row: Callable[[], None] = lambda: None) -> list[Finding]:
    """Open the slides of ``manifest``, and return what is wrong with those that cannot be opened or scaled.

    A slide whose resolution is not what the manifest says is usable: the manifest's is taken.

    Args:
        manifest: The slides.
        on_row: Called after each.
    """
    findings = []
    for row in manifest.rows:
        try:
            with Slide(row.slide, mpp=row.mpp) as slide:
                mpp = slide.mpp
                if slide.mpp_problem:
                    message = f"{slide.path}: {slide.mpp_problem}; {mpp:g} is taken, as the manifest says"
                    findings.append(Finding(row.line, message, True))
        except SlideError as error:
            findings.append(Finding(row.line, str(error), False))
        on_row()
    return findings
