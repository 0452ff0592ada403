"""Bags of generated tissue without the slides in between: thousands, for experiments.

The patients, hospitals and tissue are those of :mod:`histoflare.synthetic.slides`. A bag holds a square field
of patches instead of a mosaic chosen from a slide: its header names no mosaic, and its source says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from histoflare.bags.bag import BAG_VERSION, Bag, BagHeader, read_header
from histoflare.bags.folder import bag_path, save_bag, writing_to
from histoflare.bags.network_encoder import Encoder
from histoflare.errors import BagError, JobError
from histoflare.slides.manifest import read_manifest
from histoflare.slides.threads import make_each
from histoflare.synthetic.cohort import write_site_manifests
from histoflare.synthetic.slides import PlannedSlide, SyntheticCohort, plan_slides, render_mosaic


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
    planned = plan_slides(cohort)
    manifests = write_site_manifests(out_dir, planned)
    folders = {site: path.parent / "bags" for site, path in manifests.items()}
    _make(planned, manifests, folders, encoder, cohort.seed, field or FieldParameters(), progress)
    return manifests


def make_undrawn_bags(
    manifests: Mapping[str, Path],
    folders: Mapping[str, Path],
    encoder: Encoder,
    cohort: SyntheticCohort,
    field: FieldParameters,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a bag for every slide of ``cohort`` that is planned and not drawn; those that are there are kept.

    Args:
        manifests: Site → its manifest, as ``synthetic.slides.make_slides`` wrote it.
        folders: Site → the folder of its bags, beside those of its slides.
        encoder, cohort, field, progress: As for :func:`make_bags`.

    Raises:
        BagError: Another run is writing to one of the folders.
    """
    undrawn = [slide for slide in plan_slides(cohort) if not slide.drawn]
    _make(undrawn, manifests, folders, encoder, cohort.seed, field, progress)


def _make(
    slides: Sequence[PlannedSlide],
    manifests: Mapping[str, Path],
    folders: Mapping[str, Path],
    encoder: Encoder,
    seed: int,
    field: FieldParameters,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    for site, path in manifests.items():
        manifest = read_manifest(path, check_files=False)
        targets = {row.slide.stem: bag_path(folders[site], manifest.row_id(row)) for row in manifest.rows}
        of_site = [slide for slide in slides if slide.site == site]
        wanted = [
            (slide, targets[slide.slide_id])
            for slide in of_site
            if not _is_there(targets[slide.slide_id], _header(encoder, seed, field))
        ]
        done += len(of_site) - len(wanted)
        if progress is not None and done:
            progress(done, len(slides))

        def make(slide: PlannedSlide) -> Bag:
            patches, corners = _draw(slide, seed, field)
            return Bag(_header(encoder, seed, field), encoder.encode(patches).numpy(), corners)

        bags = make_each(make, [slide for slide, _ in wanted])
        with writing_to(folders[site]), _one_thread_each(), closing(bags):
            for (_, target), bag in zip(wanted, bags, strict=True):
                save_bag(target, bag)
                done += 1
                if progress is not None:
                    progress(done, len(slides))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have the encoder take one thread a bag: several bags are made at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draw(slide: PlannedSlide, seed: int, field: FieldParameters) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return a slide's patches (n, 3, h, w) and their corners (n, 2)."""
    patches, corners = render_mosaic(slide, seed, field.patches, field.patch_px, field.mpp)
    return torch.from_numpy(np.ascontiguousarray(patches.transpose(0, 3, 1, 2))), corners


def _header(encoder: Encoder, seed: int, field: FieldParameters) -> BagHeader:
    return BagHeader(
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


def _is_there(target: Path, header: BagHeader) -> bool:
    try:
        found = read_header(target)
    except BagError:
        return False
    return found.to_json() == header.to_json() | {"content_sha256": found.content_sha256}
