"""Files beside a slide's mask: outlines of its classes, and a picture of the slide with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histoflare.masks.outlines import write_outlines
from histoflare.masks.segmenter import SegmentedSlide
from histoflare.slides.mask_overlay import class_colours, draw_classes
from histoflare.slides.mask_pyramid import MaskPyramid
from histoflare.slides.overlay import read_picture
from histoflare.slides.reader import Slide
from histoflare.storage import atomic_path


@dataclass(frozen=True)
class MaskFiles:
    """Where a slide's outlines and picture go; None for what nobody asked for."""

    geojson: Path | None = None
    overlay: Path | None = None

    @property
    def wanted(self) -> list[Path]:
        """Those that were asked for."""
        return [path for path in (self.geojson, self.overlay) if path is not None]

    def of(self, stem: str) -> MaskFiles:
        """Return the files of one of several slides: here are folders, and there files named ``stem``."""
        return MaskFiles(
            None if self.geojson is None else self.geojson / f"{stem}.geojson",
            None if self.overlay is None else self.overlay / f"{stem}.png",
        )


def write_mask_files(files: MaskFiles, slide: Slide, result: SegmentedSlide, background: str | None) -> None:
    """Write the files that are wanted; the class ``background`` is in neither.

    Raises:
        SlideError: The slide cannot be read.
        OSError: A file cannot be written.
    """
    without = [] if background is None else [background]
    colours = class_colours(len(result.labels))
    if files.geojson is not None:
        with MaskPyramid(result.path) as opened:
            write_outlines(
                files.geojson, opened, result.labels, colours, l0_per_px=result.l0_per_px, without=without
            )
    if files.overlay is not None:
        indices = range(len(result.labels))
        notes = [f"{result.area_mm2(index):.3g} mm2, {result.share(index):.1%}" for index in indices]
        with MaskPyramid(result.path) as opened:
            picture = draw_classes(
                read_picture(slide),
                opened,
                result.l0_per_px,
                result.labels,
                notes,
                mpp=slide.mpp,
                without=without,
            )
        with atomic_path(files.overlay) as partial:
            picture.save(partial, "PNG")
