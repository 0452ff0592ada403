"""What is wrong with the slides of a manifest, before hours are spent on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from histoflare.errors import SlideError
from histoflare.slides.manifest import Manifest
from histoflare.slides.mosaic import MosaicParameters, l0_patch_side
from histoflare.slides.reader import Slide


@dataclass(frozen=True)
class Finding:
    """What is odd about a slide.

    Attributes:
        line: Of the slide in the manifest.
        slide: As the manifest has it.
        reason: Why it would be left out; "" if it is usable.
        message: What is odd, and what to do about it.
    """

    line: int
    slide: str
    reason: str
    message: str

    @property
    def usable(self) -> bool:
        """Whether bags can be made of it all the same."""
        return not self.reason


def survey_slides(
    manifest: Manifest, parameters: MosaicParameters, on_row: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Return what is odd about the slides of ``manifest``, without looking for tissue on them.

    Left out would be a slide that cannot be opened, of which no pixel can be read in the middle of a level,
    whose resolution is not known or too coarse for the patches, or that is smaller than one patch. A slide
    whose resolution is not what the manifest says is usable: the manifest's is taken.

    Args:
        manifest: The slides.
        parameters: Of the patches that will be asked for: ``mpp`` and ``patch_px``.
        on_row: Called after each slide.
    """
    findings = []
    for row in manifest.rows:
        written = row.written or str(row.slide)
        try:
            with Slide(row.slide, mpp=row.mpp) as slide:
                mpp = slide.mpp
                slide.probe()
                l0_patch_side(slide, parameters)
                if slide.mpp_problem:
                    message = f"{slide.path}: {slide.mpp_problem}; {mpp:g} is taken, as the manifest says"
                    findings.append(Finding(row.line, written, "", message))
        except SlideError as error:
            findings.append(Finding(row.line, written, error.reason, str(error)))
        on_row()
    return findings
