"""A site's images with their masks: what segmentation trains and is tested on.

Every file is checked when the cohort is loaded and read again when its pixels are asked for; a limited number
of bytes of pixels stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoflare.errors import MaskError
from histoflare.masks.image_files import class_counts, decode_mask, is_binary, read_file
from histoflare.masks.image_manifest import ImageRow, assign_image_splits, missing_hint, read_image_manifest
from histoflare.masks.pixels import ImageRecord, PixelCache, ReadImage, read_record
from histoflare.masks.resolution import MPP_PLACE, agreed_mpp, is_same_mpp
from histoflare.masks.windows import IGNORE, too_small
from histoflare.slides.cohort import LISTED_PROBLEMS, SplitCohort, fingerprint, in_order, list_problems, pool
from histoflare.slides.splits import DEFAULT_SPLIT, SplitRule

__all__ = ["ImageCohort", "ImageRecord", "ReadImage", "load_image_cohort", "pooled_images"]

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class ImageCohort(SplitCohort[ImageRecord]):
    """The images of one site (or of several, pooled), in the order of their ids.

    Attributes:
        name: The site.
        labels: Class names; a mask's values are indices into them.
        records: The images.
        warnings: What is odd but not wrong, for the site's own eyes.
        left_out: How many patients it is without, as they have no budget left.
    """

    name: str
    labels: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    warnings: tuple[str, ...] = ()
    cache: PixelCache = field(default_factory=lambda: PixelCache(CACHE_BYTES), repr=False, compare=False)
    left_out: int = 0

    def read(self, record: ImageRecord, *, keep: bool = True) -> ReadImage:
        """Return the pixels of the record; ``keep`` them in memory if there is room.

        Raises:
            MaskError: A file is gone (``IMAGE_MISSING``, ``MASK_MISSING``) or was changed since the cohort
                was loaded (``MASK_UNUSABLE``, or as it is damaged).
        """
        return self.cache.read(record, self.labels, keep)

    def read_mask(self, record: ImageRecord) -> NDArray[np.uint8]:
        """Return the mask uint8 (h, w) alone; errors as :meth:`read`, but a change is not noticed."""
        held = self.cache.held(record)
        return (
            decode_mask(read_file(record.mask, "MASK"), record.mask, self.labels)
            if held is None
            else held.mask
        )

    def read_ahead(self) -> None:
        """Do nothing: every file was read and checked when the cohort was loaded."""

    def read_all(self) -> None:
        """Read every image and mask again from its disk, and keep nothing of it in memory.

        Raises:
            MaskError: As :meth:`read`.
        """
        for record in self.records:
            PixelCache(0).read(record, self.labels)

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes when a file, a split, a resolution or the grouping by patient does.

        Patients enter by their order of appearance and not by name.
        """
        return fingerprint([self.labels], self.records, lambda record: record.mpp)


