"""WSSS4LUAD as the challenge gives it: lung adenocarcinoma, four classes (Han et al. 2022, arXiv:2204.06455).

``1.training`` has small images with the classes they show in their names; ``2.validation`` and ``3.testing``
have images with palette masks, and the first a ``background-mask`` beside them. The large images of the last
two (9 and 14) are those that DHUnet and FedDP use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from histoflare.errors import MaskError
from histoflare.masks.image_files import decode, read_file
from histoflare.masks.image_manifest import ImageRow, write_image_manifest
from histoflare.masks.importers import (
    MANIFEST,
    ImportReport,
    OnImage,
    check_apart,
    images_in,
    nothing,
    refuse,
    write_mask,
    write_tissue,
)
from histoflare.masks.importers.wsss4luad_masks import LABELS, read_binary, read_classes
from histoflare.slides.resolution import check_given_mpp
from histoflare.slides.table import relative_path, write_table

BACKGROUND = LABELS.index("background")

TRAINING, VALIDATION, TESTING = "1.training", "2.validation", "3.testing"
WEAK_LABELS = "weak_labels.csv"
SMALLEST_PX = 1000
"""Images with a shorter side are left out: FedDP's windows have 1000 px."""

Polarity = Literal["auto", "background", "tissue"]
"""What a background mask is above 0 for; the challenge scores where it is 0, DHUnet keeps where it is 1."""

SURE = 0.8
"""Share of pixels on which a background mask must agree with the masks' background class to be understood."""

NAME_LABELS = re.compile(r"[\[(]\s*([01])\s*[_,;\s]\s*([01])\s*[_,;\s]\s*([01])\s*[\])]$")


@dataclass(frozen=True)
class _Pair:
    """An image with its mask, and its background mask if it has one. ``part`` is validation or testing."""

    part: str
    image: Path
    mask: Path
    background: Path | None

    @property
    def name(self) -> str:
        return f"{self.part}-{self.image.stem}"


def import_wsss4luad(
    folder: Path,
    out: Path,
    *,
    smallest_px: int = SMALLEST_PX,
    polarity: Polarity = "auto",
    mpp: float | None = None,
    on_image: OnImage = nothing,
) -> ImportReport:
    """Write a manifest, masks and tissue images of the pixel-labelled images to ``out``; images stay.

    Nothing says which patient an image is of, so each counts as one of its own, and a note says so. If
    ``1.training`` is there, ``weak_labels.csv`` gets its images and the classes in their names.

    Args:
        folder: Holds ``2.validation`` and ``3.testing`` (one of them at least), perhaps ``1.training``.
        out: Folder for what is written.
        smallest_px: Images with a shorter side are left out.
        polarity: What background masks are above 0 for; ``auto`` finds it out by the masks' own background.
        mpp: Resolution of the images in µm/px, if it is known.
        on_image: Told how many images are done.

    Raises:
        MaskError: A folder or file is missing or damaged, a mask has another size or unknown colours, a name
            has no labels, or the polarity of the background masks is not clear.
        SlideError: ``mpp`` is no resolution (``SLIDE_MPP_INVALID``).
    """
    check_given_mpp(mpp, "--mpp")
    parts = (TRAINING, VALIDATION, TESTING)
    inside = [f"{part}/{name}" for part in parts[1:] for name in ("img", "mask", "background-mask")]
    check_apart(folder, out, [*parts, *inside], ["masks", "tissue"])
    pairs, small = _find_pairs(folder, smallest_px)
    weak = _weak_labels(folder / TRAINING, out) if (folder / TRAINING).is_dir() else []
    agreements: dict[str, float] = {}
    rows, problems = [], []
    for done, pair in enumerate(pairs, start=1):
        try:
            rows.append(_import_pair(pair, out, mpp, agreements))
        except MaskError as error:
            problems.append(f"{pair.name}: {error}")
        on_image(done, 2 * len(pairs))
    refuse(folder, problems)
    zero_is_tissue = _decide(agreements, polarity) == "background"
    for done, (pair, row) in enumerate(zip(pairs, rows, strict=True), start=len(pairs) + 1):
        if pair.background is not None and row.tissue is not None:
            write_tissue(row.tissue, read_binary(pair.background) != zero_is_tissue)
        on_image(done, 2 * len(pairs))
    if weak:
        write_table(out / WEAK_LABELS, ("image", *LABELS[:3]), weak)
    manifest = write_image_manifest(out / MANIFEST, rows)
    return ImportReport(manifest, LABELS, _notes(pairs, small, smallest_px, weak, zero_is_tissue))


def labels_in_name(name: str) -> tuple[int, int, int] | None:
    """Return the 0 or 1 of tumour, stroma and normal at the end of an image's stem, None if there are none.

    Written ``…[1_1_0]`` or ``…-[1, 1, 0]``.
    """
    match = NAME_LABELS.search(name.strip())
    if match is None:
        return None
    tumour, stroma, normal = (int(each) for each in match.groups())
    return tumour, stroma, normal


