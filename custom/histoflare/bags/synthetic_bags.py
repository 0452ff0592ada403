"""Bags of generated tissue without the slides in between: thousands, for experiments.

The patients, hospitals and tissue are those of :mod:`histoflare.slides.synthetic`. A bag holds a square field
of patches instead of a mosaic chosen from a slide: its header names no mosaic, and its source says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, read_header
from histoflare.bags.folder import bag_path, save_bag, writing_to
from histoflare.bags.network_encoder import Encoder
from histoflare.errors import BagError, JobError
from histoflare.slides.manifest import Manifest, read_manifest
from histoflare.slides.synthetic import PlannedSlide, SyntheticCohort, plan_slides, render_mosaic
from histoflare.slides.synthetic_cohort import write_site_manifests


@dataclass(frozen=True)
class FieldParameters:
    """What a bag's patches are: ``patches`` of side ``patch_px`` at ``mpp`` um/px, side by side.

    Side and resolution are those of the jobs that come with the package, unless others are asked for.
    """

    patches: int = 9
    patch_px: int = 224
    mpp: float = 0.5

    def __post_init__(self) -> None:
        if self.patches < 1 or self.patch_px < 32 or not 0.1 <= self.mpp <= 10:
            raise JobError("a synthetic bag needs 1 patch or more, of 32 px or more, at 0.1 to 10 um/px")
        if self.patches * (self.patch_px * self.mpp) ** 2 > 5000**2:
            raise JobError("a synthetic bag covers at most 5 x 5 mm: use fewer or smaller patches")


def make_bags(
    out_dir: Path,
    encoder: Encoder,
    cohort: SyntheticCohort,
    field: FieldParameters | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write one bag per slide of ``cohort`` and one manifest per site; bags that are there already are kept.

    Args:
        out_dir: Gets ``<site>/manifest.csv``, whose slides do not exist, and ``<site>/bags/*.h5``.
        encoder: Makes the features.
        cohort: Who is in it; its ``um_field`` plays no part.
        field: Which patches.
        progress: Called with (bags done, bags in all) after each.

    Returns:
        The manifest of each site. Read it with ``check_files=False``.

    Raises:
        BagError: Another run is writing to one of the folders.
    """
    field = field or FieldParameters()
    planned = plan_slides(cohort)
    manifests = write_site_manifests(out_dir, planned)
    done = 0
    for site, path in manifests.items():
        manifest = read_manifest(path, check_files=False)
        of_site = [slide for slide in planned if slide.site == site]
        with writing_to(path.parent / "bags"):
            for slide, target in zip(of_site, _bag_paths(manifest), strict=True):
                _make_bag(target, slide, encoder, cohort.seed, field)
                done += 1
                if progress is not None:
                    progress(done, len(planned))
    return manifests


def _bag_paths(manifest: Manifest) -> list[Path]:
    folder = manifest.path.parent / "bags"
    return [bag_path(folder, manifest.row_id(row)) for row in manifest.rows]


def _make_bag(target: Path, slide: PlannedSlide, encoder: Encoder, seed: int, field: FieldParameters) -> None:
    header = BagHeader(
        version=BAG_VERSION,
        slide_sha256=None,
        slide_size_bytes=0,
        slide_mtime_ns=0,
        mosaic=None,
        encoder=encoder.id,
        features=encoder.features,
        preprocessing=None if encoder.preprocessing is None else encoder.preprocessing.to_json(),
        source=f"histoflare synthetic, {field.patches} patches, seed {seed}",
        patch_mpp=field.mpp,
        patch_px=field.patch_px,
        l0_patch_px=field.patch_px,
    )
    if _is_there(target, header):
        return
    patches, corners = render_mosaic(slide, seed, field.patches, field.patch_px, field.mpp)
    images = torch.from_numpy(np.ascontiguousarray(patches.transpose(0, 3, 1, 2)))  # (n, 3, h, w)
    save_bag(target, Bag(header, encoder.encode(images).numpy(), corners))


def _is_there(target: Path, header: BagHeader) -> bool:
    try:
        found = read_header(target)
    except BagError:
        return False
    return found.to_json() == header.to_json() | {"content_sha256": found.content_sha256}