def load_image_cohort(
    name: str,
    manifest_path: Path,
    labels: Sequence[str],
    *,
    mpp: float | None = None,
    window_px: int = 1,
    split: SplitRule = DEFAULT_SPLIT,
    cache_bytes: int = CACHE_BYTES,
    mpp_place: str = MPP_PLACE,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> ImageCohort:
    """Return the cohort of the manifest at ``manifest_path``, every image and mask read and checked once.

    A manifest without a split column is split by :func:`assign_image_splits`; one without training rows (an
    external cohort) can be tested on only.

    Args:
        name: The site's name.
        manifest_path: The CSV of its images.
        labels: The job's class names, in its order.
        mpp: Resolution the images must have (1 %); an image that does not say its own is taken with a
            warning. None takes any, but one for all of them.
        window_px: Side that every image must have at least.
        split: The job's rule, for a manifest without a split column.
        cache_bytes: Pixels kept in memory.
        mpp_place: Where the person can state ``mpp``, for the error if images differ in it.
        on_image: Told how many images are checked, and of how many.

    Raises:
        ManifestError: The manifest cannot be used.
        MaskError: Something is wrong with its files (COHORT_INVALID); everything that is, is in its text.
    """
    # a file that is missing is listed here, with what else is wrong with the files
    manifest = assign_image_splits(read_image_manifest(manifest_path, check_files=False), split)
    problems: list[str] = []
    warnings: list[str] = []
    unsaid: list[str] = []
    binary: list[str] = []
    records = []
    seen = {"train": np.zeros(256, np.int64), "test": np.zeros(256, np.int64)}
    for done, row in enumerate(manifest.rows, start=1):
        where = f"line {row.line} ({row.written or row.image})"
        problems += _mpp_problems(row, mpp, where, unsaid)
        try:
            record, counts = _check(row, manifest.row_id(row), labels, window_px)
        except MaskError as error:
            is_missing = error.reason in ("IMAGE_MISSING", "MASK_MISSING")
            hint = missing_hint(manifest_path.parent, row) if is_missing else ""
            problems.append(f"{where}: {error}{hint}")
        else:
            records.append(record)
            if is_binary(row.mask, counts):
                binary.append(f"line {row.line} ({row.mask.name})")
            if record.split in seen:
                seen[record.split] += counts
        on_image(done, len(manifest.rows))
    problems += _in_two_splits(records)
    if mpp is None:
        stated = [row.mpp for row in manifest.rows]
        try:
            agreed = agreed_mpp({name: stated}, mpp_place)
        except MaskError as error:
            problems.append(str(error))
        else:
            if agreed is None:
                warnings.append(
                    "no image states its resolution, and none is asked for: a model of these images has none "
                    "either, and takes a slide as its finest level is. State it (column mpp, or --mpp of "
                    f"'masks import'), or for all images at once ({mpp_place})"
                )
            else:
                warnings.append(
                    f"the images are at {agreed:g} µm/px, and no resolution was given to compare that with: "
                    f"'run' takes theirs; a consortium's protocol.toml has to name it (mpp = {agreed:g}), or "
                    "their site refuses the job"
                )
    if problems:
        raise MaskError(
            f"{name}: the images of {manifest_path} do not fit the job:{list_problems(problems)}",
            reason="COHORT_INVALID",
        )
    if unsaid:
        warnings.append(
            f"{len(unsaid)} images do not say their resolution, from {unsaid[0]} on; they are taken for the "
            f"job's {mpp:g} µm/px"
        )
    if binary:
        more = len(binary) - LISTED_PROBLEMS
        warnings.append(
            f"only 0 and 255 are in the mask of {', '.join(binary[:LISTED_PROBLEMS])}"
            + (f" and of {more} more" if more > 0 else "")
            + ": a binary mask? 255 means not annotated here; 'histoflare masks import binary' makes classes "
            "of it"
        )
    warnings += _split_warnings(records, labels, seen)
    return ImageCohort(name, tuple(labels), in_order(records), tuple(warnings), PixelCache(cache_bytes))


def pooled_images(cohorts: Sequence[ImageCohort], name: str = "pooled") -> ImageCohort:
    """Return all images of ``cohorts`` as one cohort, for the pooled bound; a federation never does that.

    Images and patients get their site's name in front, so equal names of two sites stay apart.

    Raises:
        MaskError: There are none, two have one name, or labels differ (COHORT_INVALID).
    """
    labels = {cohort.labels for cohort in cohorts}
    if len(labels) != 1 or len({cohort.name for cohort in cohorts}) != len(cohorts):
        raise MaskError(
            "cohorts can be pooled if there is one at least, each has its own name, and all have the same "
            "labels",
            reason="COHORT_INVALID",
        )
    records, warnings = pool(cohorts)
    limit = max(cohort.cache.limit_bytes for cohort in cohorts)
    return ImageCohort(name, labels.pop(), records, warnings, PixelCache(limit))


def made_up_images(labels: Sequence[str], side_px: int, patients: int, images: int) -> ImageCohort:
    """Return training images of random pixels, held in memory, to measure time with.

    Args:
        labels: Class names. side_px: Of each square image. patients: How many. images: How many each has.
    """
    rng = np.random.default_rng(0)
    pixels = ReadImage(
        rng.integers(0, 256, (side_px, side_px, 3), np.uint8),
        rng.integers(0, len(labels), (side_px, side_px), np.uint8),
        None,
    )
    cache = PixelCache(CACHE_BYTES)
    records = []
    for patient in range(patients):
        for image in range(images):
            name = f"{patient}-{image}"
            records.append(ImageRecord(name, f"{patient}", "train", Path(name), Path(name)))
            cache.hold(records[-1], pixels)
    return ImageCohort("made up", tuple(labels), tuple(records), cache=cache)


def _check(
    row: ImageRow, row_id: str, labels: Sequence[str], window_px: int
) -> tuple[ImageRecord, NDArray[np.int64]]:
    """Return the row's record and how many pixels of each value its mask has."""
    pixels, content_sha256 = read_record(row.image, row.mask, row.tissue, labels)
    if min(pixels.size_px) < window_px:
        raise MaskError(too_small(pixels.size_px, window_px), reason="IMAGE_TOO_SMALL")
    record = ImageRecord(
        slide_id=row_id,
        patient=row.patient,
        split=str(row.split),
        image=row.image,
        mask=row.mask,
        tissue=row.tissue,
        mpp=row.mpp,
        subgroups=row.subgroups,
        content_sha256=content_sha256,
    )
    return record, class_counts(pixels.mask)


def _in_two_splits(records: Sequence[ImageRecord]) -> list[str]:
    """Return a problem for each image whose very bytes stand in two splits: what is trained on is no test."""
    first: dict[str, ImageRecord] = {}
    problems = []
    for record in records:
        other = first.setdefault(record.content_sha256, record)
        if other.split != record.split:
            problems.append(
                f"{record.image} ({record.split}) and {other.image} ({other.split}) are the same image"
            )
    return problems


def _mpp_problems(row: ImageRow, mpp: float | None, where: str, unsaid: list[str]) -> list[str]:
    if mpp is None:
        return []
    if row.mpp is None:
        unsaid.append(where)
        return []
    if not is_same_mpp(row.mpp, mpp):
        return [
            f"{where}: at {row.mpp:g} µm/px, the job's images are at {mpp:g}: "
            "resample it to that, or name the images' own for the job (protocol.mpp)"
        ]
    return []


def _split_warnings(
    records: Sequence[ImageRecord], labels: Sequence[str], seen: Mapping[str, NDArray[np.int64]]
) -> list[str]:
    """Return what there is nothing of to train or to test on; ``seen``: split → pixels of each class."""
    splits = {record.split for record in records}
    warnings = []
    if "train" not in splits:
        warnings.append("no training images: this cohort can only be tested on")
    if "test" not in splits:
        warnings.append("no test patients: the model cannot be tested here")
    for split, what in (("train", "training"), ("test", "test")):
        if split in splits:
            unseen = [
                label for index, label in enumerate(labels) if index != IGNORE and not seen[split][index]
            ]
            warnings += [f"no pixel of a {what} mask is '{label}'" for label in unseen]
    return warnings
