"""Files that show where a model looks on one slide: a heat map, a picture, tiles for QuPath."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from histoflare.bags.attention_geojson import write_attention
from histoflare.bags.classifier import Attention
from histoflare.bags.heatmap import attention_levels, write_heat
from histoflare.slides.mask_overlay import add_attention_legend
from histoflare.slides.mosaic import Mosaic
from histoflare.slides.overlay import draw_attention, read_picture
from histoflare.slides.planes import PlaneName, plane_of
from histoflare.slides.reader import Slide
from histoflare.storage import atomic_path, make_folder


@dataclass(frozen=True)
class AttentionFiles:
    """Where each file goes; None for those that nobody asked for."""

    heatmap: Path | None = None
    overlay: Path | None = None
    geojson: Path | None = None

    @property
    def wanted(self) -> list[Path]:
        """Those that were asked for."""
        return [path for path in (self.heatmap, self.overlay, self.geojson) if path is not None]

    def of(self, stem: str) -> AttentionFiles:
        """Return the files of one of several slides: here are folders, and there files named ``stem``."""
        return AttentionFiles(
            None if self.heatmap is None else self.heatmap / f"{stem}.tiff",
            None if self.overlay is None else self.overlay / f"{stem}.png",
            None if self.geojson is None else self.geojson / f"{stem}.geojson",
        )


def write_attention_files(
    files: AttentionFiles, slide: Slide, mosaic: Mosaic, attention: Attention, plane: PlaneName
) -> None:
    """Write the files that are wanted, each whole or not at all.

    Args:
        plane: Of the heat map and the tiles; the picture is of the whole slide.

    Raises:
        SlideError: The slide cannot be read.
        OSError: A file cannot be written.
    """
    corners = [(patch.l0_x_px, patch.l0_y_px) for patch in mosaic.candidates]
    l0_coords, l0_patch_px = np.array(corners, np.int64), mosaic.l0_patch_px
    levels = attention_levels(attention.relative, attention.limit)
    covered = plane_of(slide.info, plane)
    if files.heatmap is not None:
        make_folder(files.heatmap.parent)
        with TemporaryDirectory(dir=files.heatmap.parent, prefix=".heat.") as scratch:
            write_heat(files.heatmap, levels, l0_coords, l0_patch_px, covered, slide.mpp, Path(scratch))
    if files.geojson is not None:
        relative, limit = attention.relative, attention.limit
        write_attention(files.geojson, relative, limit, l0_coords, l0_patch_px, covered)
    if files.overlay is not None:
        base = read_picture(slide)
        picture = draw_attention(base, l0_coords, l0_patch_px, levels)
        title = "attention: nearly even" if attention.is_even else "attention"
        picture = add_attention_legend(picture, attention.limit, base.px_per_l0 / slide.mpp, title)
        with atomic_path(files.overlay) as partial:
            picture.save(partial, "PNG")
