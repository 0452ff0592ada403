"""Generated images with their masks as files, one folder a site: segmentation for those without data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from histoflare.masks.image_manifest import ImageRow, write_image_manifest
from histoflare.masks.importers import MANIFEST, write_mask, write_png
from histoflare.synthetic.cohort import PlannedSlide
from histoflare.synthetic.images import IMAGE_MPP, SyntheticImages, plan_images, render_image

LABELS = ("background", "nucleus")
"""What the masks' values 0 and 1 are."""


def make_images(
    out_dir: Path, made: SyntheticImages, progress: Callable[[int, int], None] | None = None
) -> dict[str, Path]:
    """Write the images and masks of ``made`` and one manifest per site: the same bytes each time.

    Args:
        out_dir: Gets ``<site>/images/*.png``, ``<site>/masks/*.png`` and ``<site>/images.csv``.
        made: What to make.
        progress: Called with (images made, images in all) after each.

    Returns:
        The manifest of each site.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    planned = plan_images(made)
    rows: dict[str, list[ImageRow]] = {}
    for done, image in enumerate(planned, start=1):
        rows.setdefault(image.site, []).append(_write(out_dir / image.site, image, made))
        if progress is not None:
            progress(done, len(planned))
    return {
        site: write_image_manifest(out_dir / site / MANIFEST, of_site).path for site, of_site in rows.items()
    }


def _write(folder: Path, image: PlannedSlide, made: SyntheticImages) -> ImageRow:
    pixels, mask = render_image(image, made.side_px, made.seed)
    row = ImageRow(
        line=0,
        image=folder / "images" / f"{image.slide_id}.png",
        mask=folder / "masks" / f"{image.slide_id}.png",
        patient=image.patient,
        mpp=IMAGE_MPP,
        split=image.split,
        subgroups={"site": image.site, "sex": image.sex, "age_band": image.age_band},
    )
    write_png(row.image, Image.fromarray(pixels))
    write_mask(row.mask, mask)
    return row