def _find_pairs(folder: Path, smallest_px: int) -> tuple[list[_Pair], int]:
    """Return the images to import, and how many are too small."""
    pairs, problems, small = [], [], 0
    for name in (VALIDATION, TESTING):
        part = folder / name
        if not part.is_dir():
            continue
        masks = images_in(part / "mask")
        backgrounds = images_in(part / "background-mask") if (part / "background-mask").is_dir() else {}
        for stem, image in images_in(part / "img").items():
            if _shorter_side_px(image) < smallest_px:
                small += 1
            elif stem not in masks:
                problems.append(f"{name}/img/{image.name}: has no mask")
            else:
                pairs.append(_Pair(name.split(".")[1], image, masks[stem], backgrounds.get(stem)))
    if not (folder / VALIDATION).is_dir() and not (folder / TESTING).is_dir():
        problems.append(f"neither {VALIDATION} nor {TESTING} is there: name the folder that holds them")
    elif not pairs and not problems:
        problems.append(f"no image has a shorter side of {smallest_px} px or more")
    refuse(folder, problems, "MASK_MISSING")
    return pairs, small


def _shorter_side_px(path: Path) -> int:
    try:
        with Image.open(path) as image:  # its head alone: whichever way it is turned, the side is the same
            return min(image.size)
    except OSError as error:
        raise MaskError(f"{path}: cannot be read ({error})", reason="IMAGE_UNREADABLE") from error


def _import_pair(pair: _Pair, out: Path, mpp: float | None, agreements: dict[str, float]) -> ImageRow:
    """Write a pair's mask and return its row; note how far 'above 0 is background' is true of it."""
    classes = read_classes(pair.mask)
    size_px = decode(read_file(pair.image, "IMAGE"), pair.image, "IMAGE").size
    _check_size(pair.mask, classes.shape, size_px)
    if pair.background is not None:
        marked = read_binary(pair.background)
        _check_size(pair.background, marked.shape, size_px)
        agreements[pair.name] = float(np.mean(marked == (classes == BACKGROUND)))
    target = out / "masks" / f"{pair.name}.png"
    write_mask(target, classes)
    tissue = out / "tissue" / f"{pair.name}.png" if pair.background is not None else None
    return ImageRow(
        0, pair.image, target, pair.name, tissue=tissue, mpp=mpp, subgroups={"site": f"wsss4luad {pair.part}"}
    )


def _check_size(path: Path, shape: tuple[int, ...], size_px: tuple[int, int]) -> None:
    if shape != (size_px[1], size_px[0]):
        raise MaskError(
            f"{path}: has {shape[1]} x {shape[0]} px and its image {size_px[0]} x {size_px[1]}",
            reason="MASK_SIZE",
        )


def _decide(agreements: dict[str, float], polarity: Polarity) -> Polarity:
    """Return what background masks are above 0 for, checked against every image's own background class."""
    if polarity != "auto" or not agreements:
        return "background" if polarity == "auto" else polarity
    mean = float(np.mean(list(agreements.values())))
    found: Polarity = "background" if mean >= 0.5 else "tissue"
    unsure = [
        f"{name}: {100 * share:.0f} % of its pixels say that above 0 is background"
        for name, share in sorted(agreements.items())
        if (share if found == "background" else 1 - share) < SURE
    ]
    refuse(
        Path("background-mask"),
        [*unsure, "what they are above 0 for is not clear: say it with --polarity"] if unsure else [],
        "MASK_CLASS",
    )
    return found


def _weak_labels(training: Path, out: Path) -> list[list[str | int]]:
    table: list[list[str | int]] = []
    problems = []
    for stem, path in images_in(training).items():
        labels = labels_in_name(stem)
        if labels is None:
            problems.append(f"{TRAINING}/{path.name}: no labels such as [1, 1, 0] in its name")
        else:
            table.append([relative_path(path, out), *labels])
    refuse(training, problems, "MASK_CLASS")
    return table


def _notes(
    pairs: Sequence[_Pair],
    small: int,
    smallest_px: int,
    weak: Sequence[object],
    zero_is_tissue: bool,
) -> tuple[str, ...]:
    notes = [
        "WSSS4LUAD does not say which patient an image is of: each image counts as a patient of its own, "
        "and two images of one person may come into different splits"
    ]
    without = sum(pair.background is None for pair in pairs)
    if without < len(pairs):
        meaning = "background" if zero_is_tissue else "tissue"
        notes.append(f"background masks were read as: above 0 is {meaning}")
    if without:
        notes.append(f"{without} images have no background mask and so no tissue image")
    if small:
        notes.append(f"{small} images with a side below {smallest_px} px were left out")
    if weak:
        notes.append(
            f"{len(weak)} images of {TRAINING} have labels of the whole image only: see {WEAK_LABELS}"
        )
    return tuple(notes)
